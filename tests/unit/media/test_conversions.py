"""A finished MP4 as GIF, WebP and PNG: every frame, its colours and how long it is shown."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from numpy.typing import NDArray
from PIL import Image

from pyramid_serve.media import conversions
from pyramid_serve.media.conversions import write_frame, write_frames, write_gif, write_webp
from pyramid_serve.media.ffmpeg import EncodeError
from pyramid_serve.media.fragments import encode_fragment, join_fragments

WIDTH, HEIGHT = 128, 64
COLOURS = ((220, 30, 30), (30, 200, 40), (40, 50, 220), (230, 220, 40), (128, 128, 128))
"""Saturated, for a wrong matrix between RGB and YUV shows in these only."""


def frames_of(num_frames: int) -> NDArray[numpy.uint8]:
    """Frames (F, H, W, 3) whose left half has one of the colours and whose right half the next."""
    frames = numpy.empty((num_frames, HEIGHT, WIDTH, 3), numpy.uint8)
    for index in range(num_frames):
        frames[index, :, : WIDTH // 2] = COLOURS[index % len(COLOURS)]
        frames[index, :, WIDTH // 2 :] = COLOURS[(index + 1) % len(COLOURS)]
    return frames


def video_of(folder: Path, num_frames: int, *, fps: int) -> bytes:
    path = folder / "source.mp4"
    join_fragments([encode_fragment(frames_of(num_frames), index=0, first_frame=0, fps=fps)], path)
    content = path.read_bytes()
    path.unlink()
    return content


def check_picture(picture: Image.Image, index: int) -> None:
    """It has the size and the colours of a frame, away from the edge in the middle, which chroma blurs."""
    assert picture.size == (WIDTH, HEIGHT)
    got = numpy.asarray(picture.convert("RGB")).astype(int)
    expected = frames_of(index + 1)[index].astype(int)
    for part in (slice(4, WIDTH // 2 - 4), slice(WIDTH // 2 + 4, -4)):
        assert abs(got[:, part] - expected[:, part]).max() <= 8, (index, got[32, part][0], expected[32, part][0])


def animation(path: Path, kind: str) -> list[int]:
    """Check the frames of a GIF or WebP; how long each is shown, in ms."""
    delays = []
    with Image.open(path) as picture:
        assert (picture.format, picture.info["loop"]) == (kind, 0)
        for index in range(getattr(picture, "n_frames", 1)):
            picture.seek(index)
            picture.load()
            delays.append(int(picture.info["duration"]))
            check_picture(picture, index)
    return delays


@pytest.mark.parametrize(
    ("fps", "num_frames", "first"),
    [(8, 16, [130, 120, 130, 120]), (8, 9, [130, 120]), (24, 25, [40, 40, 50, 40]), (24, 49, [40, 40, 50, 40])],
)
def test_a_gif_has_every_frame_at_the_true_rate_and_loops(
    tmp_path: Path, fps: int, num_frames: int, first: list[int]
) -> None:
    write_gif(video_of(tmp_path, num_frames, fps=fps), tmp_path / "a.gif", fps=fps)
    delays = animation(tmp_path / "a.gif", "GIF")
    assert len(delays) == num_frames
    assert delays[: len(first)] == first
    assert abs(sum(delays) - 1000 * num_frames / fps) < 10  # of the whole turn, so the rate cannot drift
    assert {round(1000 / fps / 10 - 0.5) * 10, round(1000 / fps / 10 + 0.5) * 10} >= set(delays)


@pytest.mark.parametrize(("fps", "num_frames"), [(8, 16), (24, 25)])
def test_a_webp_has_every_frame_at_the_true_rate_and_loops(tmp_path: Path, fps: int, num_frames: int) -> None:
    write_webp(video_of(tmp_path, num_frames, fps=fps), tmp_path / "a.webp")
    delays = animation(tmp_path / "a.webp", "WEBP")
    assert len(delays) == num_frames
    assert abs(sum(delays) - 1000 * num_frames / fps) < 5
    assert all(abs(delay - 1000 / fps) < 1 for delay in delays)


def test_a_webp_is_lossy(tmp_path: Path) -> None:
    write_webp(video_of(tmp_path, 2, fps=8), tmp_path / "a.webp")
    content = (tmp_path / "a.webp").read_bytes()
    assert b"VP8 " in content and b"VP8L" not in content


@pytest.mark.parametrize("index", [0, 3, 8])
def test_one_frame_is_a_png(tmp_path: Path, index: int) -> None:
    write_frame(video_of(tmp_path, 9, fps=24), tmp_path / "100%d.png", index)  # a name, not a pattern
    with Image.open(tmp_path / "100%d.png") as picture:
        assert picture.format == "PNG"
        check_picture(picture, index)


def test_a_frame_after_the_last_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EncodeError, match="no frame 9"):
        write_frame(video_of(tmp_path, 9, fps=24), tmp_path / "a.png", 9)


def test_all_frames_are_png_in_a_zip_that_is_not_compressed(tmp_path: Path) -> None:
    folder = tmp_path / "100%d"
    folder.mkdir()
    write_frames(video_of(tmp_path, 9, fps=24), folder / "a.zip")
    assert [file.name for file in folder.iterdir()] == ["a.zip"]
    with zipfile.ZipFile(folder / "a.zip") as packed:
        assert packed.testzip() is None
        assert packed.namelist() == [f"{index:05d}.png" for index in range(9)]
        for index, entry in enumerate(packed.infolist()):
            assert entry.compress_type == zipfile.ZIP_STORED
            check_picture(Image.open(io.BytesIO(packed.read(entry))), index)


def test_the_same_video_gives_the_same_bytes(tmp_path: Path) -> None:
    video = video_of(tmp_path, 9, fps=24)
    for name in ("first", "second"):
        write_gif(video, tmp_path / f"{name}.gif", fps=24)
        write_webp(video, tmp_path / f"{name}.webp")
        write_frame(video, tmp_path / f"{name}.png", 4)
        write_frames(video, tmp_path / f"{name}.zip")
    for ending in ("gif", "webp", "png", "zip"):
        assert (tmp_path / f"first.{ending}").read_bytes() == (tmp_path / f"second.{ending}").read_bytes()


def test_a_conversion_that_takes_too_long_is_killed_and_leaves_nothing(
    tmp_path: Path, fake_ffmpeg: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = fake_ffmpeg("exec sleep 60")
    monkeypatch.setattr(conversions, "CONVERT_TIMEOUT_S", 0.3)
    (tmp_path / "out").mkdir()
    with pytest.raises(EncodeError, match=r"within 0\.3 s and was killed"):
        write_frames(b"a video", tmp_path / "out/a.zip")
    assert not list((tmp_path / "out").iterdir())
    assert not Path("/proc", pids.read_text().strip()).exists()
