"""Work that is completed even if the request that it belongs to is cancelled."""

import asyncio
import contextvars
import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
Result = TypeVar("Result")

_apart: set[asyncio.Task[Any]] = set()
"""Keeps the tasks alive: the event loop has only weak references to them."""


def begin_apart(work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
    """Start work that does not belong to the current request, for example while that is being cancelled.

    Serve cancels every call that belongs to a cancelled request, including calls made after the cancellation.
    """
    task = asyncio.create_task(work, context=contextvars.Context())
    _apart.add(task)
    task.add_done_callback(_apart.discard)
    return task


async def apart(work: Coroutine[Any, Any, Result]) -> Result:
    """Do work that does not belong to the current request, and wait for it. Cancelling the wait does not cancel it."""
    return await asyncio.shield(begin_apart(work))


def to_its_end(method: Callable[P, Coroutine[Any, Any, Result]]) -> Callable[P, Awaitable[Result]]:
    """A coroutine function that, once called, runs to its end even if its caller is cancelled."""

    @functools.wraps(method)
    async def run(*arguments: P.args, **keywords: P.kwargs) -> Result:
        return await apart(method(*arguments, **keywords))

    return run
