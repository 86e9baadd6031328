"""Previews: one ffmpeg for all who want the same, and an end to the wait."""

import asyncio
import logging
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from deployments.http import previews
from deployments.http.errors import ApiError
from deployments.http.previews import Previews
from pyramid_serve.api import VideoRecord
from pyramid_serve.media.ffmpeg import EncodeError
from pyramid_serve.storage import FrameFile, VideoFile, VideoStore
from tests.unit.api.plans_at_hand import record_of

FILE = VideoFile.THUMBNAIL


@pytest.fixture
def store(tmp_path: Path) -> VideoStore:
    return VideoStore(str(tmp_path))


@pytest.fixture
def record(store: VideoStore) -> VideoRecord:
    record = record_of()
    store.create(record)
    store.files.attach(record.id, VideoFile.VIDEO, b"video")
    return record


def test_requests_at_the_same_time_share_one_preview(
    store: VideoStore, record: VideoRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_made = 0

    def make(video: bytes) -> bytes:
        nonlocal num_made
        num_made += 1
        time.sleep(0.1)
        return b"picture"

    monkeypatch.setattr(previews, "thumbnail", make)

    async def ask() -> list[bytes | None]:
        shared = Previews(store, timeout_s=10)
        return await asyncio.gather(*(shared.get(record, FILE) for _ in range(20)))

    assert asyncio.run(ask()) == [b"picture"] * 20
    assert num_made == 1
    assert store.files.fetch(record.id, FILE) == b"picture"


def test_a_request_that_leaves_does_not_end_the_preview_of_the_others(
    store: VideoStore, record: VideoRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = threading.Event()

    def make(video: bytes) -> bytes:
        may_end.wait(10)
        return b"picture"

    monkeypatch.setattr(previews, "thumbnail", make)

    async def leave_one() -> bytes | None:
        shared = Previews(store, timeout_s=10)
        first = asyncio.create_task(shared.get(record, FILE))
        second = asyncio.create_task(shared.get(record, FILE))
        await asyncio.sleep(0.05)
        first.cancel()
        await asyncio.wait([first])
        may_end.set()
        return await second

    assert asyncio.run(leave_one()) == b"picture"


def test_a_preview_that_takes_too_long_is_a_503_and_goes_on(
    store: VideoStore, record: VideoRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = threading.Event()

    def make(video: bytes) -> bytes:
        may_end.wait(10)
        return b"picture"

    monkeypatch.setattr(previews, "thumbnail", make)

    async def ask_twice() -> bytes | None:
        shared = Previews(store, timeout_s=0.1)
        with pytest.raises(ApiError, match="its preview is still being made") as caught:
            await shared.get(record, FILE)
        assert caught.value.status == 503
        may_end.set()
        return await shared.get(record, FILE)

    assert asyncio.run(ask_twice()) == b"picture"


def test_a_preview_that_fails_is_logged_although_nobody_waits_and_is_tried_again(
    store: VideoStore, record: VideoRecord, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(video: bytes) -> bytes:
        time.sleep(0.1)
        raise EncodeError("ffmpeg ended with 1: no frame")

    async def leave() -> None:
        shared = Previews(store, timeout_s=0.01)
        for _ in range(2):
            with pytest.raises(ApiError):
                await shared.get(record, FILE)
            await asyncio.sleep(0.3)

    monkeypatch.setattr(previews, "thumbnail", fail)
    with caplog.at_level(logging.WARNING):
        asyncio.run(leave())
    said: list[Any] = [each.getMessage() for each in caplog.records]
    assert said == ["thumbnail.webp cannot be made: ffmpeg ended with 1: no frame"] * 2


def test_a_gif_that_takes_long_holds_up_no_thumbnail(
    store: VideoStore, record: VideoRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = threading.Event()

    def write(video: bytes, path: Path, *, fps: float) -> None:
        assert may_end.wait(10)
        path.write_bytes(b"gif")

    monkeypatch.setattr(previews, "write_gif", write)
    monkeypatch.setattr(previews, "write_webp", lambda video, path: path.write_bytes(b"webp"))
    monkeypatch.setattr(previews, "thumbnail", lambda video: b"picture")

    async def ask() -> None:
        shared = Previews(store, timeout_s=10)
        long = [asyncio.create_task(shared.get(record, file)) for file in (VideoFile.GIF, VideoFile.WEBP)]
        assert await shared.get(record, FILE) == b"picture"
        assert not any(task.done() for task in long)  # one of them at a time
        may_end.set()
        assert await asyncio.gather(*long) == [b"gif", b"webp"]

    asyncio.run(ask())


def test_a_large_file_is_kept_and_not_held_in_memory(
    store: VideoStore, record: VideoRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"frame" * 100
    monkeypatch.setattr(previews, "_MAX_FROM_MEMORY_BYTES", len(content) - 1)
    monkeypatch.setattr(previews, "write_frame", lambda video, path, index: path.write_bytes(content))
    file = FrameFile(3)
    assert asyncio.run(Previews(store, timeout_s=10).get(record, file)) is None
    assert store.files.fetch(record.id, file) == content


def test_a_conversion_that_fails_leaves_nothing(
    store: VideoStore, record: VideoRecord, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    before = sorted(Path(store.root).rglob("*"))
    for file in (VideoFile.GIF, VideoFile.WEBP, VideoFile.FRAMES, FrameFile(0)):
        with pytest.raises(EncodeError):
            asyncio.run(Previews(store, timeout_s=10).get(record, file))  # its video is no video
    assert not list(scratch.iterdir())
    assert sorted(Path(store.root).rglob("*")) == before


def test_past_some_number_of_previews_further_ones_are_refused(
    store: VideoStore, record: VideoRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = threading.Event()
    monkeypatch.setattr(previews, "_MAX_WANTED", 1)

    def make(video: bytes) -> bytes:
        assert may_go_on.wait(10)
        return b"picture"

    monkeypatch.setattr(previews, "thumbnail", make)

    async def ask() -> None:
        shared = Previews(store, timeout_s=10)
        first = asyncio.create_task(shared.get(record, FILE))
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="too many previews") as refused:
            await shared.get(record, VideoFile.SPRITESHEET)
        assert refused.value.status == 503
        may_go_on.set()
        assert await first == b"picture"

    asyncio.run(ask())
