"""A client for Python programs in the cluster, which outlives the replicas that answer it.

::

    client = Client.connect("pyramid-serve")
    record = await client.generate(VideoRequest(prompt="a red ball"))
    async for frames in client.stream(VideoRequest(prompt="a red ball")):
        ...  # (1 or 8, H, W, 3) uint8

Everything here is also a method of the handle itself (``serve.get_deployment_handle("Orchestrator", app)``), which
raises ``RayActorError`` where this asks again.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any
from uuid import uuid4

import numpy
from numpy.typing import NDArray
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.rpc.calls import call
from deployments.rpc.retry import RETRIED, retried, retries
from deployments.rpc.tasks import begin_apart
from deployments.videos.videos import VideoView
from pyramid_serve.api import VideoRecord, VideoRequest
from pyramid_serve.storage import VideoNotFoundError

logger = logging.getLogger(__name__)

Frames = NDArray[numpy.uint8]

_LEAVE_S = 5.0


class Client:
    """Asks the orchestrators of one app."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        """``handle``: of the deployment ``Orchestrator``."""
        self._handle = handle
        self._streams = handle.options(stream=True)

    @classmethod
    def connect(cls, app: str) -> "Client":
        """A client of an app that runs in the cluster this process is connected to."""
        return cls(serve.get_deployment_handle("Orchestrator", app))

    async def generate(self, request: VideoRequest) -> VideoRecord:
        """The record of a video when it is over; failed ones too. Cancelled when this is.

        One that is being accepted just then is cancelled once it is, for which this waits five seconds at most.
        """
        submitting = begin_apart(self.submit(request))
        try:
            return await self.wait((await asyncio.shield(submitting)).id)
        except asyncio.CancelledError:
            await self._leave(submitting)
            raise

    async def stream(self, request: VideoRequest) -> AsyncGenerator[Frames, None]:
        """The frames (1 or 8, H, W, 3) of each unit as it is decoded. Raises ``VideoFailedError``.

        The video is cancelled when this is left before its end, as in ``generate``.
        """
        key, num_units = uuid4().hex, 0
        submitting: asyncio.Task[VideoRecord] | None = None

        def submit_aside(error: BaseException) -> None:
            # Before the pause: a caller who leaves in it has a video to cancel, which only the lost replica knew.
            nonlocal submitting
            _tell(error)
            submitting = submitting or begin_apart(self.submit(request, idempotency_key=key))

        try:
            async for attempt in retries(on_retry=submit_aside):
                if submitting is None:
                    stream: Any = self._streams.stream.remote(request, key)
                else:
                    stream = self._streams.frames.remote((await asyncio.shield(submitting)).id, num_units)
                with attempt:
                    try:
                        async for frames in stream:
                            yield frames
                            num_units += 1
                    finally:
                        stream.cancel()
        except (asyncio.CancelledError, GeneratorExit):
            if submitting is not None:
                await self._leave(submitting)
            raise

    async def _leave(self, submitting: asyncio.Task[VideoRecord]) -> None:
        # Waited for, since the caller's loop may be about to close; not for long, since the cluster may be gone.
        await asyncio.wait([begin_apart(self._give_up(submitting))], timeout=_LEAVE_S)

    async def _give_up(self, submitting: asyncio.Task[VideoRecord]) -> None:
        """Cancel a video whose caller has left, which may not be accepted yet."""
        await asyncio.wait([submitting])
        if submitting.cancelled() or submitting.exception() is not None:
            return
        try:
            await self.cancel(submitting.result().id)
        except (VideoNotFoundError, *RETRIED) as error:
            logger.warning("not cancelled: %s", error, extra={"video_id": submitting.result().id})

    async def submit(self, request: VideoRequest, *, idempotency_key: str | None = None) -> VideoRecord:
        key = idempotency_key or uuid4().hex
        record: VideoRecord = await _ask(lambda: self._handle.submit.remote(request, key))
        return record

    async def get(self, video_id: str) -> VideoView:
        view: VideoView = await _ask(lambda: self._handle.get.remote(video_id))
        return view

    async def list(
        self, *, limit: int = 20, after: str | None = None, newest_first: bool = True
    ) -> "tuple[list[VideoView], bool]":
        page: tuple[list[VideoView], bool] = await _ask(lambda: self._handle.list.remote(limit, after, newest_first))
        return page

    async def wait(self, video_id: str) -> VideoRecord:
        """The record of a video when it is over."""
        record: VideoRecord = await _ask(lambda: self._handle.wait.remote(video_id))
        return record

    async def cancel(self, video_id: str) -> VideoRecord:
        record: VideoRecord = await _ask(lambda: self._handle.cancel.remote(video_id))
        return record

    async def delete(self, video_id: str) -> None:
        await _ask(lambda: self._handle.delete.remote(video_id))


async def _ask(ask: Callable[[], Any]) -> Any:
    return await retried(lambda: call(ask()), on_retry=_tell)


def _tell(error: BaseException) -> None:
    logger.info("the app did not answer: %s, trying again", type(error).__name__)
