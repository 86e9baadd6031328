"""A video as fragments of MP4, one for each unit and each made alone.

A fragment depends on its unit's frames and number only: no matter which process makes it, or how often, it is the same
bytes. One after the other, from unit 0 on, they are a fragmented MP4 that players start before the end; joined, the
finished file. Every unit begins with a key frame.
"""

import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import imageio_ffmpeg
import numpy
from numpy.typing import NDArray

from pyramid_serve.media.writers import BT709, FFMPEG_OPTIONS, EncodeError
from pyramid_serve.pyramid_flow.shapes import FRAMES_PER_SECOND, num_frames_of

_TICKS_PER_SECOND = 24_000
_HEAD_BOXES = (b"ftyp", b"moov")
_MEDIA_BOXES = (b"moof", b"mdat")
_ENCODE = (
    *("-vf", f"scale=out_color_matrix=bt709:out_range=tv,format=yuv420p,{BT709}"),
    *("-c:v", "libx264", "-preset", "fast", "-crf", "18", "-bf", "0"),
    # One thread and no version strings: the same bytes on every machine.
    *("-threads", "1", "-bitexact", "-video_track_timescale", str(_TICKS_PER_SECOND)),
    *("-movflags", "+frag_custom+empty_moov+default_base_moof+frag_discont", "-f", "mp4", "pipe:1"),
)


class _Box(NamedTuple):
    """One box of an MP4 file: its type, and where it and its content begin and end."""

    kind: bytes
    start: int
    content: int
    end: int


def encode_fragment(frames: NDArray[numpy.uint8], unit: int) -> bytes:
    """The fragment of a unit from its frames, uint8 (1 or 8, H, W, 3). That of unit 0 also begins the file.

    Raises ``ValueError`` for frames of another kind, ``EncodeError`` when ffmpeg fails.
    """
    num_frames = 1 if unit == 0 else num_frames_of(2) - num_frames_of(1)
    if frames.dtype != numpy.uint8 or frames.ndim != 4 or (frames.shape[0], frames.shape[3]) != (num_frames, 3):
        raise ValueError(f"frames: {frames.dtype} {frames.shape}, must be uint8 ({num_frames}, H, W, 3) at unit {unit}")
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise ValueError(f"frames: size {width}x{height}, but a video's must be even")
    raw_frames = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(FRAMES_PER_SECOND))
    encoded = _run_ffmpeg(
        [*raw_frames, "-i", "pipe:0", "-fragment_index", str(unit + 1), *_ENCODE],
        numpy.ascontiguousarray(frames).tobytes(),
    )
    first_frame = 0 if unit == 0 else num_frames_of(unit)
    return _placed(encoded, first_frame * _TICKS_PER_SECOND // FRAMES_PER_SECOND, with_head=unit == 0)


def join_fragments(fragments: Iterable[bytes], path: Path) -> None:
    """Write the fragments of all units, in their order, as one MP4 with its index in front. Nothing is encoded again.

    Raises ``EncodeError`` when ffmpeg fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        stream = Path(folder) / "stream.mp4"
        with stream.open("wb") as opened:
            opened.writelines(fragments)
        _run_ffmpeg(
            ["-i", f"file:{stream}", "-c", "copy", "-bitexact", "-movflags", "+faststart", "-f", "mp4", f"file:{path}"]
        )


def _placed(encoded: bytes, start: int, *, with_head: bool) -> bytes:
    """What ffmpeg made of a unit alone, with its decode time set to ``start`` ticks and what is not needed left out."""
    kept = [*_HEAD_BOXES, *_MEDIA_BOXES] if with_head else [*_MEDIA_BOXES]
    fragment = b"".join(encoded[box.start : box.end] for box in _boxes(encoded) if box.kind in kept)
    (time,) = (
        time
        for moof in _boxes(fragment)
        if moof.kind == b"moof"
        for track in _boxes(fragment, moof.content, moof.end)
        if track.kind == b"traf"
        for time in _boxes(fragment, track.content, track.end)
        if time.kind == b"tfdt"
    )
    # Version and flags, then the time: 64 bits in version 1, which ffmpeg writes.
    assert fragment[time.content] == 1
    return fragment[: time.content + 4] + start.to_bytes(8) + fragment[time.end :]


def _boxes(content: bytes, start: int = 0, end: int | None = None) -> Iterator[_Box]:
    end = len(content) if end is None else end
    while start < end:
        size = int.from_bytes(content[start : start + 4])
        yield _Box(content[start + 4 : start + 8], start, start + 8, start + size)
        start += size


def _run_ffmpeg(arguments: list[str], stdin: bytes = b"") -> bytes:
    finished = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), *FFMPEG_OPTIONS, *arguments], input=stdin, capture_output=True, check=False
    )
    if finished.returncode:
        said = finished.stderr.decode(errors="replace").strip()[-1000:]
        raise EncodeError(f"ffmpeg ended with {finished.returncode}: {said or 'it said nothing'}")
    return finished.stdout
