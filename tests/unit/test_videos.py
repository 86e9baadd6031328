import asyncio
import contextvars
from pathlib import Path

import pytest

from deployments import tasks
from deployments.videos import Videos
from pyramid_serve.api import VideoRecord, VideoRequest, new_record, resolve
from pyramid_serve.storage import VideoNotFoundError, VideoStore
from tests.serve.local_server import MODEL, LocalHandle

pytestmark = pytest.mark.asyncio

REQUEST = VideoRequest(prompt="a ball", seed=1)


class SlowClaims:
    """Accepts when it is let to, as the video that the key was used for if there is one."""

    def __init__(self, known: VideoRecord | None = None) -> None:
        self.is_asked, self.may_accept = asyncio.Event(), asyncio.Event()
        self.accepted: list[str] = []
        self.cancelled: list[str] = []
        self._known = known

    async def submit(self, record: VideoRecord, picture: bytes | None, owner: str | None) -> VideoRecord:
        assert len(contextvars.copy_context()) == 0  # or Serve would cancel this call with its caller's request
        self.is_asked.set()
        await self.may_accept.wait()
        record = self._known or record
        self.accepted.append(record.id)
        return record

    async def cancel(self, video_id: str) -> None:
        self.cancelled.append(video_id)


_request = contextvars.ContextVar[str]("request")


async def leave_meanwhile(claims: SlowClaims, root: Path) -> None:
    _request.set("as Serve sets its own")
    videos = Videos(VideoStore(str(root)), LocalHandle(claims), MODEL)  # type: ignore[arg-type]
    asking = asyncio.create_task(videos.accept_while_wanted(REQUEST))
    await claims.is_asked.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert claims.accepted == []
    claims.may_accept.set()
    while tasks._apart:
        await asyncio.sleep(0)


async def test_a_video_that_is_accepted_after_its_caller_left_is_cancelled(tmp_path: Path) -> None:
    claims = SlowClaims()
    await leave_meanwhile(claims, tmp_path)
    assert len(claims.accepted) == 1 and claims.cancelled == claims.accepted


async def test_a_video_that_another_asked_for_is_not_cancelled(tmp_path: Path) -> None:
    known = new_record(resolve(REQUEST, MODEL.capabilities, MODEL.name, limits=MODEL.limits))
    claims = SlowClaims(known)
    await leave_meanwhile(claims, tmp_path)
    assert claims.accepted == [known.id] and claims.cancelled == []


async def test_a_video_that_was_deleted_before_its_caller_left_is_no_error(tmp_path: Path) -> None:
    class Emptied:
        async def cancel(self, video_id: str) -> None:
            raise VideoNotFoundError(video_id)

    videos = Videos(VideoStore(str(tmp_path)), LocalHandle(Emptied()), MODEL)  # type: ignore[arg-type]
    with pytest.raises(VideoNotFoundError):
        await videos.cancel("gone")
    await videos.cancel_unwanted("gone")
