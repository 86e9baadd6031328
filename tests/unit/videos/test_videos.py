import asyncio
import contextlib
import contextvars
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from deployments.claims.messages import Admitted
from deployments.claims.places import NOWHERE
from deployments.errors import QueueFullError
from deployments.rpc import tasks
from deployments.videos.videos import Videos
from pyramid_serve.api import VideoRecord, VideoRequest, new_record
from pyramid_serve.media.pictures import read_picture
from pyramid_serve.media.tensors import fit_picture
from pyramid_serve.pyramid_flow.pipeline import VideoInput
from pyramid_serve.served_model import ServedModels
from pyramid_serve.storage import VideoFile, VideoNotFoundError, VideoStore
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

    async def submit(self, records: Sequence[VideoRecord]) -> list[Admitted]:
        assert len(contextvars.copy_context()) == 0  # or Serve would cancel this call with its caller's request
        self.is_asked.set()
        await self.may_accept.wait()
        (record,) = records
        record = self._known or record
        self.accepted.append(record.id)
        return [Admitted(record, NOWHERE)]

    async def cancel(self, video_id: str) -> None:
        self.cancelled.append(video_id)


class TakingClaims:
    """Accepts."""

    async def submit(self, records: Sequence[VideoRecord]) -> list[Admitted]:
        return [Admitted(record, NOWHERE) for record in records]


class RefusingClaims:
    """Accepts nothing."""

    async def submit(self, records: Sequence[VideoRecord]) -> list[Exception]:
        return [QueueFullError(1, 1) for _ in records]


class KnowingClaims:
    """Knows the video of the key."""

    async def submit(self, records: Sequence[VideoRecord]) -> list[Admitted]:
        return [Admitted(new_record(record.plan), NOWHERE) for record in records]


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


async def test_a_video_whose_caller_left_before_it_was_accepted_keeps_its_picture(tmp_path: Path) -> None:
    claims, store = SlowClaims(), VideoStore(str(tmp_path))
    videos = Videos(store, LocalHandle(claims), MODELS)  # type: ignore[arg-type]
    asking = asyncio.create_task(videos.accept(VideoRequest(prompt="a ball", input_reference=PICTURES["a GIF"])))
    await claims.is_asked.wait()
    asking.cancel()
    await asyncio.wait([asking])
    claims.may_accept.set()
    while tasks._apart:
        await asyncio.sleep(0.01)
    (accepted,) = claims.accepted
    assert store.files.fetch(accepted, VideoFile.PICTURE)


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
    content = PICTURES[name]
    videos = Videos(VideoStore(str(tmp_path)), LocalHandle(TakingClaims()), MODELS)  # type: ignore[arg-type]
    record = (await videos.accept(VideoRequest(prompt="a ball", input_reference=content))).record
    stored = videos.store.files.fetch(record.id, VideoFile.PICTURE)
    kept = Image.open(io.BytesIO(stored))
    assert kept.format == "PNG"
    assert kept.info == {}
    seen = VideoInput("a ball", image=content).image
    assert seen is not None
    size = {"height": record.plan.height, "width": record.plan.width}
    assert torch.equal(fit_picture(read_picture(stored, max_pixels=None), **size), fit_picture(seen, **size))


@pytest.mark.parametrize("claims", [RefusingClaims(), KnowingClaims()])
async def test_of_a_video_that_is_not_made_no_picture_is_left(tmp_path: Path, claims: object) -> None:
    videos = Videos(VideoStore(str(tmp_path)), LocalHandle(claims), MODELS)  # type: ignore[arg-type]
    with contextlib.suppress(QueueFullError):
        await videos.accept(VideoRequest(prompt="a ball", input_reference=PICTURES["a GIF"]))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


async def test_a_picture_of_more_pixels_than_the_library_takes_is_made_small_where_the_server_takes_it(
    tmp_path: Path,
) -> None:
    limits = MODEL.limits.model_copy(update={"max_picture_pixels": 10**9})
    videos = Videos(
        VideoStore(str(tmp_path)), LocalHandle(TakingClaims()), ServedModels((replace(MODEL, limits=limits),))
    )  # type: ignore[arg-type]
    huge = file_of(Image.new("1", (12_000, 6_000)), "PNG")
    record = (await videos.accept(VideoRequest(prompt="a ball", input_reference=huge))).record
    stored = videos.store.files.fetch(record.id, VideoFile.PICTURE)
    assert read_picture(stored, max_pixels=None).size == (record.plan.width, record.plan.height)
