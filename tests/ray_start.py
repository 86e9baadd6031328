"""Starting Ray for tests."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

NUM_STARTS = 3


def start_ray(start: Callable[[], T]) -> T:
    """What `start` gives. Ray's own start now and then hangs until its 30 s are over; then it is started anew.

    Where it fails, `start` leaves nothing behind.
    """
    for tries_left in reversed(range(NUM_STARTS)):
        try:
            return start()
        except Exception as error:  # Ray raises no narrower one
            if not tries_left or "timed out during startup" not in str(error):
                raise
    raise AssertionError("unreachable")
