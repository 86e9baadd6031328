"""The Claims deployment: one small replica that knows who works on which video, and alone writes the app's records.

Because all changes of a record go through here, two orchestrators never make the same video, a late writer is told
apart from the owner, and nothing brings a deleted video back. Its own state is a view of the storage: after a restart
it reads the unfinished records again, gives their owners one lease in which to report, and goes on. Of several apps on
one storage each holds some of the videos (see ``holder``), and any of them answers for all. It imports no torch, so
that it is back soon.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import ray
from cachetools import TTLCache
from ray import serve

from deployments.claims.admission import Admission
from deployments.claims.config import ClaimsConfig
from deployments.claims.holder import Holder
from deployments.claims.ledger import Ledger
from deployments.claims.messages import Admitted, News, QueuePlace, QueueState, RunUpdate
from deployments.claims.orchestrators import OrchestratorHandles, Orchestrators
from deployments.claims.places import Places
from deployments.claims.queue import StepRate, num_steps_of
from deployments.claims.sweep import Sweep
from deployments.errors import QueueFullError, SupersededError
from deployments.rpc.tasks import to_its_end
from deployments.telemetry.logs import configure_logging
from deployments.telemetry.queue import QueueMetrics
from deployments.telemetry.storage import StorageMetrics
from pyramid_serve.api import VideoError, VideoRecord
from pyramid_serve.storage import StorageError, VideoStore, shown_root

if TYPE_CHECKING:
    from deployments.telemetry.traces import VideoTraces

logger = logging.getLogger(__name__)

_MAX_REMEMBERED = 10_000
_REMEMBERED_S = 300.0
"""How long the answers to calls are remembered that are made again where an answer was lost."""


class Claims:
    """Who works on which video.

    Calls that write are completed even if their caller goes away: the write itself is in a thread and cannot be
    stopped, and the record's lock must be held until it is over.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, storage: str, config: ClaimsConfig, *, orchestrators: Orchestrators | None = None, app: str | None = None
    ) -> None:
        """storage: the root of the ``VideoStore``. orchestrators: those of the same app, unless given. app: what tells
        this app from others on the same storage; its name and its cluster unless given.
        """
        self._is_served = orchestrators is None
        if self._is_served:
            configure_logging(serve.get_replica_context().replica_tag)
        self._config = config
        self._metrics = QueueMetrics(max_queued=config.max_queued)
        self._storage_metrics = StorageMetrics()
        # Not longer: who waits for the storage for a whole lease is not believed to be there any more.
        self._store = store = VideoStore(storage, patience_s=config.app_lease_s / 2)
        self._rate = StepRate()
        self._holder = Holder(store, app=_app_here() if app is None else app, lease_s=config.app_lease_s)
        self._traces = None if config.traces_endpoint is None else _traces_to(config.traces_endpoint)
        self._ledger = Ledger(store, self._holder, config, on_outcome=self._metrics.ended, on_end=self._trace)
        self._places = Places(self._ledger.records, self._rate)
        self._admission = Admission(self._ledger, store, self._rate, max_queued=config.max_queued)
        self._sweep = Sweep(
            self._ledger,
            store,
            self._holder,
            config,
            orchestrators or OrchestratorHandles("Orchestrator"),
            on_sweep=self._measure,
            on_storage_failure=self._storage_metrics.refused,
        )
        self._granted: TTLCache[str, str] = TTLCache(_MAX_REMEMBERED, _REMEMBERED_S)
        self._deleted: TTLCache[str, str] = TTLCache(_MAX_REMEMBERED, _REMEMBERED_S)
        await self._sweep.open()
        logger.info("claims: %d unfinished videos in %s", len(self._ledger.records), shown_root(storage))

    def __del__(self) -> None:
        """Serve calls it when the replica is stopped in order."""
        if self._is_served:
            self._holder.leave()
            if self._traces is not None:
                self._traces.close()

    def _trace(self, record: VideoRecord) -> None:
        """Trace a video that is over, where that is asked for."""
        if self._traces is not None:
            self._traces.send(record)

    def _measure(self) -> None:
        """Tell the metrics how the videos stand."""
        state = self._ledger.state
        self._metrics.swept(
            num_queued=state.num_queued,
            num_in_progress=state.num_in_progress,
            oldest_queued_at=self._ledger.oldest_queued_at,
            num_unreadable=self._store.num_unreadable,
        )

    # --- for clients ------------------------------------------------------------------------------------------------

    @to_its_end
    async def submit(self, records: Sequence[VideoRecord]) -> list[Admitted | Exception]:
        """Accept videos. For each it returns what became of it, or an error.

        Pictures must be in the storage already. Asking again with the same records is harmless. The errors are
        ``QueueFullError``, and ``StorageError`` where the storage takes nothing: then the video does not exist, and its
        key is free. Raises ``SupersededError``.
        """
        results = await asyncio.gather(*map(self._admission.admit, records), return_exceptions=True)
        answers: list[Admitted | Exception] = []
        for record, result in zip(records, results, strict=True):
            match result:
                case VideoRecord():
                    answers.append(Admitted(result, self._places.of(result.id)))
                case QueueFullError():
                    answers.append(result)
                case StorageError():
                    self._storage_metrics.refused()
                    answers.append(result)
                case Exception() if not isinstance(result, SupersededError):
                    logger.error("not accepted", exc_info=result, extra={"video_id": record.id})
                    answers.append(result)
                case _:  # the whole call is cancelled, or made again with this replica's successor
                    raise result
        return answers

    async def get(self, video_id: str) -> VideoRecord:
        """The record as it is now. Raises ``VideoNotFoundError``."""
        return await self._ledger.get(video_id)

    async def look(self, video_id: str) -> tuple[VideoRecord, QueuePlace] | None:
        """The record and the place of an unfinished video, from the same moment; None for any other video."""
        record = self._ledger.records.get(video_id)
        return None if record is None else (record, await self.place(video_id))

    async def place(self, video_id: str) -> QueuePlace:
        """Where an unfinished video stands, as it was at most a second ago."""
        return self._places.of(video_id)

    async def queue(self) -> QueueState:
        """How many videos wait and are in progress.

        Raises ``SupersededError`` and ``StorageError``, for the caller wants to know whether videos are being made.
        """
        await self.check_health()
        await self._holder.check()
        return self._ledger.state

    async def watch(self, video_id: str, seen_revision: int, timeout_s: float) -> VideoRecord | None:
        """The record once its revision is not this one, or the video is over; None if that takes too long.

        Raises ``VideoNotFoundError``, also when the video is deleted while this waits.
        """
        return await self._ledger.watch(video_id, seen_revision, timeout_s)

    async def news(self, source: str, number: int, timeout_s: float) -> News:
        """What has changed since the change of this number, as soon as something has, or after so many seconds.

        source: who told of that number. Everything is told to those who know nothing or too little.
        """
        changes = self._ledger.changes
        is_whole = source != self._holder.name or not changes.is_known(number)
        if not is_whole and changes.number == number:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await changes.wait()
        records = self._ledger.records
        changed = list(records) if is_whole else changes.changed_since(number)
        return News(
            source=self._holder.name,
            number=changes.number,
            is_whole=is_whole,
            records=tuple(records[video_id] for video_id in changed if video_id in records),
            gone=() if is_whole else tuple(changes.gone_since(number)),
            places={video_id: (position, eta_s) for video_id, (position, eta_s) in self._places.all().items()},
        )

    @to_its_end
    async def cancel(self, video_id: str) -> VideoRecord:
        """End a video now, wherever it is worked on; one that is over stays as it is. Raises ``VideoNotFoundError``."""
        async with self._ledger.hold(video_id):
            record = await self._ledger.get(video_id)
            if record.is_over:
                return record
            error = VideoError(code="cancelled", message="the video was cancelled")
            record = await self._ledger.end(record, error=error)
        await self._sweep.stop(video_id)
        return record

    @to_its_end
    async def delete(self, video_id: str, token: str) -> None:
        """Remove a video, and end it if it is unfinished; asking again with the same token is harmless.

        Raises ``VideoNotFoundError``.
        """
        if self._deleted.get(video_id) == token:
            return
        async with self._ledger.hold(video_id):
            await self._ledger.delete(video_id)
        self._deleted[video_id] = token
        await self._sweep.stop(video_id)

    async def check_health(self) -> None:
        """Raises ``SupersededError`` once another replica has taken over.

        Serve then replaces this one. The other may be gone by now, and of several the one that is started last wins.
        """
        self._holder.check_superseded()

    # --- for orchestrators ------------------------------------------------------------------------------------------

    @to_its_end
    async def claim(self, video_id: str, owner: str, token: str) -> VideoRecord | None:
        """The record, whose ``attempts`` is the number to name in every update; None if it has an owner or is over.

        Asking again with the same token is harmless: the answer is the same.
        """
        async with self._ledger.hold(video_id):
            await self._holder.check(closely=True)
            record = self._ledger.records.get(video_id)
            if record is None:
                return None
            # A replica of claims that has started since knows no token.
            if record.owner == owner and self._granted.get(video_id, token) == token:
                self._granted[video_id] = token
                return record
            if (record.owner is not None and self._ledger.is_leased(video_id)) or self._holder.is_yielding:
                return None
            record = await self._ledger.grant(record, owner)
            self._granted[video_id] = token
            return record

    @to_its_end
    async def update(self, video_id: str, attempt: int, update: RunUpdate) -> bool:
        """Renew the lease and note what was done. False: the video is no longer the caller's, who is to stop."""
        async with self._hold_for_owner(video_id, attempt) as record:
            if record is None:
                return False
            num_new_steps = max(update.num_steps_done - record.num_steps_done, 0)
            self._rate.count(num_new_steps, now=time.monotonic())
            await self._ledger.note(record, update)
            return True

    @to_its_end
    async def complete(self, video_id: str, attempt: int, update: RunUpdate) -> bool:
        """End a video all of whose files are in the storage. False: it is no longer the caller's."""
        async with self._hold_for_owner(video_id, attempt) as record:
            if record is None:
                return False
            fields = update.changes(record, now=time.time()) | {"num_steps_done": num_steps_of(record)}
            await self._ledger.end(record, **fields)
            return True

    @to_its_end
    async def fail(self, video_id: str, attempt: int, error: VideoError, *, is_final: bool) -> bool:
        """An attempt ended with an error: the video is tried again, unless that is of no use or was done often enough.

        False: the video is no longer the caller's.
        """
        async with self._hold_for_owner(video_id, attempt) as record:
            if record is None:
                return False
            await self._ledger.fail(record, error, is_final=is_final)
            return True

    @to_its_end
    async def release(self, video_id: str, attempt: int, pause_s: float = 0.0) -> bool:
        """Give a video back, for another to go on with after so many seconds; this does not count as a failure.

        False: the video is no longer the caller's.
        """
        async with self._hold_for_owner(video_id, attempt) as record:
            if record is None:
                return False
            await self._ledger.release(record, not_before=time.time() + pause_s)
            return True

    @asynccontextmanager
    async def _hold_for_owner(self, video_id: str, attempt: int) -> AsyncIterator[VideoRecord | None]:
        """Hold the lock of a record that an attempt asks about; None where it is not this attempt that owns the video.

        An owner that stays one has a whole lease after its answer, also where that is an error of the storage.
        """
        async with self._ledger.hold(video_id):
            try:
                yield self._ledger.owned(video_id, attempt)
            finally:
                if self._ledger.owned(video_id, attempt) is not None:
                    self._ledger.renew(video_id)


def _traces_to(endpoint: str) -> "VideoTraces":
    from deployments.telemetry.traces import traces_to  # of an extra

    return traces_to(endpoint)


def _app_here() -> str:
    """What the replicas of an app have in common that follow each other in one cluster."""
    return f"{ray.get_runtime_context().get_session_name()}/{serve.get_replica_context().app_name}"
