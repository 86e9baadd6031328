"""A server of a test, in a thread with an event loop of its own."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def in_a_thread(serve: Callable[[Callable[[], Awaitable[None]]], Coroutine[Any, Any, None]]) -> Iterator[None]:
    """Run a coroutine for as long as the block runs.

    It must await its argument, a coroutine function, when it has started; that returns when the block is over.
    """
    started, is_over = threading.Event(), threading.Event()

    async def until_over() -> None:
        started.set()
        await asyncio.to_thread(is_over.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve(until_over)), daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield
    finally:
        is_over.set()
        thread.join(10)
