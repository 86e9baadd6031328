"""The unfinished records in memory, who owns each of them, and how they change, in memory and in the storage.

Several calls may be about one video at once: each holds the record's lock (``Ledger.hold``) from its first look at the
record to its last change.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any
from uuid import uuid4

from deployments.claims.config import ClaimsConfig
from deployments.claims.messages import RunUpdate
from deployments.claims.watchers import Watchers
from deployments.errors import SupersededError
from pyramid_serve.api import Status, VideoError, VideoRecord
from pyramid_serve.storage import VideoNotFoundError, VideoStore

logger = logging.getLogger(__name__)

_PERSIST_PROGRESS_S = 2.0
_MAX_BACKOFF_S = 60.0


class Ledger:
    """Every unfinished record with its lock, lease and watchers. For one event loop."""

    def __init__(self, store: VideoStore, config: ClaimsConfig, *, on_outcome: Callable[[str], None]) -> None:
        """``on_outcome`` is called with ``completed``, ``cancelled`` or an error's code when a video has ended."""
        self._store = store
        self._config = config
        self._on_outcome = on_outcome
        self._epoch = uuid4().hex
        self._records: dict[str, VideoRecord] = {}
        self._leases: dict[str, float] = {}
        self._saved_at: dict[str, float] = {}
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._watchers = Watchers()
        self.records: Mapping[str, VideoRecord] = MappingProxyType(self._records)
        """The unfinished records by id, as they are now."""
        self.has_news = asyncio.Event()
        """Set when a video has come, ended or lost its owner, so that another may be handed out."""
        self.is_superseded = False
        """Another replica has opened the same storage since."""

    async def open(self) -> None:
        """Take over all writing of records from any other replica, and read the unfinished ones."""
        await asyncio.to_thread(self._store.write_epoch, self._epoch)
        await self.scan()

    async def scan(self) -> None:
        """Adopt the storage's unfinished records, including those that a predecessor accepted in its last moments."""
        known = set(self._records)
        for record in await asyncio.to_thread(self._store.unfinished, but=known):
            async with self.hold(record.id):
                # Read again, for it may have been accepted, ended or deleted here in between.
                is_settled = record.id in self._records or not await asyncio.to_thread(self._store.exists, record.id)
                if not is_settled and not (await self.get(record.id)).is_over:
                    self._adopt(record)

    async def check_epoch(self) -> None:
        """Raises ``SupersededError`` where another replica has taken over: this one must grant or end nothing more."""
        if await asyncio.to_thread(self._store.read_epoch) != self._epoch:
            self.is_superseded = True
            raise SupersededError("another replica of the claims deployment has taken over")

    # --- looking at a record ----------------------------------------------------------------------------------------

    async def get(self, video_id: str) -> VideoRecord:
        """The record as it is now. Raises ``VideoNotFoundError``."""
        record = self._records.get(video_id)
        return record if record is not None else await asyncio.to_thread(self._store.read, video_id)

    async def watch(self, video_id: str, after_revision: int, timeout_s: float) -> VideoRecord | None:
        """The record once its revision is later than this one, which may be at once; None if that takes too long.

        Raises ``VideoNotFoundError``, also when the video is deleted while this waits.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            # Before the look at the record: a change that comes in between must not be missed.
            change = self._watchers.next_change(video_id) if video_id in self._records else asyncio.Event()
            record = await self.get(video_id)
            if record.revision > after_revision:
                return record
            if record.is_over:
                return None
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await change.wait()
            except TimeoutError:
                return None

    @asynccontextmanager
    async def hold(self, video_id: str) -> AsyncIterator[None]:
        """Hold the lock of a record, whether there is one or not."""
        lock = self._locks[video_id]
        try:
            async with lock:
                yield
        finally:
            if video_id not in self._records and not lock.locked():
                self._locks.pop(video_id, None)

    def is_held(self, video_id: str) -> bool:
        """Whether a call holds the lock of a record just now."""
        lock = self._locks.get(video_id)
        return lock is not None and lock.locked()

    def owned(self, video_id: str, attempt: int) -> VideoRecord | None:
        """The unfinished record, if it is still this attempt that owns it."""
        record = self._records.get(video_id)
        return record if record is not None and record.owner is not None and record.attempts == attempt else None

    def is_leased(self, video_id: str) -> bool:
        """Whether the owner was heard from recently enough to keep the video."""
        return self._leases.get(video_id, 0) > time.monotonic()

    # --- changing a record; the caller must hold its lock -------------------------------------------------------------

    async def create(self, record: VideoRecord, picture: bytes | None) -> None:
        """Write a new video and look after it. Raises ``VideoExistsError`` and ``StorageError``."""
        await self.check_epoch()
        await asyncio.to_thread(self._store.create, record, picture=picture)
        self._adopt(record)
        self.has_news.set()
        logger.info("accepted", extra={"video_id": record.id})

    async def grant(self, record: VideoRecord, owner: str) -> VideoRecord:
        """Give a video to an owner, as a further attempt."""
        return await self._change_and_renew(record, attempts=record.attempts + 1, owner=owner)

    async def note(self, record: VideoRecord, update: RunUpdate) -> None:
        """Renew the owner's lease, and change what its update changes.

        Progress within a unit is not written to the storage each time; a finished unit and a new status are.
        """
        self._renew(record.id)
        fields = update.changes(record, now=time.time())
        if not fields:
            return
        is_unit = any(name in fields for name in ("num_units_done", "num_units_denoised"))
        if is_unit:
            fields |= {"num_failures": 0, "num_losses": 0}
        is_old = time.monotonic() - self._saved_at.get(record.id, 0) > _PERSIST_PROGRESS_S
        await self._change_and_renew(record, save=is_unit or "status" in fields or is_old, **fields)

    async def release(self, record: VideoRecord, **fields: Any) -> None:
        """Take a video from its owner, so that another can have it, and set other fields of its record."""
        await self._change(record, owner=None, lease_expires_at=None, **fields)
        self.has_news.set()

    async def fail(self, record: VideoRecord, error: VideoError, *, is_final: bool) -> None:
        """An attempt ended with an error. The video waits for another attempt, unless ``is_final`` or it had enough."""
        num_failures = record.num_failures + 1
        if is_final:
            await self.end(record, error=error)
        elif num_failures >= self._config.max_attempts:
            await self._give_up(record, f"{num_failures} attempts failed, the last with {error.message}")
        else:
            logger.warning("attempt failed: %s", error.message, extra={"video_id": record.id})
            delay_s = min(self._config.backoff_s * 2 ** (num_failures - 1), _MAX_BACKOFF_S)
            await self.release(record, num_failures=num_failures, not_before=time.time() + delay_s)

    async def lose(self, record: VideoRecord, reason: str) -> None:
        """The owner is gone. The video waits for another one, unless it lost too many of them in a row."""
        logger.warning("owner lost: %s", reason, extra={"video_id": record.id})
        num_losses = record.num_losses + 1
        if num_losses >= self._config.max_losses:
            await self._give_up(record, f"{num_losses} orchestrators were lost, the last: {reason}")
        else:
            await self.release(record, num_losses=num_losses)

    async def end(self, record: VideoRecord, *, error: VideoError | None = None, **fields: Any) -> VideoRecord:
        """End a video, as completed or with an error, and set other fields; return its last record."""
        now = time.time()
        await self.check_epoch()
        fields |= {
            "owner": None,
            "lease_expires_at": None,
            "completed_at": now,
            "expires_at": now + self._config.retention_s,
            "status": Status.COMPLETED if error is None else Status.FAILED,
            "error": error,
        }
        record = await self._change(record, **fields)
        self._drop(record.id)
        self._ended(record.id, "completed" if error is None else error.code)
        return record

    async def delete(self, record: VideoRecord) -> None:
        """Remove a video from the storage; an unfinished one counts as cancelled. Raises ``VideoNotFoundError``."""
        if not record.is_over:
            await self.check_epoch()
        await asyncio.to_thread(self._store.delete, record.id)
        self._drop(record.id)
        if not record.is_over:
            logger.info("deleted while unfinished", extra={"video_id": record.id})
            self._ended(record.id, "cancelled")

    async def _give_up(self, record: VideoRecord, message: str) -> None:
        await self.end(record, error=VideoError(code="too_many_attempts", message=message))

    async def _change_and_renew(self, record: VideoRecord, *, save: bool = True, **fields: Any) -> VideoRecord:
        """``_change`` by the owner, who has a whole lease after it: the time of a slow write is not its silence."""
        changed = await self._change(record, save=save, lease_expires_at=self._renew(record.id), **fields)
        self._renew(record.id)
        return changed

    async def _change(self, record: VideoRecord, *, save: bool = True, **fields: Any) -> VideoRecord:
        """Set fields of a record, in the storage too where ``save``, and wake its watchers."""
        record = record.changed(**fields)
        if save:
            try:
                await asyncio.to_thread(self._store.update, record)
            except VideoNotFoundError:
                self._drop(record.id)  # someone removed its folder
                raise
            self._saved_at[record.id] = time.monotonic()
        self._records[record.id] = record
        self._watchers.tell(record.id)
        return record

    def _adopt(self, record: VideoRecord) -> None:
        """Begin to look after an unfinished record. An owner that it names has one lease in which to report."""
        self._records[record.id] = record
        if record.owner is not None:
            self._renew(record.id)

    def _drop(self, video_id: str) -> None:
        """Stop looking after a video."""
        for of_video in (self._records, self._leases, self._saved_at):
            of_video.pop(video_id, None)
        self._watchers.tell(video_id)

    def _ended(self, video_id: str, outcome: str) -> None:
        logger.info(outcome, extra={"video_id": video_id})
        self._on_outcome(outcome)
        self.has_news.set()

    def _renew(self, video_id: str) -> float:
        """Begin a new lease; return its end in unix seconds."""
        self._leases[video_id] = time.monotonic() + self._config.lease_s
        return time.time() + self._config.lease_s
