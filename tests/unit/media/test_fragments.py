import re
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy
import pytest

from pyramid_serve.media.fragments import encode_fragment, join_fragments

HEIGHT, WIDTH = 64, 128
Frames = numpy.typing.NDArray[numpy.uint8]


def unit_frames(unit: int) -> Frames:
    """Smooth frames, brighter from frame to frame."""
    first, count = (0, 1) if unit == 0 else (8 * unit - 7, 8)
    ramp = numpy.linspace(0, 60, WIDTH)[None, :, None] * numpy.ones((HEIGHT, 1, 3))
    return numpy.stack([ramp + 5 * (first + index) for index in range(count)]).astype(numpy.uint8)


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
    stream.write_bytes(b"".join(encode_fragment(unit_frames(unit), unit) for unit in range(4)))
    expected = numpy.concatenate([unit_frames(unit) for unit in range(4)])
    assert numpy.abs(decode(stream).astype(int) - expected).mean() < 3
    assert times(stream) == pytest.approx([index / 24 for index in range(25)], abs=1e-4)


def test_joined_fragments_hold_the_same_pictures_with_the_index_in_front(tmp_path: Path) -> None:
    fragments = [encode_fragment(unit_frames(unit), unit) for unit in range(4)]
    stream, whole = tmp_path / "stream.mp4", tmp_path / "whole.mp4"
    stream.write_bytes(b"".join(fragments))
    join_fragments(fragments, whole)
    assert numpy.array_equal(decode(stream), decode(whole))
    assert times(whole) == pytest.approx([index / 24 for index in range(25)], abs=1e-4)
    content = whole.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat") and b"moof" not in content


def test_a_fragment_made_again_is_the_same_bytes() -> None:
    assert encode_fragment(unit_frames(2), 2) == encode_fragment(unit_frames(2), 2)


def test_a_single_picture_is_a_video_too(tmp_path: Path) -> None:
    join_fragments([encode_fragment(unit_frames(0), 0)], tmp_path / "one.mp4")
    assert decode(tmp_path / "one.mp4").shape == (1, HEIGHT, WIDTH, 3)


@pytest.mark.parametrize(("shape", "unit"), [((8, 64, 128, 3), 0), ((1, 64, 128, 3), 1), ((8, 63, 128, 3), 1)])
def test_frames_of_another_shape_are_refused(shape: tuple[int, ...], unit: int) -> None:
    with pytest.raises(ValueError, match="frames: "):
        encode_fragment(numpy.zeros(shape, numpy.uint8), unit)
