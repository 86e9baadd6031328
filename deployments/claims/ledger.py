"""The unfinished records in memory, who owns each of them, and how they change, in memory and in the storage.

Several calls may be about one video at once: each holds the record's lock (``Ledger.hold``) from its first look at the
record to its last change.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from deployments.claims.config import ClaimsConfig
from deployments.claims.holder import Holder
from deployments.claims.messages import QueueState, RunUpdate
from deployments.claims.queue import backoff_s, is_suspect
from deployments.claims.watchers import Changes, Watchers
from pyramid_serve.api import Status, VideoError, VideoRecord
from pyramid_serve.storage import StorageError, VideoNotFoundError, VideoStore

logger = logging.getLogger(__name__)

_PERSIST_PROGRESS_S = 2.0
_ELSEWHERE_S = 1.0
_MAX_BLAMED = 1000


class Ledger:
    """Every unfinished record that is held here, with its lock, lease and watchers. For one event loop."""

    def __init__(
        self,
        store: VideoStore,
        holder: Holder,
        config: ClaimsConfig,
        *,
        on_outcome: Callable[[str], None],
        on_end: Callable[[VideoRecord], None],
    ) -> None:
        """on_outcome: called with ``completed``, ``cancelled`` or an error's code when a video has ended; on_end: with
        its last record, unless it was deleted.
        """
        self._store = store
        self._holder = holder
        self._config = config
        self._on_outcome = on_outcome
        self._on_end = on_end
        self._records: dict[str, VideoRecord] = {}
        self._waiting: set[str] = set()
        self._terms: dict[str, int] = {}
        self._leases: dict[str, float] = {}
        self._saved_at: dict[str, float] = {}
        self._locks: dict[str, _CountedLock] = {}
        self._watchers = Watchers()
        self.changes = Changes()
        """Of the records, in their order."""
        self._blamed: deque[str] = deque(maxlen=_MAX_BLAMED)
        self.records: Mapping[str, VideoRecord] = MappingProxyType(self._records)
        """The unfinished records by id, as they are now."""
        self.terms: Mapping[str, int] = MappingProxyType(self._terms)
        """Of each of these videos the term in which it is held here."""
        self.has_news = asyncio.Event()
        """Set when a video has come, ended or lost its owner, so that another may be handed out."""

    @property
    def state(self) -> QueueState:
        """How many of the videos wait and how many are in progress."""
        return QueueState(len(self._waiting), len(self._records) - len(self._waiting))

    @property
    def oldest_queued_at(self) -> float | None:
        """When the oldest of the videos that wait was accepted, in unix seconds; None if none waits."""
        return min((self._records[video_id].created_at for video_id in self._waiting), default=None)

    # --- looking at a record ----------------------------------------------------------------------------------------

    async def get(self, video_id: str) -> VideoRecord:
        """The record as it is now. Raises ``VideoNotFoundError``."""
        record = self._records.get(video_id)
        return record if record is not None else await asyncio.to_thread(self._store.read, video_id)

    async def watch(self, video_id: str, seen_revision: int, timeout_s: float) -> VideoRecord | None:
        """The record once its revision is another one, or it is over; None if that takes too long.

        Revisions may go back a little when claims is replaced, for not every step is saved. A video that another app
        holds is looked up in the storage once a second. Raises ``VideoNotFoundError``, also when the video is deleted
        while this waits.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            # Before the look at the record: a change that comes in between must not be missed.
            is_here = video_id in self._records
            change = self._watchers.next_change(video_id) if is_here else asyncio.Event()
            record = await self.get(video_id)
            if record.revision != seen_revision or record.is_over:
                return record
            left_s = deadline - time.monotonic()
            try:
                async with asyncio.timeout(left_s if is_here else min(left_s, _ELSEWHERE_S)):
                    await change.wait()
            except TimeoutError:
                if time.monotonic() >= deadline:
                    return None

    @asynccontextmanager
    async def hold(self, video_id: str) -> AsyncIterator[None]:
        """Hold the lock of a record, whether there is one or not."""
        lock = self._locks.setdefault(video_id, _CountedLock())
        lock.num_users += 1
        try:
            async with lock.lock:
                yield
        finally:
            lock.num_users -= 1
            if not lock.num_users:
                del self._locks[video_id]

    def is_held(self, video_id: str) -> bool:
        """Whether a call holds the lock of a record just now."""
        return video_id in self._locks

    def owned(self, video_id: str, attempt: int) -> VideoRecord | None:
        """The unfinished record, if it is still this attempt that owns it."""
        record = self._records.get(video_id)
        return record if record is not None and record.owner is not None and record.attempts == attempt else None

    def is_leased(self, video_id: str) -> bool:
        """Whether the owner was heard from recently enough to keep the video."""
        return self._leases.get(video_id, 0) > time.monotonic()

    # --- changing a record; the caller must hold its lock -------------------------------------------------------------

    async def create(self, record: VideoRecord) -> None:
        """Write a new video and look after it. Raises ``VideoExistsError`` and ``StorageError``."""
        await self._holder.check(closely=True)
        is_held = not self._holder.stands_by
        await asyncio.to_thread(self._store.create, record, holder=self._holder.name if is_held else "")
        logger.info("accepted", extra={"video_id": record.id})
        if is_held:
            self.adopt(record, term=0)

    async def grant(self, record: VideoRecord, owner: str) -> VideoRecord:
        """Give a video to an owner, as a further attempt."""
        await self._holder.check(closely=True)
        return await self._change_and_renew(record, attempts=record.attempts + 1, owner=owner)

    async def note(self, record: VideoRecord, update: RunUpdate) -> None:
        """Renew the owner's lease, and change what its update changes.

        Progress within a unit is not written to the storage each time; a finished unit and a new status are.
        """
        self.renew(record.id)
        fields = update.changes(record, now=time.time())
        if not fields:
            return
        is_unit = any(name in fields for name in ("num_units_done", "num_units_denoised"))
        if is_unit:
            fields |= {"num_failures": 0, "num_losses": 0}
        is_old = time.monotonic() - self._saved_at.get(record.id, 0) > _PERSIST_PROGRESS_S
        await self._change_and_renew(record, save=is_unit or "status" in fields or is_old, **fields)

    async def release(self, record: VideoRecord, **fields: Any) -> None:
        """Take a video from its owner, so that another can have it, and set other fields of its record.

        Where the storage refuses, this is known here only, until the next change of the record is saved.
        """
        fields |= {"owner": None, "lease_expires_at": None}
        try:
            await self._change(record, **fields)
        except StorageError as error:
            logger.warning("taken from its owner, but not in the storage: %s", error, extra={"video_id": record.id})
            await self._change(record, save=False, **fields)
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
            delay_s = backoff_s(num_failures, first_s=self._config.backoff_s)
            await self.release(record, num_failures=num_failures, not_before=time.time() + delay_s)

    async def lose(self, record: VideoRecord, reason: str) -> None:
        """The owner is gone. The video waits for another one, unless it lost too many of them in a row.

        Where one of the owner's videos is suspected of being what ends its owners, the loss counts against that alone.
        """
        logger.warning("owner lost: %s", reason, extra={"video_id": record.id})
        if is_suspect(record) and record.owner is not None:
            self._blamed.append(record.owner)
        elif record.owner in self._blamed or any(
            is_suspect(other) and other.owner == record.owner for other in self._records.values()
        ):
            await self.release(record)
            return
        num_losses = record.num_losses + 1
        if num_losses >= self._config.max_losses:
            await self._give_up(record, f"{num_losses} orchestrators were lost, the last: {reason}")
        else:
            delay_s = backoff_s(num_losses - 1, first_s=self._config.backoff_s) if num_losses > 1 else 0.0
            await self.release(record, num_losses=num_losses, not_before=time.time() + delay_s)

    async def end(self, record: VideoRecord, *, error: VideoError | None = None, **fields: Any) -> VideoRecord:
        """End a video, as completed or with an error, and set other fields; return its last record.

        That is another one where the video was over already. Raises ``VideoNotFoundError``.
        """
        now = time.time()
        await self._holder.check(closely=True)
        fields |= {
            "owner": None,
            "lease_expires_at": None,
            "completed_at": now,
            "expires_at": now + self._config.retention_s,
            "status": Status.COMPLETED if error is None else Status.FAILED,
            "error": error,
        }
        last = record.changed(**fields)
        try:
            ended = await asyncio.to_thread(self._store.end, last, term=await self._term_of(record.id))
        except VideoNotFoundError:
            self.drop(record.id)
            raise
        self.drop(record.id)
        # Only its owner completes a video: an earlier call did, and failed after the end was written.
        if ended == last or (error is None and ended.status is Status.COMPLETED):
            self._ended(record.id, "completed" if error is None else error.code)
            self._on_end(ended)
        return ended

    async def delete(self, video_id: str) -> None:
        """Remove a video from the storage; an unfinished one counts as cancelled. Raises ``VideoNotFoundError``."""
        await self._holder.check(closely=True)
        await asyncio.to_thread(self._store.delete, video_id)
        if video_id in self._records:
            logger.info("deleted while unfinished", extra={"video_id": video_id})
            self._ended(video_id, "cancelled")
        self.drop(video_id)

    async def _term_of(self, video_id: str) -> int:
        """The highest term of a video, also of one that another app holds."""
        term = self._terms.get(video_id)
        return term if term is not None else (await asyncio.to_thread(self._store.holds.terms)).get(video_id, 0)

    async def _give_up(self, record: VideoRecord, message: str) -> None:
        await self.end(record, error=VideoError(code="too_many_attempts", message=message))

    async def _change_and_renew(self, record: VideoRecord, *, save: bool = True, **fields: Any) -> VideoRecord:
        """``_change`` by the owner, who has a whole lease after it: the time of a slow write is not its silence."""
        changed = await self._change(record, save=save, lease_expires_at=self.renew(record.id), **fields)
        self.renew(record.id)
        return changed

    async def _change(self, record: VideoRecord, *, save: bool = True, **fields: Any) -> VideoRecord:
        """Set fields of a record, in the storage too where ``save``, and wake its watchers."""
        record = record.changed(**fields)
        if save:
            await self._holder.check()
            try:
                await asyncio.to_thread(self._store.update, record)
            except VideoNotFoundError:
                self.drop(record.id)  # someone removed its folder
                raise
            self._saved_at[record.id] = time.monotonic()
        self._keep(record)
        self._tell(record.id)
        return record

    # --- what is held here; the caller must hold the record's lock ----------------------------------------------------

    def adopt(self, record: VideoRecord, *, term: int) -> None:
        """Begin to look after an unfinished record. An owner that it names has one lease in which to report."""
        self._keep(record)
        self._terms[record.id] = term
        if record.owner is not None:
            self.renew(record.id)
        self._tell(record.id)
        self.has_news.set()

    def hold_in(self, video_id: str, *, term: int) -> None:
        """A video that is held here is so in another term."""
        self._terms[video_id] = term

    def drop(self, video_id: str) -> None:
        """Stop looking after a video, if it is looked after here."""
        for of_video in (self._records, self._terms, self._leases, self._saved_at):
            of_video.pop(video_id, None)
        self._waiting.discard(video_id)
        self._tell(video_id)

    def renew(self, video_id: str) -> float:
        """Begin a new lease, as its owner was heard from; return its end in unix seconds."""
        self._leases[video_id] = time.monotonic() + self._config.lease_s
        return time.time() + self._config.lease_s

    def end_lease(self, video_id: str) -> None:
        """The owner of a video is known to be gone."""
        self._leases.pop(video_id, None)

    def _keep(self, record: VideoRecord) -> None:
        self._records[record.id] = record
        if record.status is Status.QUEUED:
            self._waiting.add(record.id)
        else:
            self._waiting.discard(record.id)

    def _tell(self, video_id: str) -> None:
        """A record changed, came or went: tell all who wait."""
        if video_id in self._records:
            self.changes.change(video_id)
        else:
            self.changes.go(video_id)
        self._watchers.tell(video_id)

    def _ended(self, video_id: str, outcome: str) -> None:
        logger.info(outcome, extra={"video_id": video_id})
        self._on_outcome(outcome)
        self.has_news.set()


@dataclass
class _CountedLock:
    """A lock, and how many hold it or wait for it: it must not be replaced while there is one."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    num_users: int = 0
