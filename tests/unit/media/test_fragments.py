import hashlib
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imageio_ffmpeg
import numpy
import pytest

from pyramid_serve.media.ffmpeg import EncodeError
from pyramid_serve.media.fragments import encode_fragment, join_fragments

HEIGHT, WIDTH = 64, 128
X264 = b"x264 - core 165 "
"""What the encoder of the digests writes into the first picture of every fragment."""
DIGESTS = [
    "d7d0f8542dda44cac9a3dc80c386a5c8381101ab0449d97e631a3bdf388ad03d",
    "8e93f3c33cc963e81c871fff664b9da92c294c694e7db87de11b5e36d90c3484",
    "ed7a9b99ab769074614b259291f4e90de2d4130c42b944036eb07be6db203d5e",
    "ee303d2d79e3c7f42a5c3fbff6861b462245b72db50cf62631eaa040a38f274f",
]
"""SHA-256 of the fragments of ``unit_frames``, as the ffmpeg program n9.0.2 of imageio-ffmpeg encoded them."""
JOINED_DIGESTS = {
    24: "ec3c4014f7143f899d6c8704c9937fd87e6ede1e527b480f1a28f0bc77ddadad",
    30000 / 1001: "9507ff3797c5df8a2376f34ac916ef613bec6d69a41dc7e780da42cefaa0cd11",
}
"""SHA-256 of the fragments of ``unit_frames`` joined, by frame rate, as the same program wrote them."""

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


def noise(num_frames: int, *, height: int = HEIGHT, width: int = WIDTH, seed: int = 7) -> Frames:
    source = numpy.random.Generator(numpy.random.PCG64(seed))
    return source.integers(0, 256, (num_frames, height, width, 3), dtype=numpy.uint8)


def skip_with_another_x264() -> None:
    if X264 not in encoded(0):
        pytest.skip(f"the digests are of {X264.decode()}")


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
    skip_with_another_x264()
    digests = [hashlib.sha256(encoded(unit)).hexdigest() for unit in range(4)]
    assert digests == DIGESTS


@pytest.mark.parametrize(
    ("frames", "index", "fps", "digest"),
    [
        (noise(8, height=2, width=2), 0, 24, "f2b9c73fe29bf7a1799e84c477294d8551ee8a49eaa123dffb020e1b7ae5d0ff"),
        (noise(8), 300, 25, "cac10a57ce2098f1237dd1d6a91c01b083b70fffbe6b8a7fd44439b11169b12f"),
        (0 * noise(1), 0, 8, "d4253459d93ae23038200c9d102d4ee7aad1190bb2583fb93b811966f245d025"),
        (unit_frames(0), 0, 30000 / 1001, "c744a7fc8884e1426a6ce84be9c50890e3a83ebddeb3b3a72fb701ae00b5faf0"),
        (noise(2, height=768, width=1280), 0, 24, "43b637dee161cecf973fb905bd4dc5aa9c98a9d1a048363ec362bf23a0f1d901"),
    ],
    ids=["smallest", "noise", "black", "30000/1001 fps", "large"],
)
def test_fragments_of_any_frames_are_the_bytes_that_earlier_releases_saved(
    frames: Frames, index: int, fps: float, digest: str
) -> None:
    skip_with_another_x264()
    fragment = encode_fragment(frames, index=index, first_frame=first_frame_of(index), fps=fps)
    assert hashlib.sha256(fragment).hexdigest() == digest


@pytest.mark.parametrize("fps", JOINED_DIGESTS)
def test_joined_fragments_are_the_bytes_that_earlier_releases_wrote(tmp_path: Path, fps: float) -> None:
    skip_with_another_x264()
    join_fragments([encoded(unit, fps=fps) for unit in range(4)], tmp_path / "whole.mp4")
    assert hashlib.sha256((tmp_path / "whole.mp4").read_bytes()).hexdigest() == JOINED_DIGESTS[fps]


def test_fragments_encoded_at_once_are_the_bytes_of_each_alone() -> None:
    clips = [noise(8, seed=seed) for seed in range(8)]

    def encode(frames: Frames) -> bytes:
        return encode_fragment(frames, index=1, first_frame=1, fps=24)

    alone = [encode(frames) for frames in clips]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(encode, clips * 4)) == alone * 4


def test_frames_in_any_memory_layout_are_the_same_bytes() -> None:
    assert encode_fragment(numpy.asfortranarray(unit_frames(1)), index=1, first_frame=1, fps=24) == encode_fragment(
        unit_frames(1), index=1, first_frame=1, fps=24
    )


def test_a_size_that_h264_does_not_have_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EncodeError, match=r"^ffmpeg failed: .*$"):
        encode_fragment(numpy.zeros((1, 2, 16386, 3), numpy.uint8), index=0, first_frame=0, fps=24)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "fragments",
    [[], [b"no fragment" * 50], [encoded(1), encoded(2)], [encoded(0)[:400]]],
    ids=["none", "another file", "no first fragment", "a first fragment cut off"],
)
def test_fragments_that_are_no_video_are_an_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], fragments: list[bytes]
) -> None:
    with pytest.raises(EncodeError, match=r"^ffmpeg failed: .*$"):
        join_fragments(fragments, tmp_path / "whole.mp4")
    assert not (tmp_path / "whole.mp4").exists()
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EncodeError, match="No such file"):
        join_fragments([encoded(0)], tmp_path / "missing" / "whole.mp4")


def test_a_name_with_a_colon_is_a_file(tmp_path: Path) -> None:
    join_fragments([encoded(0)], tmp_path / "12:30.mp4")
    assert decode(tmp_path / "12:30.mp4").shape == (1, HEIGHT, WIDTH, 3)


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
