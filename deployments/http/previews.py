"""Previews of finished videos and their other forms, each made once for all who want it at the same time."""

import asyncio
import logging
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from pathlib import Path

from deployments.http.errors import ApiError
from pyramid_serve.api import VideoRecord
from pyramid_serve.media.conversions import write_frame, write_frames, write_gif, write_webp
from pyramid_serve.media.previews import sprite_sheet, thumbnail
from pyramid_serve.storage import FrameFile, VideoFile, VideoStore

logger = logging.getLogger(__name__)

_MAX_AT_ONCE = 2
_MAX_WANTED = 100
"""Further ones are refused, since requests that wait no longer leave their previews in the queue."""
_MAX_FROM_MEMORY_BYTES = 16 * 1024**2
"""A larger file is only sent from the storage."""
_RETRY_AFTER_S = 5

File = VideoFile | FrameFile
_LONG = (VideoFile.GIF, VideoFile.WEBP, VideoFile.FRAMES)


class Previews:
    """Makes previews and saves them. All calls must come from one event loop.

    At most two are made at once, in threads of their own: each is a process of ffmpeg that decodes a whole video, and
    the threads that read the storage must stay free for other requests. A GIF, a WebP and the ZIP of all frames take
    minutes where a video is large, so they have a thread of their own and hold up no thumbnail.
    """

    def __init__(self, store: VideoStore, *, timeout_s: float) -> None:
        """timeout_s: how long a request waits for its preview, which goes on being made."""
        self._store = store
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(_MAX_AT_ONCE, thread_name_prefix="preview")
        self._long_threads = ThreadPoolExecutor(1, thread_name_prefix="conversion")
        self._tasks: dict[tuple[str, File], asyncio.Task[bytes | None]] = {}

    async def get(self, record: VideoRecord, file: File) -> bytes | None:
        """Make a file of a finished video: its content, or None for a large one, which is in the storage then.

        Raises ``ApiError`` 503 if it is not made in time or too many others are wanted, ``EncodeError``, and what
        reading the video raises; for a large file also what writing it raises.
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

    async def _make(self, record: VideoRecord, file: File) -> bytes | None:
        threads = self._long_threads if file in _LONG else self._threads
        return await asyncio.get_running_loop().run_in_executor(threads, _make, self._store, record, file)

    def _end(self, key: tuple[str, File], task: asyncio.Task[bytes | None]) -> None:
        del self._tasks[key]
        if not task.cancelled() and task.exception() is not None:
            # Nobody may be waiting any more.
            logger.warning("%s cannot be made: %s", key[1], task.exception(), extra={"video_id": key[0]})


def _not_yet(message: str) -> ApiError:
    return ApiError(503, message, headers={"Retry-After": str(_RETRY_AFTER_S)})


def _make(store: VideoStore, record: VideoRecord, file: File) -> bytes | None:
    """Make a file, and save it if the storage accepts it; its content if it fits in memory."""
    video = store.files.fetch(record.id, VideoFile.VIDEO)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        _write(video, record, file, path)
        content = path.read_bytes() if path.stat().st_size <= _MAX_FROM_MEMORY_BYTES else None
        try:
            store.files.attach(record.id, file, path if content is None else content)
        except OSError as error:
            if content is None:
                raise
            logger.warning("%s is not kept: %s", file, error, extra={"video_id": record.id})
    return content


def _write(video: bytes, record: VideoRecord, file: File, path: Path) -> None:
    match file:
        case FrameFile():
            write_frame(video, path, file.index)
        case VideoFile.GIF:
            write_gif(video, path, fps=record.plan.fps)
        case VideoFile.WEBP:
            write_webp(video, path)
        case VideoFile.FRAMES:
            write_frames(video, path)
        case VideoFile.THUMBNAIL:
            path.write_bytes(thumbnail(video))
        case VideoFile.SPRITESHEET:
            path.write_bytes(sprite_sheet(video, record.plan.num_frames))
        case _:
            raise ValueError(f"{file}: is not made of the video")
