import asyncio
from typing import Any, cast

import pytest

from deployments.videos import views as http_views
from deployments.videos.mirror import Mirror
from deployments.videos.videos import Videos
from deployments.videos.view import VideoView
from deployments.videos.views import Views
from pyramid_serve.api import Status, VideoRecord
from pyramid_serve.storage import VideoNotFoundError
from tests.serve.local_server import LocalHandle
from tests.unit.api.plans_at_hand import record_of as planned_record

pytestmark = pytest.mark.asyncio


def record_of(status: Status) -> VideoRecord:
    return planned_record(seconds=1).changed(status=status)


class CountedVideos:
    """Counts how often it is asked."""

    def __init__(self, record: VideoRecord) -> None:
        self.record: VideoRecord | None = record
        self.num_asked = 0
        self.mirror = Mirror(LocalHandle(AwayClaims()))  # type: ignore[arg-type]

    async def get(self, video_id: str) -> VideoView:
        self.num_asked += 1
        record = self.record
        await asyncio.sleep(0.01)
        if record is None:
            raise VideoNotFoundError(video_id)
        return VideoView(record)


class AwayClaims:
    """Tells no news."""

    async def news(self, *arguments: Any) -> Any:
        raise TimeoutError


def views_of(videos: CountedVideos) -> Views:
    return Views(cast(Videos, cast(Any, videos)))


async def test_those_who_ask_at_once_share_one_look() -> None:
    videos = CountedVideos(record_of(Status.IN_PROGRESS))
    views = views_of(videos)
    told = await asyncio.gather(*(views.get("a") for _ in range(50)), views.get("b"))
    assert all(view.record is videos.record for view in told)
    assert videos.num_asked == 2


async def test_an_unfinished_video_is_looked_at_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_views, "UNFINISHED_S", 0.0)
    videos = CountedVideos(record_of(Status.IN_PROGRESS))
    views = views_of(videos)
    for _ in range(3):
        await views.get("a")
    assert videos.num_asked == 3
    videos.record = record_of(Status.COMPLETED)
    for _ in range(3):
        assert (await views.get("a")).record.status is Status.COMPLETED
    assert videos.num_asked == 4


async def test_what_was_just_done_is_seen_at_once() -> None:
    videos = CountedVideos(record_of(Status.COMPLETED))
    views = views_of(videos)
    await views.get("a")
    videos.record = None
    views.forget("a")
    with pytest.raises(VideoNotFoundError):
        await views.get("a")


async def test_one_who_leaves_takes_nothing_from_the_others() -> None:
    videos = CountedVideos(record_of(Status.COMPLETED))
    views = views_of(videos)
    leaving, staying = (asyncio.create_task(views.get("a")) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    assert (await staying).record == videos.record
    assert videos.num_asked == 1


async def test_only_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_views, "_MAX_KEPT", 2)
    videos = CountedVideos(record_of(Status.COMPLETED))
    views = views_of(videos)
    for video_id in ("a", "b", "c", "a"):
        await views.get(video_id)
    assert videos.num_asked == 4
