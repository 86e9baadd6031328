"""Simulated time: what happens when, in the order of time."""

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any


class Events:
    """A clock in seconds that jumps from one event to the next."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_handled = 0
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = count()

    def after(self, seconds: float, callback: Callable[..., None], *arguments: Any) -> None:
        """Call back in so many seconds. Events of one moment happen in the order in which they were asked for."""
        heapq.heappush(self._queue, (self.now + seconds, next(self._order), callback, arguments))

    def run(self, *, until: Callable[[], bool] | None = None) -> None:
        """Go on until nothing is left to happen, or ``until`` says so."""
        while self._queue and (until is None or not until()):
            self.now, _, callback, arguments = heapq.heappop(self._queue)
            self.num_handled += 1
            callback(*arguments)
