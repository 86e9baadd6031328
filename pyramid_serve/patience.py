"""How errors of a storage behind a network are waited out: the same work is tried again, with random pauses."""

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from pyramid_serve.reasons import first_line

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_FIRST_PAUSE_S = 0.1
_MAX_PAUSE_S = 5.0
_FORGOTTEN_S = 15.0
"""Failures further apart than this are not taken for one outage."""
_LASTING_CLASSES = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    AssertionError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)
_LASTING_NUMBERS = frozenset(
    (
        errno.EACCES,
        errno.EDQUOT,
        errno.EEXIST,
        errno.EINVAL,
        errno.EISDIR,
        errno.ELOOP,
        errno.EMSGSIZE,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOSPC,
        errno.ENOSYS,
        errno.ENOTDIR,
        errno.ENOTSUP,
        errno.EPERM,
        errno.EROFS,
    )
)
_PASSING_STATUSES = frozenset((408, 425, 429))
"""Of the HTTP statuses from 400 to 499."""


class Patience:
    """Waits out the errors of one storage, for all threads that use it.

    Work that fails is tried again until ``seconds`` have passed since its first failure. While every other call fails
    too, the time counts from the first failure of them all: once a storage has been away for that long, each call
    fails at its first try, so that an outage does not fill a process with calls that wait.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._failing_since: float | None = None
        self._failed_at = 0.0

    def wait_out(self, work: Callable[[], Result]) -> Result:
        """What ``work`` returns. It must be harmless to repeat. Blocks; raises its last error, or one that will last.

        With a patience of 0 s the work is done once.
        """
        if self._seconds <= 0:
            return work()
        first_failed_at = 0.0

        def is_over(state: RetryCallState) -> bool:
            nonlocal first_failed_at
            now = time.monotonic()
            if state.attempt_number == 1:
                first_failed_at = now
            return now + state.upcoming_sleep > min(first_failed_at, self._note_failure(now)) + self._seconds

        result: Result = Retrying(
            retry=retry_if_exception(self._may_pass),
            stop=is_over,
            wait=wait_random_exponential(multiplier=_FIRST_PAUSE_S, max=_MAX_PAUSE_S),
            before_sleep=_tell,
            reraise=True,
        )(work)
        self._failing_since = None
        return result

    def _may_pass(self, error: BaseException) -> bool:
        if may_pass(error):
            return True
        self._failing_since = None  # the storage has answered
        return False

    def _note_failure(self, now: float) -> float:
        """Since when every call has failed, this one being the last."""
        since = self._failing_since
        if since is None or now > self._failed_at + _FORGOTTEN_S:
            self._failing_since = since = now
        self._failed_at = now
        return since


def may_pass(error: BaseException) -> bool:
    """Whether the same work may succeed soon. False for what is wrong with the work itself, or with the disk.

    Each object store raises classes of its own, so everything passes that is not known to last.
    """
    if not isinstance(error, Exception) or isinstance(error, _LASTING_CLASSES):
        return False
    if isinstance(error, OSError) and error.errno in _LASTING_NUMBERS:
        return False
    status = _http_status_of(error)
    return status is None or not 400 <= status < 500 or status in _PASSING_STATUSES


def _http_status_of(error: Exception) -> int | None:
    """The HTTP status that an error of gcsfs (``code``) or the Azure SDK (``status_code``) carries."""
    for name in ("status_code", "code"):
        status = getattr(error, name, None)
        if isinstance(status, int):
            return status
    return None


def _tell(state: RetryCallState) -> None:
    assert state.outcome is not None
    error = state.outcome.exception()
    reason = f"{type(error).__name__}: {first_line(error)}" if isinstance(error, Exception) else "?"
    logger.info("the storage fails, trying again in %.1f s: %s", state.upcoming_sleep, reason)
