import asyncio
import contextvars
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deployments.rpc import tasks
from deployments.videos.videos import Videos
from pyramid_serve.api import VideoRecord, VideoRequest, new_record
from pyramid_serve.media.pictures import read_picture
from pyramid_serve.pyramid_flow.pipeline import VideoInput
from pyramid_serve.served_model import ServedModels
from pyramid_serve.storage import VideoNotFoundError, VideoStore
from tests.serve.local_server import MODEL, LocalHandle
from tests.unit.media.pictures_at_hand import (
    DISPLAY_P3_COLORANTS,
    cmyk_profile,
    exif,
    file_of,
    gradient,
    orientation,
    rgb_profile,
)

pytestmark = pytest.mark.asyncio

MODELS = ServedModels((MODEL,))
REQUEST = VideoRequest(prompt="a ball", seed=1)
PHOTO: dict[str, Any] = {
    "exif": b"Exif\0\0" + exif(orientation(6)),
    "icc_profile": rgb_profile(DISPLAY_P3_COLORANTS),
}
PICTURES = {
    "a phone's JPEG": file_of(gradient(), "JPEG", **PHOTO),
    "a phone's HEIC": file_of(gradient(), "HEIC", **PHOTO),
    "an AVIF": file_of(gradient(), "AVIF", **PHOTO),
    "a GIF": file_of(gradient(), "GIF"),
    "CMYK": file_of(gradient().convert("CMYK"), "JPEG", icc_profile=cmyk_profile()),
    "transparent": file_of(Image.new("RGBA", (64, 64), (200, 100, 0, 100)), "PNG", icc_profile=PHOTO["icc_profile"]),
    "16 bits": file_of(Image.new("I;16", (64, 64), 40_000), "TIFF"),
}


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


class KeepingClaims:
    """Accepts, and keeps the picture that came."""

    picture: bytes | None = None

    async def submit(self, record: VideoRecord, picture: bytes | None, owner: str | None) -> VideoRecord:
        self.picture = picture
        return record


_request = contextvars.ContextVar[str]("request")


async def leave_meanwhile(claims: SlowClaims, root: Path) -> None:
    _request.set("as Serve sets its own")
    videos = Videos(VideoStore(str(root)), LocalHandle(claims), MODELS)  # type: ignore[arg-type]
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
    known = new_record(MODEL.plan(REQUEST))
    claims = SlowClaims(known)
    await leave_meanwhile(claims, tmp_path)
    assert claims.accepted == [known.id] and claims.cancelled == []


async def test_a_video_that_was_deleted_before_its_caller_left_is_no_error(tmp_path: Path) -> None:
    class Emptied:
        async def cancel(self, video_id: str) -> None:
            raise VideoNotFoundError(video_id)

    videos = Videos(VideoStore(str(tmp_path)), LocalHandle(Emptied()), MODELS)  # type: ignore[arg-type]
    with pytest.raises(VideoNotFoundError):
        await videos.cancel("gone")
    await videos.cancel_unwanted("gone")


@pytest.mark.parametrize("name", PICTURES)
async def test_the_picture_of_a_video_has_the_pixels_that_the_library_sees(tmp_path: Path, name: str) -> None:
    claims, content = KeepingClaims(), PICTURES[name]
    videos = Videos(VideoStore(str(tmp_path)), LocalHandle(claims), MODELS)  # type: ignore[arg-type]
    await videos.accept(VideoRequest(prompt="a ball", input_reference=content))
    assert claims.picture is not None
    kept = Image.open(io.BytesIO(claims.picture))
    assert kept.format == "PNG"
    assert kept.info == {}
    assert read_picture(claims.picture, max_pixels=None) == VideoInput("a ball", image=content).image


async def test_a_picture_of_more_pixels_than_the_library_takes_is_read_again_where_the_server_takes_it(
    tmp_path: Path,
) -> None:
    claims = KeepingClaims()
    limits = MODEL.limits.model_copy(update={"max_picture_pixels": 10**9})
    videos = Videos(VideoStore(str(tmp_path)), LocalHandle(claims), ServedModels((replace(MODEL, limits=limits),)))  # type: ignore[arg-type]
    huge = file_of(Image.new("1", (12_000, 6_000)), "PNG")
    await videos.accept(VideoRequest(prompt="a ball", input_reference=huge))
    assert claims.picture is not None
    assert read_picture(claims.picture, max_pixels=None).size == (12_000, 6_000)
