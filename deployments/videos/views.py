"""Videos as they stand, for many who ask at once: one look at a video answers all who ask within moments of it."""

import asyncio
import time
from contextvars import Context
from typing import NamedTuple

from cachetools import LRUCache

from deployments.videos.videos import Videos, VideoView

UNFINISHED_S = 0.1
FINISHED_S = 1.0
"""A finished video changes no more, but another replica may have deleted it."""

_MAX_KEPT = 10_000


class _Look(NamedTuple):
    task: "asyncio.Task[VideoView]"
    started_at: float


class Views:
    """What ``Videos.get`` told lately. For one event loop."""

    def __init__(self, videos: Videos) -> None:
        self._videos = videos
        self._looks: LRUCache[str, _Look] = LRUCache(_MAX_KEPT)

    async def get(self, video_id: str) -> VideoView:
        """A video as it stood moments ago at most. Raises ``VideoNotFoundError``."""
        look = self._looks.get(video_id)
        if look is None or not _is_fresh(look):
            # In a context of its own: were it the first asker's, Serve would cancel it when that one leaves.
            look = _Look(asyncio.create_task(self._videos.get(video_id), context=Context()), time.monotonic())
            self._looks[video_id] = look
        # Shielded, for others wait for it too.
        return await asyncio.shield(look.task)

    def forget(self, video_id: str) -> None:
        """Let the next who asks see what was just done to a video."""
        self._looks.pop(video_id, None)


def _is_fresh(look: _Look) -> bool:
    """Whether its answer is still to be given. One that is under way is; one that failed is not."""
    if not look.task.done():
        return True
    if look.task.cancelled() or look.task.exception() is not None:
        return False
    age_s = time.monotonic() - look.started_at
    return age_s < (FINISHED_S if look.task.result().record.is_over else UNFINISHED_S)
