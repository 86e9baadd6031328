"""A copy of all unfinished videos in each process that answers clients, so that a look at one asks nobody."""

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from contextvars import Context
from typing import Any

from cachetools import TTLCache
from ray.serve.handle import DeploymentHandle

from deployments.claims.asking import UNREACHABLE
from deployments.claims.messages import News, QueuePlace
from deployments.claims.places import NOWHERE
from deployments.claims.watchers import Watchers
from deployments.videos.view import VideoView
from pyramid_serve.api import VideoRecord
from pyramid_serve.storage import StorageError

logger = logging.getLogger(__name__)

_ASK_S = 1.0
_PAUSE_S = 0.1
_CURRENT_S = 10.0
"""Longer than a busy process may be late: to ask claims for each look would keep it busy."""
_IDLE_S = 30.0
_MAX_OVER = 10_000
_OVER_S = 10.0
"""An answer of claims that was on its way may still tell of a video that is over by now."""


class Mirror:
    """The unfinished videos that claims holds, as they were moments ago. For one event loop.

    It follows claims from the first look on, and stops when nobody has looked for half a minute.
    """

    def __init__(self, claims: DeploymentHandle[Any]) -> None:
        self._claims = claims
        self._records: dict[str, VideoRecord] = {}
        self._places: Mapping[str, tuple[int | None, float | None]] = {}
        self._watchers = Watchers()
        self._over: TTLCache[str, bool] = TTLCache(_MAX_OVER, _OVER_S)
        self._source = ""
        self._number = 0
        self._heard_at = -_CURRENT_S
        self._looked_at = 0.0
        self._following: asyncio.Task[None] | None = None

    def get(self, video_id: str) -> VideoView | None:
        """A video and its place; None where it is not among them, or claims was not heard of lately."""
        self._looked_at = time.monotonic()
        if self._following is None or self._following.done():
            # In a context of its own: Serve would cancel it with the request that happened to be the first.
            self._following = asyncio.create_task(self._follow(), context=Context())
        record = self._records.get(video_id)
        if record is None or time.monotonic() - self._heard_at > _CURRENT_S:
            return None
        place = self._places.get(video_id)
        return VideoView(record, NOWHERE if place is None else QueuePlace(*place))

    async def wait(self, video_id: str, *, timeout_s: float) -> None:
        """Wait until a video that is shown changes or is shown no more, or for so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._watchers.next_change(video_id).wait()

    def hear(self, record: VideoRecord) -> None:
        """Take in what this process has learned in another way, so that nobody is shown an earlier state after it."""
        if record.is_over:
            self._over[record.id] = True
            self._records.pop(record.id, None)
            self._watchers.tell(record.id)
        elif record.id in self._records and record.revision > self._records[record.id].revision:
            self._records[record.id] = record

    def forget(self, video_id: str) -> None:
        """Forget a video that was just changed, until claims tells of the change."""
        self._records.pop(video_id, None)

    def hear_deleted(self, video_id: str) -> None:
        """Take in that a video was deleted."""
        self._over[video_id] = True
        self._records.pop(video_id, None)
        self._watchers.tell(video_id)

    async def _follow(self) -> None:
        while time.monotonic() - self._looked_at < _IDLE_S:
            try:
                async with asyncio.timeout(4 * _ASK_S):
                    news: News = await self._claims.news.remote(self._source, self._number, _ASK_S)
            except (*UNREACHABLE, StorageError) as error:
                logger.info("claims is away: %s", type(error).__name__)
                await asyncio.sleep(_ASK_S)
                continue
            except Exception:
                logger.exception("could not follow claims, trying again")
                await asyncio.sleep(_ASK_S)
                continue
            self._take(news)
            await asyncio.sleep(_PAUSE_S)

    def _take(self, news: News) -> None:
        changed = {record.id: record for record in news.records if record.id not in self._over}
        gone = set(self._records) - set(changed) if news.is_whole else set(news.gone)
        self._records.update(changed)
        for video_id in gone:
            self._records.pop(video_id, None)
        self._places = news.places
        self._source, self._number = news.source, news.number
        self._heard_at = time.monotonic()
        for video_id in (*changed, *gone):
            self._watchers.tell(video_id)
