"""Previews of finished videos, each made once for all requests that want it at the same time."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context

from deployments.http.errors import ApiError
from pyramid_serve.api import VideoRecord
from pyramid_serve.media.previews import sprite_sheet, thumbnail
from pyramid_serve.storage import VideoFile, VideoStore

logger = logging.getLogger(__name__)

_MAX_AT_ONCE = 2
_MAX_WANTED = 100
"""Further ones are refused, since requests that wait no longer leave their previews in the queue."""
_RETRY_AFTER_S = 5


class Previews:
    """Makes previews and saves them. All calls must come from one event loop.

    At most two are made at once, in threads of their own: each is a process of ffmpeg that decodes a whole video, and
    the threads that read the storage must stay free for other requests.
    """

    def __init__(self, store: VideoStore, *, timeout_s: float) -> None:
        """timeout_s: how long a request waits for its preview, which goes on being made."""
        self._store = store
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(_MAX_AT_ONCE, thread_name_prefix="preview")
        self._tasks: dict[tuple[str, VideoFile], asyncio.Task[bytes]] = {}

    async def get(self, record: VideoRecord, file: VideoFile) -> bytes:
        """A thumbnail or sprite sheet of a finished video.

        Raises ``ApiError`` 503 if it is not made in time or too many others are wanted, ``EncodeError``, and what
        reading the video raises.
        """
        key = (record.id, file)
        task = self._tasks.get(key)
        if task is None:
            if len(self._tasks) >= _MAX_WANTED:
                raise _not_yet(f"{record.id}: too many previews are being made; try again")
            # In its own context: otherwise Serve would cancel the task together with the request that started it.
            self._tasks[key] = task = asyncio.create_task(self._make(record, file), context=Context())
            task.add_done_callback(lambda done: self._end(key, done))
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.shield(task)  # other requests wait for the same task
        except TimeoutError:
            raise _not_yet(f"{record.id}: its preview is still being made; try again") from None

    async def _make(self, record: VideoRecord, file: VideoFile) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(self._threads, _make, self._store, record, file)

    def _end(self, key: tuple[str, VideoFile], task: asyncio.Task[bytes]) -> None:
        del self._tasks[key]
        if not task.cancelled() and task.exception() is not None:
            # Nobody may be waiting any more.
            logger.warning("%s cannot be made: %s", key[1], task.exception(), extra={"video_id": key[0]})


def _not_yet(message: str) -> ApiError:
    return ApiError(503, message, headers={"Retry-After": str(_RETRY_AFTER_S)})


def _make(store: VideoStore, record: VideoRecord, file: VideoFile) -> bytes:
    """Make a preview, and save it if the storage accepts it."""
    video = store.files.fetch(record.id, VideoFile.VIDEO)
    preview = thumbnail(video) if file is VideoFile.THUMBNAIL else sprite_sheet(video, record.plan.num_frames)
    try:
        store.files.attach(record.id, file, preview)
    except OSError as error:
        logger.warning("%s is not kept: %s", file, error, extra={"video_id": record.id})
    return preview
