import io
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from PIL import Image

from pyramid_serve.media import previews
from pyramid_serve.media.ffmpeg import EncodeError
from pyramid_serve.media.fragments import encode_fragment, join_fragments
from pyramid_serve.media.previews import sprite_sheet, thumbnail


def video_of(folder: Path, shades: list[int], *, width: int = 128, height: int = 64) -> bytes:
    """An MP4 with a frame for each shade of gray."""
    frames = numpy.stack([numpy.full((height, width, 3), shade, numpy.uint8) for shade in shades])
    join_fragments([encode_fragment(frames, index=0, first_frame=0, fps=24)], folder / "video.mp4")
    return (folder / "video.mp4").read_bytes()


def opened(content: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(content))
    assert picture.format == "WEBP"
    return picture.convert("RGB")


def shade_at(picture: Image.Image, x: int, y: int) -> int:
    return int(numpy.asarray(picture)[y, x].mean())


def test_a_thumbnail_is_the_first_frame(tmp_path: Path) -> None:
    picture = opened(thumbnail(video_of(tmp_path, [200, 20, 20])))
    assert picture.size == (128, 64)
    assert abs(shade_at(picture, 64, 32) - 200) < 6


def test_a_thumbnail_of_a_large_video_is_scaled_down(tmp_path: Path) -> None:
    assert opened(thumbnail(video_of(tmp_path, [0], width=1280, height=768))).size == (640, 384)


def test_a_sprite_sheet_shows_evenly_spaced_frames_in_rows_of_five(tmp_path: Path) -> None:
    shades = [4 * index for index in range(50)]
    picture = opened(sprite_sheet(video_of(tmp_path, shades), 50))
    assert picture.size == (5 * 128, 5 * 64)
    for index in range(25):  # every other frame
        x, y = 128 * (index % 5) + 64, 64 * (index // 5) + 32
        assert abs(shade_at(picture, x, y) - shades[2 * index]) < 8


def test_a_sprite_sheet_of_few_frames_is_a_row(tmp_path: Path) -> None:
    assert opened(sprite_sheet(video_of(tmp_path, [0, 100, 200]), 3)).size == (3 * 128, 64)


def test_a_preview_made_again_is_the_same_bytes(tmp_path: Path) -> None:
    video = video_of(tmp_path, [0, 100, 200])
    assert thumbnail(video) == thumbnail(video)
    assert sprite_sheet(video, 3) == sprite_sheet(video, 3)


def test_what_is_no_video_is_an_error() -> None:
    with pytest.raises(EncodeError, match="ffmpeg ended with"):
        thumbnail(b"no video")


def test_a_preview_that_takes_too_long_is_an_error(
    fake_ffmpeg: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_ffmpeg("exec sleep 60")
    monkeypatch.setattr(previews, "PREVIEW_TIMEOUT_S", 0.3)
    with pytest.raises(EncodeError, match=r"within 0\.3 s and was killed"):
        thumbnail(b"a video")
