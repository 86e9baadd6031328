"""Whether the storage can be used: cheap enough for probes of any frequency."""

import asyncio
import errno
import time
from collections.abc import Callable
from contextvars import Context

from pyramid_serve.storage import StorageError, VideoStore

_MAX_RETRY_S = 2.0


class Readiness:
    """Checks the storage for all probes of a process. All calls must come from one event loop.

    Each probe reads a small object. A small object is written at most once every ``interval_s`` seconds, or sooner
    after a failure, so that a recovery is seen early. At most one read and one write run at any time, each in a thread:
    a storage that hangs blocks two threads, however many probes come.
    """

    def __init__(self, store: VideoStore, *, interval_s: float) -> None:
        self._read = _SharedTry(store.read_epoch, interval_s=0.0)
        self._write = _SharedTry(store.check, interval_s=interval_s)

    async def check(self) -> None:
        """Raises ``StorageError``. It hangs while the storage hangs, so the caller must set a time limit."""
        await self._read.check()
        await self._write.check()


class _SharedTry:
    """A blocking function that runs in a thread once for all concurrent callers; its outcome is kept for a while."""

    def __init__(self, function: Callable[[], object], *, interval_s: float) -> None:
        self._function = function
        self._interval_s = interval_s
        self._task: asyncio.Task[StorageError | None] | None = None
        self._ended_at = 0.0

    async def check(self) -> None:
        """Raises ``StorageError``."""
        task = self._task
        if task is None or (task.done() and self._is_old(task)):
            # In its own context: otherwise Serve would cancel the task together with the request that started it.
            self._task = task = asyncio.create_task(self._try(), context=Context())
        # Shielded, because other callers wait for the same task.
        error = await asyncio.shield(task)
        if error is not None:
            raise StorageError(error.errno, error.strerror)  # a new one, as raising one again extends its traceback

    async def _try(self) -> StorageError | None:
        try:
            await asyncio.to_thread(self._function)
        except OSError as error:
            return StorageError(error.errno or errno.EIO, str(error))
        finally:
            self._ended_at = time.monotonic()
        return None

    def _is_old(self, task: "asyncio.Task[StorageError | None]") -> bool:
        if task.cancelled() or task.exception() is not None:
            return True
        has_failed = task.result() is not None
        interval_s = min(self._interval_s, _MAX_RETRY_S) if has_failed else self._interval_s
        return time.monotonic() - self._ended_at >= interval_s
