"""The Orchestrator deployment: one call for each video that is being made, and the front of the app for Python users.

It keeps nothing that is not in the storage: when a replica dies, claims gives its videos to another, which goes on from
the last unit that was saved.
"""

import asyncio
import builtins
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing, suppress
from functools import partial
from typing import Any
from uuid import uuid4

import numpy
from numpy.typing import NDArray
from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle

from deployments.claims.asking import ask_claims
from deployments.claims.messages import QueueState
from deployments.errors import VideoFailedError
from deployments.orchestrator.attempt import Pools, RunConfig, VideoRun
from deployments.orchestrator.lease import Lease, LeaseLostError
from deployments.orchestrator.video_decoder import VideoDecoder, forget
from deployments.pools.wire import Latents
from deployments.rpc.tasks import apart, begin_apart
from deployments.telemetry.logs import configure_logging
from deployments.telemetry.replicas import replica_name
from deployments.telemetry.storage import StorageMetrics
from deployments.telemetry.videos import VideoMetrics
from deployments.videos.videos import Videos
from deployments.videos.view import VideoView
from pyramid_serve.api import MODEL_NOT_FOUND, Plan, VideoError, VideoRecord, VideoRequest, unknown_model
from pyramid_serve.errors import InputError, NonFiniteError
from pyramid_serve.reasons import first_line
from pyramid_serve.served_model import ServedModels
from pyramid_serve.storage import StorageError, VideoNotFoundError, VideoStore

logger = logging.getLogger(__name__)

Frames = NDArray[numpy.uint8]

_SERVER_ERROR = "server_error"
_STORAGE_PATIENCE_S = 45.0
"""For how long an attempt waits for an object store that fails; with the last try it is a minute at most."""
_STORAGE_PAUSE_S = 5.0


class Orchestrator:
    """Runs videos, and answers Ray handles. See :class:`videos.Videos` for what the methods of the same name do."""

    def __init__(
        self,
        storage: str,
        config: RunConfig,
        models: ServedModels,
        *,
        claims: DeploymentHandle[Any],
        text_encoders: Mapping[str, DeploymentHandle[Any]],
        denoisers: Mapping[str, DeploymentHandle[Any]],
        decoders: Mapping[str, DeploymentHandle[Any]],
    ) -> None:
        """``text_encoders``, ``denoisers``, ``decoders``: the pools of each model, by its public name."""
        self._replica = replica_name()
        configure_logging(self._replica)
        self._store = VideoStore(storage, patience_s=_STORAGE_PATIENCE_S)
        self._config = config
        self._claims = claims
        self._pools = {name: Pools(text_encoders[name], denoisers[name], decoders[name]) for name in models.names}
        self._videos = Videos(self._store, claims, models)
        self._families = {model.name: model.family.name for model in models.models}
        self._metrics = VideoMetrics(models)
        self._storage_metrics = StorageMetrics()
        self._attempts: dict[tuple[str, int], asyncio.Task[None]] = {}

    # --- making videos ----------------------------------------------------------------------------------------------

    async def run(self, video_id: str) -> None:
        """Make a video, if claims grants it: the call that claims makes for each one. Tells claims how it ended.

        When the caller cancels, the video is given back.
        """
        token = uuid4().hex
        record = await ask_claims(lambda: self._claims.claim.remote(video_id, self._replica, token))
        if record is not None:
            await self._make(record)

    async def stop(self, video_id: str) -> None:
        """Leave a video, if this replica works on it; every call for it is cancelled when this returns."""
        tasks = [task for (running_id, _), task in self._attempts.items() if running_id == video_id]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def running(self) -> "builtins.list[str]":
        """The videos that this replica works on."""
        return [video_id for video_id, _ in self._attempts]

    async def _make(self, record: VideoRecord) -> None:
        """Work on a video that claims granted, until that is done or fails."""
        # A task of its own: that is what ``stop`` cancels, while the call itself ends as it should.
        task = asyncio.create_task(self._attempt(record))
        key = record.id, record.attempts
        self._attempts[key] = task
        try:
            await asyncio.wait([task])
        finally:
            task.cancel()
            await asyncio.wait([task])
            del self._attempts[key]
            if not task.cancelled() and task.exception() is not None:
                # Claims was not told how it ended, and takes the video when the lease is over.
                logger.warning("the attempt is left", extra={"video_id": record.id}, exc_info=task.exception())

    def _serves(self, plan: Plan) -> bool:
        """Whether the model of a plan is served here, and is still of the same family."""
        return self._families.get(plan.model) == plan.family

    async def _attempt(self, record: VideoRecord) -> None:
        lease = Lease(record, self._claims, heartbeat_s=self._config.heartbeat_s)
        if not self._serves(record.plan):
            logger.error("its model is not served here: %s", record.plan.model, extra={"video_id": record.id})
            message = f"model {record.plan.model!r} is not served here any more"
            await lease.fail(VideoError(code=MODEL_NOT_FOUND, message=message), is_final=True)
            return
        run = VideoRun(
            record,
            pools=self._pools[record.plan.model],
            store=self._store,
            lease=lease,
            config=self._config,
            metrics=self._metrics,
            replica=self._replica,
        )
        started = time.time()
        logger.info("attempt %d", record.attempts, extra={"video_id": record.id})
        try:
            await _both(run.make(), lease.keep())
            await lease.complete()
        except asyncio.CancelledError:
            await apart(lease.release())
            raise
        except Exception as error:
            cause = _cause_of(error)
            is_gone = isinstance(cause, VideoNotFoundError) and await self._is_gone(record)
            if isinstance(cause, LeaseLostError) or is_gone:
                logger.info("left: %s", cause, extra={"video_id": record.id})
                return
            if isinstance(cause, StorageError):
                # No fault of the video. Where claims cannot write either, it takes the video when the lease is over.
                logger.warning("given back: %s", cause, extra={"video_id": record.id})
                self._storage_metrics.refused()
                with suppress(StorageError):
                    await lease.release(pause_s=_STORAGE_PAUSE_S)
                return
            logger.error("attempt failed", extra={"video_id": record.id}, exc_info=error)
            told = VideoError(code=_code_of(cause), message=_describe(cause))
            # What the user gave will be the same the next time, and so will numbers that overflow.
            await lease.fail(told, is_final=told.code != _SERVER_ERROR)
        else:
            now = time.time()
            self._metrics.video(
                record.plan,
                since_accepted_s=now - record.created_at,
                making_s=now - started,
                timeline=run.timeline,
            )
        finally:
            begin_apart(run.clean_up())  # nobody waits for it

    async def _is_gone(self, record: VideoRecord) -> bool:
        """Whether a video was deleted, where something of it was not found: one of its files may be missing, too."""
        try:
            return not await asyncio.to_thread(self._store.exists, record.id)
        except StorageError:
            return False

    # --- for Python users -------------------------------------------------------------------------------------------

    async def generate(self, request: VideoRequest, idempotency_key: str | None = None) -> VideoRecord:
        """Submit a video and return its record when it is over.

        It is cancelled when the caller goes away, unless another call with the same key asked for it before.
        """
        accepted = await self._videos.accept_while_wanted(request, idempotency_key=idempotency_key)
        try:
            return await self._videos.wait(accepted.record.id)
        except asyncio.CancelledError:
            if accepted.is_new:
                await apart(self._videos.cancel_unwanted(accepted.record.id))
            raise

    async def frames_of(self, video_id: str, unit: int, viewer: str) -> Frames:
        """The frames (F, H, W, 3) of one unit, uint8, before any encoding, as soon as its latents are saved.

        They are decoded for this viewer alone and only now, so a slow viewer holds up nothing and fills no memory.
        viewer: any name, by which the decoders keep what the viewer's next unit needs, until the video's last unit or
        ``leave``. Raises ``VideoFailedError`` if the video failed before the unit was made, ``VideoNotFoundError``, and
        ``RequestError`` for a video of a model that is not served any more.
        """
        record = await self._with_unit(video_id, unit)
        decoder = VideoDecoder(
            _key_of(video_id, viewer),
            self._pools[record.plan.model].decoder,
            submitted_at=time.time(),
            max_retries=self._config.max_call_retries,
            on_retry=self._metrics.retry,
        )
        result = await decoder.decode(
            unit,
            await asyncio.to_thread(self._store.files.load_unit_latents, video_id, unit),
            earlier=partial(self._latents_before, video_id, unit),
            is_last=unit == record.plan.num_units - 1,
        )
        return result.frames

    async def leave(self, video_id: str, viewer: str) -> None:
        """Free what the decoders keep for a viewer who asks for no more units."""
        try:
            record = await asyncio.to_thread(self._store.read, video_id)
        except VideoNotFoundError:
            return  # in time the decoders drop it by themselves
        if self._serves(record.plan):
            await forget(_key_of(video_id, viewer), self._pools[record.plan.model].decoder)

    async def _with_unit(self, video_id: str, unit: int) -> VideoRecord:
        """The record of a video once the latents of a unit are saved; raises as ``frames_of`` does."""
        async with aclosing(self._videos.events(video_id)) as views:
            async for view in views:
                record = view.record
                if not self._serves(record.plan):
                    raise unknown_model(record.plan.model, *self._pools)
                record.plan.unit(unit)
                if unit < record.num_units_denoised:
                    return record
        error = record.error or VideoError(code=_SERVER_ERROR, message="the video ended without the unit")
        raise VideoFailedError(video_id, error)

    async def _latents_before(self, video_id: str, unit: int) -> "builtins.list[Latents]":
        return (await asyncio.to_thread(self._store.files.load_latents, video_id))[:unit]

    async def submit(self, request: VideoRequest, idempotency_key: str | None = None) -> VideoRecord:
        return await self._videos.submit(request, idempotency_key=idempotency_key)

    async def get(self, video_id: str) -> VideoView:
        return await self._videos.get(video_id)

    async def list(
        self, limit: int = 20, after: str | None = None, newest_first: bool = True
    ) -> "tuple[builtins.list[VideoView], bool]":
        return await self._videos.list(limit=limit, after=after, newest_first=newest_first)

    async def cancel(self, video_id: str) -> VideoRecord:
        return await self._videos.cancel(video_id)

    async def delete(self, video_id: str) -> None:
        await self._videos.delete(video_id)

    async def wait(self, video_id: str) -> VideoRecord:
        return await self._videos.wait(video_id)

    async def queue(self) -> QueueState:
        return await self._videos.queue()

    async def events(self, video_id: str) -> AsyncGenerator[VideoView, None]:
        """Call with ``stream=True``."""
        async for view in self._videos.events(video_id):
            yield view

    async def fragments(self, video_id: str) -> AsyncGenerator[bytes, None]:
        """Call with ``stream=True``."""
        async for fragment in self._videos.fragments(video_id):
            yield fragment


def _key_of(video_id: str, viewer: str) -> str:
    """What the decoders keep the memory of a viewer under."""
    return f"{video_id}/{viewer}"


async def _both(work: Coroutine[Any, Any, None], guard: Coroutine[Any, Any, None]) -> None:
    """Do some work, and leave it when the guard raises. Both have ended when this returns or raises."""
    working, guarding = asyncio.create_task(work), asyncio.create_task(guard)
    try:
        await asyncio.wait([working, guarding], return_when=asyncio.FIRST_COMPLETED)
        await (working if working.done() else guarding)
    finally:
        working.cancel()
        guarding.cancel()
        await asyncio.gather(working, guarding, return_exceptions=True)


def _cause_of(error: Exception) -> Exception:
    """The first of the errors that a group of tasks ended with, as it was raised where it happened."""
    while isinstance(error, ExceptionGroup | RayTaskError):
        error = error.exceptions[0] if isinstance(error, ExceptionGroup) else error.cause
    return error


def _code_of(error: Exception) -> str:
    """The code of ``VideoError`` for an error that an attempt ended with."""
    if isinstance(error, NonFiniteError):
        return "non_finite"
    return "invalid_input" if isinstance(error, InputError) else _SERVER_ERROR


def _describe(error: Exception) -> str:
    """What the user is told. The text of any other error may name paths and hosts: it is in the log only."""
    if isinstance(error, InputError | NonFiniteError):
        return first_line(error)[:500]
    return f"an error of this server ({type(error).__name__}), which its log tells"
