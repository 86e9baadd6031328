"""A client for Python programs in the cluster; it keeps working when replicas that answer it are replaced.

::

    client = Client.connect("pyramid-serve")
    record = await client.generate(VideoRequest(prompt="a red ball"))
    async for frames in client.stream(VideoRequest(prompt="a red ball")):
        ...  # (F, H, W, 3) uint8

Everything here is also a method of the handle itself (``serve.get_deployment_handle("Orchestrator", app)``). The handle
raises ``RayActorError`` where the client asks again.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any
from uuid import uuid4

import numpy
from numpy.typing import NDArray
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle

from deployments.rpc.calls import call
from deployments.rpc.retry import RETRIED, retried, retries
from deployments.rpc.tasks import begin_apart
from deployments.videos.view import VideoView
from pyramid_serve.api import VideoRecord, VideoRequest
from pyramid_serve.errors import VideoNotFoundError

logger = logging.getLogger(__name__)

Frames = NDArray[numpy.uint8]

_LEAVE_S = 5.0


class Client:
    """Asks the orchestrators of one app for videos."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        """``handle``: the handle of the deployment ``Orchestrator``."""
        self._handle = handle
        self._streams = handle.options(stream=True)

    @classmethod
    def connect(cls, app: str) -> "Client":
        """A client of an app in the cluster that this process is connected to."""
        return cls(serve.get_deployment_handle("Orchestrator", app))

    async def generate(self, request: VideoRequest) -> VideoRecord:
        """Make a video, and return its record when it is over, even if it failed.

        The video is cancelled when this call is. If it is just being accepted then, this waits up to five seconds for
        that, and cancels it after.
        """
        submitting = begin_apart(self.submit(request))
        try:
            return await self.wait((await asyncio.shield(submitting)).id)
        except asyncio.CancelledError:
            await self._leave(submitting)
            raise

    async def stream(self, request: VideoRequest) -> AsyncGenerator[Frames, None]:
        """Make a video, and yield the frames (F, H, W, 3) of each unit as it is decoded.

        The video is cancelled when the caller leaves before its end, as in ``generate``. Raises ``VideoFailedError``.
        """
        key, num_units = uuid4().hex, 0
        submitting: asyncio.Task[VideoRecord] | None = None

        def submit_aside(error: BaseException) -> None:
            # Before the pause: a caller who leaves in it must cancel the video, whose id only the lost replica knew.
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
        # Waits, because the caller's event loop may be about to close; not for long, because the cluster may be gone.
        await asyncio.wait([begin_apart(self._give_up(submitting))], timeout=_LEAVE_S)

    async def _give_up(self, submitting: asyncio.Task[VideoRecord]) -> None:
        """Cancel a video whose caller has left, once it is accepted."""
        await asyncio.wait([submitting])
        if submitting.cancelled() or submitting.exception() is not None:
            return
        try:
            await self.cancel(submitting.result().id)
        except (VideoNotFoundError, RayTaskError, *RETRIED) as error:
            logger.warning("not cancelled: %s", error, extra={"video_id": submitting.result().id})

    async def submit(self, request: VideoRequest, *, idempotency_key: str | None = None) -> VideoRecord:
        """The record of a video as soon as it is accepted. Raises ``RequestError`` and ``QueueFullError``."""
        key = idempotency_key or uuid4().hex
        record: VideoRecord = await _ask(lambda: self._handle.submit.remote(request, key))
        return record

    async def get(self, video_id: str) -> VideoView:
        """A video as it is now. Raises ``VideoNotFoundError``."""
        view: VideoView = await _ask(lambda: self._handle.get.remote(video_id))
        return view

    async def list(
        self, *, limit: int = 20, after: str | None = None, newest_first: bool = True
    ) -> "tuple[list[VideoView], bool]":
        """At most ``limit`` videos following ``after`` in the order of creation, and whether there are more."""
        page: tuple[list[VideoView], bool] = await _ask(lambda: self._handle.list.remote(limit, after, newest_first))
        return page

    async def wait(self, video_id: str) -> VideoRecord:
        """The record of a video when it is over. Raises ``VideoNotFoundError``."""
        record: VideoRecord = await _ask(lambda: self._handle.wait.remote(video_id))
        return record

    async def cancel(self, video_id: str) -> VideoRecord:
        """End a video now; one that is over stays as it is. Raises ``VideoNotFoundError``."""
        record: VideoRecord = await _ask(lambda: self._handle.cancel.remote(video_id))
        return record

    async def delete(self, video_id: str) -> None:
        """Cancel a video if it is unfinished, and remove it. Raises ``VideoNotFoundError``."""
        await _ask(lambda: self._handle.delete.remote(video_id))


async def _ask(ask: Callable[[], Any]) -> Any:
    return await retried(lambda: call(ask()), on_retry=_tell)


def _tell(error: BaseException) -> None:
    logger.info("the app did not answer: %s, trying again", type(error).__name__)
