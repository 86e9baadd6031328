"""Work that is finished even though the request that it is part of was cancelled."""

import asyncio
import contextvars
import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
Result = TypeVar("Result")

_apart: set[asyncio.Task[Any]] = set()
"""The loop itself holds its tasks but weakly."""


def begin_apart(work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
    """Begin some work outside of the request that this is part of, as on leaving it when it was cancelled.

    Serve cancels every call that belongs to a cancelled request, those too that are made after.
    """
    task = asyncio.create_task(work, context=contextvars.Context())
    _apart.add(task)
    task.add_done_callback(_apart.discard)
    return task


async def apart(work: Coroutine[Any, Any, Result]) -> Result:
    """Do some work outside of the request that this is part of, and wait for it; cancelling this does not cancel it."""
    return await asyncio.shield(begin_apart(work))


def to_its_end(method: Callable[P, Coroutine[Any, Any, Result]]) -> Callable[P, Awaitable[Result]]:
    """A coroutine function that, once begun, is done to its end, though its caller is cancelled."""

    @functools.wraps(method)
    async def run(*arguments: P.args, **keywords: P.kwargs) -> Result:
        return await apart(method(*arguments, **keywords))

    return run
