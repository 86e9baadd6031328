"""A client for Python programs in the cluster; it keeps working when replicas that answer it are replaced.

::

    client = Client.connect("pyramid-serve")
    record = await client.generate(VideoRequest(prompt="a red ball"))
    async for frames in client.stream(VideoRequest(prompt="a red ball")):
        ...  # (F, H, W, 3) uint8

All but ``stream`` and ``frames`` are also methods of the handle itself (``serve.get_deployment_handle("Orchestrator",
app)``). The handle raises ``RayActorError`` where the client asks again.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from functools import partial
from itertools import islice
from typing import Any
from uuid import uuid4

import numpy
from numpy.typing import NDArray
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle

from deployments.errors import VideoFailedError
from deployments.rpc.calls import call
from deployments.rpc.retry import RETRIED, retried
from deployments.rpc.tasks import begin_apart
from deployments.videos.view import VideoView
from pyramid_serve.api import RequestError, VideoRecord, VideoRequest
from pyramid_serve.errors import VideoNotFoundError

logger = logging.getLogger(__name__)

Frames = NDArray[numpy.uint8]

_LEAVE_S = 5.0


class Client:
    """Asks the orchestrators of one app for videos."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        """``handle``: the handle of the deployment ``Orchestrator``."""
        self._handle = handle

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

    async def map(
        self, requests: Iterable[VideoRequest], *, num_in_flight: int = 8
    ) -> "AsyncGenerator[tuple[int, VideoRecord | RequestError], None]":
        """Make many videos, and yield each request's place and its record when its video is over, as they end.

        A request that is refused has the ``RequestError`` in place of its record. At most ``num_in_flight`` are asked
        for at once, and the next request is read when one is over, so there may be any number. The videos in flight are
        cancelled when the caller leaves. Raises ``ValueError`` for no videos in flight, and what ``generate`` raises.
        """
        if num_in_flight < 1:
            raise ValueError(f"num_in_flight={num_in_flight}: must be at least 1")
        waiting: dict[asyncio.Task[VideoRecord | RequestError], int] = {}
        numbered = enumerate(requests)
        try:
            while True:
                for place, request in islice(numbered, num_in_flight - len(waiting)):
                    waiting[asyncio.create_task(self._generate_or_refuse(request))] = place
                if not waiting:
                    return
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield waiting.pop(task), task.result()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _generate_or_refuse(self, request: VideoRequest) -> VideoRecord | RequestError:
        try:
            return await self.generate(request)
        except RequestError as error:
            return error

    async def stream(self, request: VideoRequest) -> AsyncGenerator[Frames, None]:
        """Make a video, and yield the frames (F, H, W, 3) of each unit, uint8, as ``frames`` does.

        The video is cancelled when the caller leaves before its end, as in ``generate``. Raises ``VideoFailedError``.
        """
        submitting = begin_apart(self.submit(request))
        try:
            async with aclosing(self.frames((await asyncio.shield(submitting)).id)) as units:
                async for frames in units:
                    yield frames
        except (asyncio.CancelledError, GeneratorExit):
            await self._leave(submitting)
            raise

    async def frames(self, video_id: str, first_unit: int = 0) -> AsyncGenerator[Frames, None]:
        """The frames (F, H, W, 3) of each unit from ``first_unit`` on, uint8, before any encoding.

        For any video, at any time. Each unit is decoded when it is asked for, from its saved latents and for this
        caller alone, so a slow caller holds up nothing and fills no memory. One who leaves stops nothing. Raises
        ``VideoFailedError`` and ``VideoNotFoundError``, and ``RequestError`` for a video of a model that is not served
        any more.
        """
        viewer = uuid4().hex
        num_units = (await self.get(video_id)).record.plan.num_units
        try:
            for unit in range(first_unit, num_units):
                asked = partial(self._handle.frames_of.remote, video_id, unit, viewer)
                yield await _ask(asked)
        except (asyncio.CancelledError, GeneratorExit, VideoFailedError):  # for the same reason as in ``_leave``
            await asyncio.wait([begin_apart(self._stop_viewing(video_id, viewer))], timeout=_LEAVE_S)
            raise
        record = await self.wait(video_id)
        if record.error is not None:
            raise VideoFailedError(video_id, record.error)

    async def _stop_viewing(self, video_id: str, viewer: str) -> None:
        try:
            await self._handle.leave.remote(video_id, viewer)
        except (RayTaskError, *RETRIED) as error:
            logger.info("the decoders were not told: %s", error, extra={"video_id": video_id})

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
