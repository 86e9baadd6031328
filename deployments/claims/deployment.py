"""The Claims deployment: one small replica that knows who works on which video, and alone writes the records.

Because all changes of a record go through here, two never run one video, a late writer is told apart from the owner,
and nothing brings a deleted video back. Its own state is a view of the storage: after a restart it reads the unfinished
records again, gives their owners one lease to be heard of, and goes on. It imports no torch, so that it is back soon.
"""

import asyncio
import logging
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, ParamSpec, Protocol, TypeVar
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import metrics
from ray.serve.handle import DeploymentHandle

from deployments.rpc.tasks import to_its_end
from deployments.telemetry.logs import configure_logging
from pyramid_serve.api import Computed, Status, TimelineEntry, VideoError, VideoRecord
from pyramid_serve.storage import VideoExistsError, VideoNotFoundError, VideoStore, shown_root

logger = logging.getLogger(__name__)

P = ParamSpec("P")
Result = TypeVar("Result")

_RATE_WINDOW_S = 60.0
_PERSIST_PROGRESS_S = 2.0
_EXPIRY_SWEEP_S = 60.0
_MAX_BACKOFF_S = 60.0


class ClaimsConfig(BaseModel):
    """How long an owner may be silent, how often a video is tried, how many run at once and how long they are kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lease_s: Annotated[float, Field(gt=0)] = 5.0
    """A video whose owner was not heard of for so long is given to another."""
    sweep_interval_s: Annotated[float, Field(gt=0)] = 1.0
    rescan_interval_s: Annotated[float, Field(gt=0)] = 10.0
    """How often the storage is searched for unfinished videos that are not known here."""
    max_running: Annotated[int, Field(ge=1)] = 32
    """Videos given to orchestrators at once; the others wait here, oldest first."""
    max_queued: Annotated[int, Field(ge=1)] = 1000
    """Videos waiting; more are refused."""
    max_attempts: Annotated[int, Field(ge=1)] = 4
    """Errors in a row without a finished unit, before a video counts as failed."""
    max_losses: Annotated[int, Field(ge=1)] = 20
    """Orchestrators lost in a row without a finished unit, before the video is held to be what they die of."""
    backoff_s: Annotated[float, Field(gt=0)] = 0.5
    """Before the second attempt; doubled for each one after, up to a minute."""
    retention_s: Annotated[float, Field(gt=0)] = 7 * 24 * 3600.0
    """A video is deleted so long after it ended."""


class QueueFullError(RuntimeError):
    """As many videos wait as may. ``retry_after_s``: when it is worth trying again."""

    def __init__(self, max_queued: int, retry_after_s: int) -> None:
        super().__init__(max_queued, retry_after_s)
        self.max_queued = max_queued
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.max_queued} videos are waiting, which is all there may be; try again in {self.retry_after_s} s"


class SupersededError(RuntimeError):
    """Another replica of this deployment has taken over; ask again, and it will answer."""


@dataclass(frozen=True)
class RunUpdate:
    """What an owner tells while it works. Counts are of the whole video; ``timeline`` holds new entries only."""

    num_steps_done: int = 0
    num_units_denoised: int = 0
    num_units_done: int = 0
    num_units_retried: int = 0
    has_started: bool = False
    """A denoiser has taken it."""
    prompt_truncated_at: int | None = None
    negative_prompt_truncated_at: int | None = None
    computed: tuple[Computed, ...] = ()
    """Of every part that has worked on the video."""
    timeline: tuple[TimelineEntry, ...] = ()


class QueuePlace(NamedTuple):
    """``position`` counts the videos ahead, 0 for the next one; None when it runs. Seconds to its end, if known."""

    position: int | None
    eta_seconds: float | None


class QueueState(NamedTuple):
    """How many videos wait for a denoiser, and how many are being made."""

    num_queued: int
    num_in_progress: int


class Orchestrators(Protocol):
    """What claims asks of the orchestrators."""

    async def run(self, video_id: str) -> None:
        """Make a video. Returns when that has ended, however it did; raises ``RayActorError`` when the replica died."""

    async def stop(self, video_id: str) -> None:
        """Stop working on a video, whichever replica does."""


class OrchestratorHandles:
    """The orchestrators of the same app. Their handle is made late, for they are deployed after claims."""

    def __init__(self, deployment: str) -> None:
        self._deployment = deployment
        self._handle: DeploymentHandle[Any] | None = None

    @property
    def handle(self) -> DeploymentHandle[Any]:
        if self._handle is None:
            self._handle = serve.get_deployment_handle(self._deployment, serve.get_replica_context().app_name)
        return self._handle

    async def run(self, video_id: str) -> None:
        await self.handle.run.remote(video_id)

    async def stop(self, video_id: str) -> None:
        responses = self.handle.broadcast("stop", video_id)
        for result in await responses.results_async(timeout_s=5.0, return_exceptions=True):
            if isinstance(result, Exception):
                logger.warning("a replica could not be told to stop", extra={"video_id": video_id}, exc_info=result)


class Claims:
    """Who works on which video.

    Calls that write are done to their end though their caller goes away: the write itself is in a thread and cannot be
    called back, and the lock must not be let go before it.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, storage: str, config: ClaimsConfig, *, orchestrators: Orchestrators | None = None
    ) -> None:
        """``storage``: the root of the ``VideoStore``; ``orchestrators``: of the app it runs in, unless given."""
        if orchestrators is None:
            configure_logging(serve.get_replica_context().replica_tag)
        self._store = VideoStore(storage)
        self._config = config
        self._orchestrators = orchestrators or OrchestratorHandles("Orchestrator")
        self._epoch = uuid4().hex
        self._records: dict[str, VideoRecord] = {}
        self._accepting: set[str] = set()
        self._leases: dict[str, float] = {}
        self._saved_at: dict[str, float] = {}
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._keys = asyncio.Lock()
        self._changes: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._steps: deque[tuple[float, int]] = deque()
        self._is_superseded = False
        self._kicked = asyncio.Event()
        self._outcomes = metrics.Counter(
            "pyramid_serve_videos", description="Videos by how they ended.", tag_keys=("outcome",)
        )
        self._queued = metrics.Gauge("pyramid_serve_videos_queued", description="Videos that wait for a denoiser.")
        self._running = metrics.Gauge("pyramid_serve_videos_in_progress", description="Videos that are being made.")
        await self._in_thread(self._store.write_epoch, self._epoch)
        await self._scan()
        logger.info("claims: %d unfinished videos in %s", len(self._records), shown_root(storage))
        self._tasks = [asyncio.create_task(self._sweep_forever()), asyncio.create_task(self._expire_forever())]

    # --- for clients ------------------------------------------------------------------------------------------------

    @to_its_end
    async def submit(self, record: VideoRecord, picture: bytes | None = None, owner: str | None = None) -> VideoRecord:
        """Accept a video and return its record, which is another's where its idempotency key was used before.

        owner: who begins to work on it at once, instead of whom claims would give it to. Asking again with the same
        record is harmless. Raises ``QueueFullError``, and ``StorageError`` where the storage takes nothing: then there
        is no such video, and its key is free.
        """
        if owner is not None:
            lease_expires_at = time.time() + self._config.lease_s
            record = record.changed(owner=owner, attempts=1, lease_expires_at=lease_expires_at)
        if record.idempotency_key is None:
            return await self._accept(record, picture)
        async with self._keys:
            known = await self._in_thread(self._store.id_of_key, record.idempotency_key)
            if known is not None:
                try:
                    return await self.get(known)
                except VideoNotFoundError:
                    logger.info("the key's video is gone", extra={"video_id": known})
            with self._place_for(record.id):
                try:
                    await self._in_thread(self._store.bind_key, record.idempotency_key, record.id)
                    return await self._accept(record, picture)
                except OSError:
                    with suppress(OSError):  # a key of a video that is not there stands for nothing
                        await self._in_thread(self._store.release_key, record.idempotency_key, record.id)
                    raise

    async def get(self, video_id: str) -> VideoRecord:
        """The record as it is now. Raises ``VideoNotFoundError``."""
        record = self._records.get(video_id)
        return record if record is not None else await self._in_thread(self._store.read, video_id)

    async def look(self, video_id: str) -> tuple[VideoRecord, QueuePlace] | None:
        """An unfinished video's record and place at once; None for any other."""
        record = self._records.get(video_id)
        return None if record is None else (record, await self.place(video_id))

    async def place(self, video_id: str) -> QueuePlace:
        """Where an unfinished video stands."""
        record = self._records.get(video_id)
        if record is None:
            return QueuePlace(None, None)
        if record.status is Status.IN_PROGRESS:
            return QueuePlace(None, self._seconds_left(record))
        ahead = [other for other in self._waiting() if other.id < video_id]
        return QueuePlace(len(ahead), self._seconds_until_done(video_id))

    async def queue(self) -> QueueState:
        """Raises ``SupersededError``, for who asks wants to know whether videos are made."""
        await self.check_health()
        num_queued = len(self._waiting())
        return QueueState(num_queued, len(self._records) - num_queued)

    async def watch(self, video_id: str, after_revision: int, timeout_s: float) -> VideoRecord | None:
        """The record once its revision is beyond this one, which may be at once; None if that takes too long.

        Raises ``VideoNotFoundError``, also when it is deleted meanwhile.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            # Before the look at the record: a change that comes in between must not be missed.
            change = self._changes[video_id] if video_id in self._records else asyncio.Event()
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

    @to_its_end
    async def cancel(self, video_id: str) -> VideoRecord:
        """End a video now, wherever it is worked on; one that is over stays as it is. Raises ``VideoNotFoundError``."""
        async with self._lock(video_id):
            record = await self.get(video_id)
            if record.is_over:
                return record
            error = VideoError(code="cancelled", message="the video was cancelled")
            record = await self._end(record, status=Status.FAILED, error=error, outcome="cancelled")
        await self._stop(video_id)
        return record

    @to_its_end
    async def delete(self, video_id: str) -> None:
        """Remove a video; one that is unfinished ends by that. Raises ``VideoNotFoundError``."""
        async with self._lock(video_id):
            record = await self.get(video_id)
            if not record.is_over:
                await self._check_epoch()
            await self._in_thread(self._store.delete, video_id)
            self._drop(video_id)
        if not record.is_over:
            self._outcomes.inc(tags={"outcome": "cancelled"})
            self._kicked.set()
            logger.info("deleted while unfinished", extra={"video_id": video_id})
            await self._stop(video_id)

    async def check_health(self) -> None:
        """Serve replaces this replica when another took over and may be gone by now; the one that lasts wins."""
        if self._is_superseded:
            raise SupersededError("another replica of the claims deployment has taken over")

    # --- for orchestrators ------------------------------------------------------------------------------------------

    @to_its_end
    async def claim(self, video_id: str, owner: str) -> VideoRecord | None:
        """The record, with ``attempts`` as the number to name in every update; None where it is not to be had."""
        async with self._lock(video_id):
            await self._check_epoch()
            record = self._records.get(video_id)
            if record is None or (record.owner is not None and self._is_leased(video_id)):
                return None
            return await self._change_and_renew(record, attempts=record.attempts + 1, owner=owner)

    @to_its_end
    async def update(self, video_id: str, attempt: int, update: RunUpdate) -> bool:
        """Renew the lease and note what was done. False: the video is no longer the caller's, who is to stop."""
        async with self._lock(video_id):
            record = self._owned(video_id, attempt)
            if record is None:
                return False
            self._renew(video_id)
            self._count_steps(max(update.num_steps_done - record.num_steps_done, 0))
            fields = _merge(record, update)
            if not fields:
                return True
            is_unit = any(name in fields for name in ("num_units_done", "num_units_denoised"))
            if is_unit:
                fields |= {"num_failures": 0, "num_losses": 0}
            is_old = time.monotonic() - self._saved_at.get(video_id, 0) > _PERSIST_PROGRESS_S
            await self._change_and_renew(record, save=is_unit or "status" in fields or is_old, **fields)
            return True

    @to_its_end
    async def complete(self, video_id: str, attempt: int, update: RunUpdate) -> bool:
        """Every file of the video is there. False: it is no longer the caller's."""
        async with self._lock(video_id):
            record = self._owned(video_id, attempt)
            if record is None:
                return False
            fields = _merge(record, update) | {"num_steps_done": record.spec.num_steps, "status": Status.COMPLETED}
            await self._end(record, outcome="completed", **fields)
            return True

    @to_its_end
    async def fail(self, video_id: str, attempt: int, error: VideoError, *, is_final: bool) -> bool:
        """An attempt ended badly: the video is tried again, unless that is no use or was done often enough."""
        async with self._lock(video_id):
            record = self._owned(video_id, attempt)
            if record is None:
                return False
            await self._fail(record, error, is_final=is_final)
            return True

    @to_its_end
    async def release(self, video_id: str, attempt: int) -> bool:
        """Give a video back, for another to go on with at once; this does not count as a failure."""
        async with self._lock(video_id):
            record = self._owned(video_id, attempt)
            if record is None:
                return False
            await self._free(record)
            return True

    # --- records ----------------------------------------------------------------------------------------------------

    def _adopt(self, record: VideoRecord) -> None:
        """Begin to look after an unfinished record. An owner named in it gets one lease to be heard of."""
        self._records[record.id] = record
        if record.owner is not None:
            self._renew(record.id)

    async def _scan(self) -> None:
        """Adopt the unfinished records of the storage, also those that a predecessor accepted in its last moment."""
        known = set(self._records)
        for record in await self._in_thread(self._store.unfinished, but=known):
            async with self._lock(record.id):
                # Read again, for it may have been accepted, ended or deleted here in between.
                is_settled = record.id in self._records or not await self._in_thread(self._store.exists, record.id)
                if not is_settled and not (await self.get(record.id)).is_over:
                    self._adopt(record)
        self._scanned_at = time.monotonic()

    async def _accept(self, record: VideoRecord, picture: bytes | None) -> VideoRecord:
        async with self._lock(record.id):
            if record.id in self._records:
                return self._records[record.id]
            with self._place_for(record.id):
                await self._check_epoch()
                try:
                    await self._in_thread(self._store.create, record, picture=picture)
                except VideoExistsError:
                    return await self.get(record.id)
                self._adopt(record)
        self._kicked.set()
        logger.info("accepted", extra={"video_id": record.id})
        return record

    async def _change(self, record: VideoRecord, *, save: bool = True, **fields: Any) -> VideoRecord:
        """Set fields of a record, on disk too where ``save``, and tell those who wait for it."""
        record = record.changed(**fields)
        if save:
            try:
                await self._in_thread(self._store.update, record)
            except VideoNotFoundError:
                self._drop(record.id)  # someone removed its folder
                raise
            self._saved_at[record.id] = time.monotonic()
        self._records[record.id] = record
        self._tell(record.id)
        return record

    async def _change_and_renew(self, record: VideoRecord, *, save: bool = True, **fields: Any) -> VideoRecord:
        """``_change`` by the owner, who has a whole lease after it: the time of a slow write is not its silence."""
        changed = await self._change(record, save=save, lease_expires_at=self._renew(record.id), **fields)
        self._renew(record.id)
        return changed

    async def _end(self, record: VideoRecord, *, outcome: str, **fields: Any) -> VideoRecord:
        now = time.time()
        await self._check_epoch()
        record = await self._change(
            record,
            owner=None,
            lease_expires_at=None,
            completed_at=now,
            expires_at=now + self._config.retention_s,
            **fields,
        )
        self._drop(record.id)
        self._outcomes.inc(tags={"outcome": outcome})
        self._kicked.set()
        logger.info(outcome, extra={"video_id": record.id})
        return record

    def _drop(self, video_id: str) -> None:
        """Look after a video no more."""
        for of_video in (self._records, self._leases, self._saved_at):
            of_video.pop(video_id, None)
        self._tell(video_id)

    async def _fail(self, record: VideoRecord, error: VideoError, *, is_final: bool) -> None:
        num_failures = record.num_failures + 1
        if is_final:
            await self._end(record, outcome=error.code, status=Status.FAILED, error=error)
        elif num_failures >= self._config.max_attempts:
            await self._give_up(record, f"{num_failures} attempts failed, the last with {error.message}")
        else:
            logger.warning("attempt failed: %s", error.message, extra={"video_id": record.id})
            delay_s = min(self._config.backoff_s * 2 ** (num_failures - 1), _MAX_BACKOFF_S)
            await self._free(record, num_failures=num_failures, not_before=time.time() + delay_s)

    async def _give_up(self, record: VideoRecord, message: str) -> None:
        error = VideoError(code="too_many_attempts", message=message)
        await self._end(record, outcome=error.code, status=Status.FAILED, error=error)

    async def _free(self, record: VideoRecord, **fields: Any) -> None:
        """Let another take the video up."""
        await self._change(record, owner=None, lease_expires_at=None, **fields)
        self._kicked.set()

    def _owned(self, video_id: str, attempt: int) -> VideoRecord | None:
        record = self._records.get(video_id)
        return record if record is not None and record.owner is not None and record.attempts == attempt else None

    def _renew(self, video_id: str) -> float:
        self._leases[video_id] = time.monotonic() + self._config.lease_s
        return time.time() + self._config.lease_s

    def _is_leased(self, video_id: str) -> bool:
        return self._leases.get(video_id, 0) > time.monotonic()

    def _tell(self, video_id: str) -> None:
        change = self._changes.pop(video_id, None)
        if change is not None:
            change.set()

    @asynccontextmanager
    async def _lock(self, video_id: str) -> AsyncIterator[None]:
        lock = self._locks[video_id]
        try:
            async with lock:
                yield
        finally:
            if video_id not in self._records and not lock.locked():
                self._locks.pop(video_id, None)

    async def _check_epoch(self) -> None:
        """Nothing is granted or ended by a replica that has a successor, as in a redeploy."""
        if await self._in_thread(self._store.read_epoch) != self._epoch:
            self._is_superseded = True
            raise SupersededError("another replica of the claims deployment has taken over")

    @staticmethod
    async def _in_thread(function: Callable[P, Result], *arguments: P.args, **keywords: P.kwargs) -> Result:
        return await asyncio.to_thread(function, *arguments, **keywords)

    # --- handing out ------------------------------------------------------------------------------------------------

    @contextmanager
    def _place_for(self, video_id: str) -> Iterator[None]:
        """A place in the queue while a video is being accepted. Raises ``QueueFullError``."""
        if len(self._waiting()) + len(self._accepting - {video_id}) >= self._config.max_queued:
            raise QueueFullError(self._config.max_queued, self._seconds_to_next())
        self._accepting.add(video_id)
        try:
            yield
        finally:
            self._accepting.discard(video_id)

    def _waiting(self) -> list[VideoRecord]:
        return [record for record in self._records.values() if record.status is Status.QUEUED]

    async def _sweep_forever(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._config.sweep_interval_s):
                    await self._kicked.wait()
            except TimeoutError:
                pass  # time for a look without being asked
            self._kicked.clear()
            try:
                await self._sweep()
            except SupersededError:
                logger.warning("claims: superseded, no more videos are handed out")
                return
            except Exception:  # of any storage, or of one video: the others must not wait for ever
                logger.exception("claims: a sweep failed, trying again")

    async def _sweep(self) -> None:
        await self._check_epoch()
        if time.monotonic() - self._scanned_at > self._config.rescan_interval_s:
            await self._scan()
        for record in [record for record in self._records.values() if record.owner is not None]:
            lock = self._locks.get(record.id)
            is_in_work = lock is not None and lock.locked()  # its owner is being heard of, perhaps
            if not is_in_work and not self._is_leased(record.id):
                try:
                    await self._lose_if_silent(record)
                except VideoNotFoundError:
                    pass  # deleted meanwhile
                except OSError as error:  # the next sweep tries again, and the other videos need not wait for it
                    logger.warning("not taken from its owner: %s", error, extra={"video_id": record.id})
        self._hand_out()
        num_queued = len(self._waiting())
        self._queued.set(num_queued)
        self._running.set(len(self._records) - num_queued)

    async def _lose_if_silent(self, record: VideoRecord) -> None:
        """As ``_lose``, unless the owner was heard of while this waited for the record."""
        async with self._lock(record.id):
            if not self._is_leased(record.id):
                await self._lose_held(record.id, record.attempts, f"its owner {record.owner} was not heard of")

    async def _lose(self, video_id: str, attempt: int, reason: str) -> None:
        """The owner is gone: the next may try."""
        async with self._lock(video_id):
            await self._lose_held(video_id, attempt, reason)

    async def _lose_held(self, video_id: str, attempt: int, reason: str) -> None:
        """Takes the record's lock held."""
        record = self._owned(video_id, attempt)
        if record is None:
            return
        logger.warning("owner lost: %s", reason, extra={"video_id": video_id})
        run = self._runs.get(video_id)
        if run is not None and run is not asyncio.current_task():
            del self._runs[video_id]  # it may hang as long as it likes
            run.cancel()
        num_losses = record.num_losses + 1
        if num_losses >= self._config.max_losses:
            await self._give_up(record, f"{num_losses} orchestrators were lost, the last: {reason}")
        else:
            await self._free(record, num_losses=num_losses)

    def _hand_out(self) -> None:
        now = time.time()
        num_free = self._config.max_running - sum(
            record.owner is not None or record.id in self._runs for record in self._records.values()
        )
        ready = sorted(
            record.id
            for record in self._records.values()
            if record.owner is None and record.id not in self._runs and record.not_before <= now
        )
        for video_id in ready[: max(num_free, 0)]:
            self._runs[video_id] = asyncio.create_task(self._follow(video_id))

    async def _follow(self, video_id: str) -> None:
        """Give a video to an orchestrator, and learn at once when that dies."""
        try:
            await self._orchestrators.run(video_id)
        except RayActorError as error:
            record = self._records.get(video_id)
            if record is not None and record.owner is not None:
                await self._lose(video_id, record.attempts, f"{record.owner}: {type(error).__name__}")
        except Exception:
            logger.exception("run failed", extra={"video_id": video_id})
            await asyncio.sleep(self._config.sweep_interval_s)
        finally:
            if self._runs.get(video_id) is asyncio.current_task():
                del self._runs[video_id]
            self._kicked.set()

    async def _stop(self, video_id: str) -> None:
        # An owner that cannot be reached learns it from the answer to its next update.
        try:
            await self._orchestrators.stop(video_id)
        except (RayActorError, TimeoutError):
            logger.warning("could not tell the orchestrators to stop", extra={"video_id": video_id}, exc_info=True)

    async def _expire_forever(self) -> None:
        while True:
            await asyncio.sleep(min(_EXPIRY_SWEEP_S, self._config.retention_s))
            try:
                for video_id in await self._in_thread(self._store.sweep, retention_s=self._config.retention_s):
                    logger.info("expired", extra={"video_id": video_id})
            except Exception:
                logger.exception("claims: sweeping away what has expired failed, trying again")

    # --- how long it takes ------------------------------------------------------------------------------------------

    def _count_steps(self, num_steps: int) -> None:
        self._steps.append((time.monotonic(), num_steps))
        self._forget_old_steps()

    def _forget_old_steps(self) -> None:
        while self._steps and self._steps[0][0] < time.monotonic() - _RATE_WINDOW_S:
            self._steps.popleft()

    def _steps_per_second(self) -> float | None:
        """Of all videos together, lately."""
        self._forget_old_steps()
        now = time.monotonic()
        if len(self._steps) < 2 or now <= self._steps[0][0]:
            return None
        return sum(num_steps for _, num_steps in self._steps) / (now - self._steps[0][0]) or None

    def _seconds_left(self, record: VideoRecord) -> float | None:
        """Of a video in progress, by its own speed; half of the way is denoising, the other half all the rest."""
        if record.started_at is None or not record.num_steps_done:
            return self._seconds_until_done(record.id)
        denoised = record.num_steps_done / record.spec.num_steps
        done = (denoised + record.num_units_done / record.spec.num_latent_frames) / 2
        return (time.time() - record.started_at) * (1 - done) / done

    def _seconds_until_done(self, video_id: str) -> float | None:
        """By the speed of all, with everything older first."""
        rate = self._steps_per_second()
        if rate is None:
            return None
        return sum(_num_steps_left(record) for record in self._records.values() if record.id <= video_id) / rate

    def _seconds_to_next(self) -> int:
        rate = self._steps_per_second()
        waiting = self._waiting()
        if rate is None or not waiting:
            return 5
        return min(max(round(_num_steps_left(waiting[0]) / rate), 1), 120)


def _num_steps_left(record: VideoRecord) -> int:
    return record.spec.num_steps - record.num_steps_done


def _merge(record: VideoRecord, update: RunUpdate) -> dict[str, Any]:
    """The fields that an update changes. Counts never fall: what is made again was made before."""
    fields: dict[str, Any] = {}
    for name in ("num_steps_done", "num_units_denoised", "num_units_done", "num_units_retried"):
        if getattr(update, name) > getattr(record, name):
            fields[name] = getattr(update, name)
    if update.has_started and record.status is Status.QUEUED:
        fields["status"] = Status.IN_PROGRESS
        fields["started_at"] = time.time()
    if fields.get("num_units_done") and record.first_frame_at is None:
        fields["first_frame_at"] = time.time()
    for name in ("prompt_truncated_at", "negative_prompt_truncated_at"):
        if getattr(update, name) not in (None, getattr(record, name)):
            fields[name] = getattr(update, name)
    if set(update.computed) - set(record.computed):
        by_part = {computed.part: computed for computed in (*record.computed, *update.computed)}
        fields["computed"] = tuple(by_part.values())
    # An update that was sent again because its answer was lost brings nothing new.
    news = tuple(entry for entry in update.timeline if entry not in record.timeline)
    if news:
        fields["timeline"] = record.timeline + news
    return fields
