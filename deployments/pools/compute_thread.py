"""The thread on which everything of a part of the model computes, and whether its device still works."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from deployments.errors import DeviceFailedError

logger = logging.getLogger(__name__)

LONGEST_TURNS = 10
"""A turn may take this many times as long as the longest one that has ended."""

_CHECK_INTERVAL_S = 1.0

Result = TypeVar("Result")


class ComputeThread:
    """Runs functions one after another, and notices when its device has failed or hangs.

    A turn may take ``max_turn_s``, or ``LONGEST_TURNS`` times as long as the longest one so far, whichever is more. The
    thread of a turn that takes longer cannot be stopped, so from then on the device counts as failed for good, and
    everybody who waits for the thread is told so. They look at the clock themselves: no other thread is needed for it.
    """

    def __init__(
        self, name: str, *, max_turn_s: float | None = None, on_failure: Callable[[], None] | None = None
    ) -> None:
        """max_turn_s: seconds, None for no limit; on_failure: called when the device has failed, on any thread."""
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._name = name
        self._max_turn_s = max_turn_s
        self._on_failure = on_failure
        self._check_interval_s = min(_CHECK_INTERVAL_S, max_turn_s or _CHECK_INTERVAL_S)
        self._began: float | None = None
        self._longest_turn_s = 0.0
        self._device_error: str | None = None

    def submit(self, function: Callable[[], None]) -> None:
        """Call a function after those that were submitted before. What it raises is lost."""
        self._executor.submit(function)

    async def run(self, function: Callable[[], Result]) -> Result:
        """``function()``, as a turn of its own. Raises ``DeviceFailedError``, also if the device fails before it."""
        self.check()

        def run() -> Result:
            self.check()
            try:
                with self.turn():
                    return function()
            except torch.AcceleratorError as error:
                raise self.failed(error) from None

        return await self.result_of(asyncio.wrap_future(self._executor.submit(run)))

    async def result_of(self, future: asyncio.Future[Result]) -> Result:
        """The result of something that this thread does. Raises ``DeviceFailedError`` if it hangs before that is done.

        The future is cancelled with its caller.
        """
        try:
            while not (await asyncio.wait([future], timeout=self._check_interval_s))[0]:
                self.check()
            return await future
        finally:
            future.cancel()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Time a turn, on the thread itself. One within another has the whole time for itself, as has what follows."""
        is_outermost = self._began is None
        began = self._began = time.monotonic()
        try:
            yield
        finally:
            now = time.monotonic()
            self._longest_turn_s = max(self._longest_turn_s, now - began)
            self._began = None if is_outermost else now

    def check(self) -> None:
        """Raise ``DeviceFailedError`` if the device has failed for good, or hangs."""
        if self._device_error is None:
            began = self._began
            if began is not None and self._max_turn_s is not None:
                limit_s = max(self._max_turn_s, LONGEST_TURNS * self._longest_turn_s)
                if time.monotonic() - began > limit_s:
                    self._fail(f"the device hangs: a turn of the {self._name} has taken more than {limit_s:.1f} s")
        if self._device_error is not None:
            raise DeviceFailedError(self._device_error)

    def failed(self, error: torch.AcceleratorError) -> DeviceFailedError:
        """Note that the device has failed for good; returns what to tell those who wait for it."""
        message = f"the device failed: {error}"
        self._fail(message)
        return DeviceFailedError(message)

    def _fail(self, message: str) -> None:
        logger.error("%s", message)
        self._device_error = message
        if self._on_failure is not None:
            self._on_failure()
