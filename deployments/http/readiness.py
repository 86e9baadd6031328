"""Whether the storage can be used, for probes that come as often as they like."""

import asyncio
import errno
import time
from collections.abc import Callable
from contextvars import Context

from pyramid_serve.storage import StorageError, VideoStore

_MAX_RETRY_S = 2.0


class Readiness:
    """Tries the storage for all probes of a process. For one event loop.

    Each probe reads one small object. Something small is written at most once every ``interval_s`` seconds, and sooner
    after a failure, so that the recovery is seen early. At most one read and one write are under way at any time, in
    threads: a storage that hangs holds two threads, however many probes come.
    """

    def __init__(self, store: VideoStore, *, interval_s: float) -> None:
        self._read = _SharedTry(store.read_epoch, interval_s=0.0)
        self._write = _SharedTry(store.check, interval_s=interval_s)

    async def check(self) -> None:
        """Raises ``StorageError``. A storage that hangs hangs this too, so callers set a time limit."""
        await self._read.check()
        await self._write.check()


class _SharedTry:
    """A blocking function, run in a thread for all who ask at once, its outcome kept for a while."""

    def __init__(self, function: Callable[[], object], *, interval_s: float) -> None:
        self._function = function
        self._interval_s = interval_s
        self._task: asyncio.Task[StorageError | None] | None = None
        self._ended_at = 0.0

    async def check(self) -> None:
        """Raises ``StorageError``."""
        task = self._task
        if task is None or (task.done() and self._is_old(task)):
            # In a context of its own: Serve would cancel it with the first request that waits for it.
            self._task = task = asyncio.create_task(self._try(), context=Context())
        # Shielded, for others wait for it too.
        error = await asyncio.shield(task)
        if error is not None:
            raise StorageError(error.errno, error.strerror)  # a new one: each raise adds to an error's traceback

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
