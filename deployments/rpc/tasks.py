"""Work that is completed even if the request that it belongs to is cancelled."""

import asyncio
import contextvars
import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

logger = logging.getLogger(__name__)

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
    """Do work that does not belong to the current request, and wait for it.

    Cancelling the wait does not cancel the work. An error of it that nobody waits for any more is logged.
    """
    task = begin_apart(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_log_error)  # asyncio does not, for a task that was shielded
        raise


def _log_error(task: "asyncio.Task[Any]") -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.warning("failed after its caller had left", exc_info=task.exception())


def to_its_end(method: Callable[P, Coroutine[Any, Any, Result]]) -> Callable[P, Awaitable[Result]]:
    """A coroutine function that, once called, runs to its end even if its caller is cancelled."""

    @functools.wraps(method)
    async def run(*arguments: P.args, **keywords: P.kwargs) -> Result:
        return await apart(method(*arguments, **keywords))

    return run
