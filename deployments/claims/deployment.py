"""The Claims deployment: one small replica that knows who works on which video, and alone writes the records.

Because all changes of a record go through here, two orchestrators never make the same video, a late writer is told
apart from the owner, and nothing brings a deleted video back. Its own state is a view of the storage: after a restart
it reads the unfinished records again, gives their owners one lease in which to report, and goes on. It imports no
torch, so that it is back soon.
"""

import logging
import time

from ray import serve
from ray.serve import metrics

from deployments.claims.admission import Admission
from deployments.claims.config import ClaimsConfig
from deployments.claims.ledger import Ledger
from deployments.claims.messages import QueuePlace, QueueState, RunUpdate
from deployments.claims.orchestrators import OrchestratorHandles, Orchestrators
from deployments.claims.queue import StepRate, num_steps_of, place_of, state_of
from deployments.claims.sweep import Sweep
from deployments.errors import SupersededError
from deployments.rpc.tasks import to_its_end
from deployments.telemetry.logs import configure_logging
from pyramid_serve.api import VideoError, VideoRecord
from pyramid_serve.storage import VideoStore, shown_root

logger = logging.getLogger(__name__)


class Claims:
    """Who works on which video.

    Calls that write are completed even if their caller goes away: the write itself is in a thread and cannot be
    stopped, and the record's lock must be held until it is over.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, storage: str, config: ClaimsConfig, *, orchestrators: Orchestrators | None = None
    ) -> None:
        """``storage``: the root of the ``VideoStore``; ``orchestrators``: those of the same app, unless given."""
        if orchestrators is None:
            configure_logging(serve.get_replica_context().replica_tag)
        self._config = config
        outcomes = metrics.Counter(
            "pyramid_serve_videos", description="Videos by how they ended.", tag_keys=("outcome",)
        )
        queued = metrics.Gauge("pyramid_serve_videos_queued", description="Videos that wait for a denoiser.")
        running = metrics.Gauge("pyramid_serve_videos_in_progress", description="Videos that are being made.")

        def gauge(state: QueueState) -> None:
            queued.set(state.num_queued)
            running.set(state.num_in_progress)

        store = VideoStore(storage)
        self._rate = StepRate()
        self._ledger = Ledger(store, config, on_outcome=lambda outcome: outcomes.inc(tags={"outcome": outcome}))
        self._admission = Admission(self._ledger, store, self._rate, max_queued=config.max_queued)
        self._sweep = Sweep(
            self._ledger, store, config, orchestrators or OrchestratorHandles("Orchestrator"), on_queue=gauge
        )
        await self._ledger.open()
        logger.info("claims: %d unfinished videos in %s", len(self._ledger.records), shown_root(storage))
        self._sweep.start()

    # --- for clients ------------------------------------------------------------------------------------------------

    @to_its_end
    async def submit(self, record: VideoRecord, picture: bytes | None = None, owner: str | None = None) -> VideoRecord:
        """Accept a video and return its record, or that of another video which has the same idempotency key.

        owner: the orchestrator that begins to work on it at once, so that claims hands it to no other. Asking again
        with the same record is harmless. Raises ``QueueFullError``, and ``StorageError`` where the storage takes
        nothing: then the video does not exist, and its key is free.
        """
        if owner is not None:
            lease_expires_at = time.time() + self._config.lease_s
            record = record.changed(owner=owner, attempts=1, lease_expires_at=lease_expires_at)
        return await self._admission.admit(record, picture)

    async def get(self, video_id: str) -> VideoRecord:
        """The record as it is now. Raises ``VideoNotFoundError``."""
        return await self._ledger.get(video_id)

    async def look(self, video_id: str) -> tuple[VideoRecord, QueuePlace] | None:
        """The record and the place of an unfinished video, from the same moment; None for any other video."""
        record = self._ledger.records.get(video_id)
        return None if record is None else (record, await self.place(video_id))

    async def place(self, video_id: str) -> QueuePlace:
        """Where an unfinished video stands."""
        rate = self._rate.per_second(now=time.monotonic())
        return place_of(self._ledger.records, video_id, rate=rate, now=time.time())

    async def queue(self) -> QueueState:
        """How many videos wait and are in progress.

        Raises ``SupersededError``, for the caller wants to know whether videos are being made.
        """
        await self.check_health()
        return state_of(self._ledger.records)

    async def watch(self, video_id: str, after_revision: int, timeout_s: float) -> VideoRecord | None:
        """The record once its revision is later than this one, which may be at once; None if that takes too long.

        Raises ``VideoNotFoundError``, also when the video is deleted while this waits.
        """
        return await self._ledger.watch(video_id, after_revision, timeout_s)

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
    async def delete(self, video_id: str) -> None:
        """Remove a video, and end it if it is unfinished. Raises ``VideoNotFoundError``."""
        async with self._ledger.hold(video_id):
            record = await self._ledger.get(video_id)
            await self._ledger.delete(record)
        if not record.is_over:
            await self._sweep.stop(video_id)

    async def check_health(self) -> None:
        """Raises ``SupersededError`` once another replica has taken over.

        Serve then replaces this one. The other may be gone by now, and of several the one that is started last wins.
        """
        if self._ledger.is_superseded:
            raise SupersededError("another replica of the claims deployment has taken over")

    # --- for orchestrators ------------------------------------------------------------------------------------------

    @to_its_end
    async def claim(self, video_id: str, owner: str) -> VideoRecord | None:
        """The record, whose ``attempts`` is the number to name in every update; None if it has an owner or is over."""
        async with self._ledger.hold(video_id):
            await self._ledger.check_epoch()
            record = self._ledger.records.get(video_id)
            if record is None or (record.owner is not None and self._ledger.is_leased(video_id)):
                return None
            return await self._ledger.grant(record, owner)

    @to_its_end
    async def update(self, video_id: str, attempt: int, update: RunUpdate) -> bool:
        """Renew the lease and note what was done. False: the video is no longer the caller's, who is to stop."""
        async with self._ledger.hold(video_id):
            record = self._ledger.owned(video_id, attempt)
            if record is None:
                return False
            num_new_steps = max(update.num_steps_done - record.num_steps_done, 0)
            self._rate.count(num_new_steps, now=time.monotonic())
            await self._ledger.note(record, update)
            return True

    @to_its_end
    async def complete(self, video_id: str, attempt: int, update: RunUpdate) -> bool:
        """End a video all of whose files are in the storage. False: it is no longer the caller's."""
        async with self._ledger.hold(video_id):
            record = self._ledger.owned(video_id, attempt)
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
        async with self._ledger.hold(video_id):
            record = self._ledger.owned(video_id, attempt)
            if record is None:
                return False
            await self._ledger.fail(record, error, is_final=is_final)
            return True

    @to_its_end
    async def release(self, video_id: str, attempt: int) -> bool:
        """Give a video back, for another to go on with at once; this does not count as a failure.

        False: the video is no longer the caller's.
        """
        async with self._ledger.hold(video_id):
            record = self._ledger.owned(video_id, attempt)
            if record is None:
                return False
            await self._ledger.release(record)
            return True
