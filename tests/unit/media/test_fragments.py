import hashlib
import re
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy
import pytest

from pyramid_serve.media.fragments import encode_fragment, join_fragments

HEIGHT, WIDTH = 64, 128
FFMPEG_VERSION = "n9.0.2-17-g2a571b6068-20260930"
DIGESTS = [
    "d7d0f8542dda44cac9a3dc80c386a5c8381101ab0449d97e631a3bdf388ad03d",
    "8e93f3c33cc963e81c871fff664b9da92c294c694e7db87de11b5e36d90c3484",
    "ed7a9b99ab769074614b259291f4e90de2d4130c42b944036eb07be6db203d5e",
    "ee303d2d79e3c7f42a5c3fbff6861b462245b72db50cf62631eaa040a38f274f",
]
"""SHA-256 of the fragments of ``unit_frames``, as this ffmpeg (of imageio-ffmpeg 0.6) encodes them."""

Frames = numpy.typing.NDArray[numpy.uint8]


def unit_frames(unit: int) -> Frames:
    """Smooth frames, brighter from frame to frame."""
    first, count = (0, 1) if unit == 0 else (8 * unit - 7, 8)
    ramp = numpy.linspace(0, 60, WIDTH)[None, :, None] * numpy.ones((HEIGHT, 1, 3))
    return numpy.stack([ramp + 5 * (first + index) for index in range(count)]).astype(numpy.uint8)


def first_frame_of(unit: int) -> int:
    return 8 * unit - 7 if unit else 0


def encoded(unit: int, *, fps: float = 24) -> bytes:
    return encode_fragment(unit_frames(unit), index=unit, first_frame=first_frame_of(unit), fps=fps)


def decode(file: Path) -> Frames:
    arguments = ["-v", "error", "-i", str(file), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *arguments], capture_output=True, check=True).stdout
    return numpy.frombuffer(raw, numpy.uint8).reshape(-1, HEIGHT, WIDTH, 3)


def times(file: Path) -> list[float]:
    arguments = ["-i", str(file), "-vf", "showinfo", "-fps_mode", "passthrough", "-f", "null", "-"]
    said = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *arguments], capture_output=True, text=True, check=True)
    return [float(time) for time in re.findall(r"pts_time:(\S+)", said.stderr)]


def test_fragments_one_after_the_other_are_a_video_that_plays(tmp_path: Path) -> None:
    stream = tmp_path / "stream.mp4"
    stream.write_bytes(b"".join(encoded(unit) for unit in range(4)))
    expected = numpy.concatenate([unit_frames(unit) for unit in range(4)])
    assert numpy.abs(decode(stream).astype(int) - expected).mean() < 3
    assert times(stream) == pytest.approx([index / 24 for index in range(25)], abs=1e-4)


def test_joined_fragments_hold_the_same_pictures_with_the_index_in_front(tmp_path: Path) -> None:
    fragments = [encoded(unit) for unit in range(4)]
    stream, whole = tmp_path / "stream.mp4", tmp_path / "whole.mp4"
    stream.write_bytes(b"".join(fragments))
    join_fragments(fragments, whole)
    assert numpy.array_equal(decode(stream), decode(whole))
    assert times(whole) == pytest.approx([index / 24 for index in range(25)], abs=1e-4)
    content = whole.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat") and b"moof" not in content


def test_a_fragment_made_again_is_the_same_bytes() -> None:
    assert encoded(2) == encoded(2)


def test_a_single_picture_is_a_video_too(tmp_path: Path) -> None:
    join_fragments([encoded(0)], tmp_path / "one.mp4")
    assert decode(tmp_path / "one.mp4").shape == (1, HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("shape", [(0, 64, 128, 3), (8, 64, 128, 4), (64, 128, 3), (8, 63, 128, 3), (8, 64, 127, 3)])
def test_frames_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="frames: "):
        encode_fragment(numpy.zeros(shape, numpy.uint8), index=1, first_frame=1, fps=24)


def test_frames_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match="frames: float32"):
        encode_fragment(numpy.zeros((8, 64, 128, 3), numpy.float32), index=1, first_frame=1, fps=24)  # type: ignore[arg-type]


@pytest.mark.parametrize("fps", [0, -24, float("nan"), float("inf"), 2000])
def test_a_frame_rate_that_no_video_has_is_refused(fps: float) -> None:
    with pytest.raises(ValueError, match="fps="):
        encoded(1, fps=fps)


def test_fragments_at_24_fps_are_the_bytes_that_earlier_releases_saved() -> None:
    # A video that an earlier release began must join with the fragments of this one.
    if imageio_ffmpeg.get_ffmpeg_version() != FFMPEG_VERSION:
        pytest.skip(f"the digests are of ffmpeg {FFMPEG_VERSION}")
    digests = [hashlib.sha256(encoded(unit)).hexdigest() for unit in range(4)]
    assert digests == DIGESTS


@pytest.mark.parametrize("fps", [8, 12.5, 25, 30, 30000 / 1001, 23.976])
def test_frames_have_exact_times_at_any_frame_rate(tmp_path: Path, fps: float) -> None:
    fragments = [encoded(unit, fps=fps) for unit in range(4)]
    (tmp_path / "stream.mp4").write_bytes(b"".join(fragments))
    join_fragments(fragments, tmp_path / "whole.mp4")
    for name in ("stream.mp4", "whole.mp4"):
        assert times(tmp_path / name) == pytest.approx([index / fps for index in range(25)], rel=1e-5, abs=1e-5)


def test_units_may_have_any_number_of_frames(tmp_path: Path) -> None:
    frames = numpy.concatenate([unit_frames(unit) for unit in range(3)])
    stream = tmp_path / "stream.mp4"
    stream.write_bytes(
        encode_fragment(frames[:5], index=0, first_frame=0, fps=8)
        + encode_fragment(frames[5:], index=1, first_frame=5, fps=8)
    )
    assert numpy.abs(decode(stream).astype(int) - frames).mean() < 3
    assert times(stream) == pytest.approx([index / 8 for index in range(17)], abs=1e-4)
