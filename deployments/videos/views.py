"""Videos as they are now, for many callers at once: one look at a video answers all who ask within moments of it."""

import asyncio
import time
from contextvars import Context
from typing import NamedTuple

from cachetools import LRUCache

from deployments.videos.videos import Videos
from deployments.videos.view import VideoView

UNFINISHED_S = 0.1
FINISHED_S = 1.0
"""A finished video no longer changes, but another replica may have deleted it."""

_MAX_KEPT = 10_000


class _Look(NamedTuple):
    task: "asyncio.Task[VideoView]"
    started_at: float


class Views:
    """The latest answers of ``Videos.get``. For one event loop."""

    def __init__(self, videos: Videos) -> None:
        self._videos = videos
        self._looks: LRUCache[str, _Look] = LRUCache(_MAX_KEPT)

    async def get(self, video_id: str) -> VideoView:
        """A video as it was at most moments ago. Raises ``VideoNotFoundError``."""
        unfinished = self._videos.mirror.get(video_id)
        if unfinished is not None:
            return unfinished
        look = self._looks.get(video_id)
        if look is None or not _is_fresh(look):
            # In a context of its own: with the first caller's, Serve would cancel it when that caller leaves.
            look = _Look(asyncio.create_task(self._videos.get(video_id), context=Context()), time.monotonic())
            self._looks[video_id] = look
        # Shielded, because others may wait for it too.
        return await asyncio.shield(look.task)

    def forget(self, video_id: str) -> None:
        """Forget the answer about a video that was just changed, so that the next caller sees the change."""
        self._videos.mirror.forget(video_id)
        self._looks.pop(video_id, None)


def _is_fresh(look: _Look) -> bool:
    """Whether its answer may still be given. A look that is under way counts as fresh, one that failed does not."""
    if not look.task.done():
        return True
    if look.task.cancelled() or look.task.exception() is not None:
        return False
    age_s = time.monotonic() - look.started_at
    return age_s < (FINISHED_S if look.task.result().record.is_over else UNFINISHED_S)
