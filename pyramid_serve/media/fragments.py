"""A video as fragments of MP4, one for each unit, each encoded on its own.

A fragment depends only on the unit's frames, its place in the video and the frame rate: whichever process encodes it,
and however often, the bytes are the same. One after the other, from unit 0 on, they are a fragmented MP4, which players
start before its end; joined, they are the finished file. Every unit begins with a key frame.
"""

import tempfile
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy
from numpy.typing import NDArray

from pyramid_serve.media.ffmpeg import H264, raw_frames, run_ffmpeg

ENCODE_TIMEOUT_S = 300.0
"""A unit takes a second or two; the rest is for a machine under load."""
JOIN_TIMEOUT_S = 600.0
"""Copying the largest file takes seconds; the rest is for a slow or busy disk."""

_TICKS_PER_SECOND = 24_000
_MIN_FPS, _MAX_FPS = 0.01, 1000
_HEAD_BOXES = (b"ftyp", b"moov")
_MEDIA_BOXES = (b"moof", b"mdat")
# One thread and no version strings: the same bytes on every machine.
_ENCODE = (*H264, "-preset", "fast", "-crf", "18", "-bf", "0", "-threads", "1", "-bitexact")
_FRAGMENTED = ("-movflags", "+frag_custom+empty_moov+default_base_moof+frag_discont", "-f", "mp4", "pipe:1")


class _Box(NamedTuple):
    """One box of an MP4 file: its type, and the offsets of its start, of its content and of its end."""

    kind: bytes
    start: int
    content: int
    end: int


def encode_fragment(frames: NDArray[numpy.uint8], *, index: int, first_frame: int, fps: float) -> bytes:
    """The fragment of one unit from its frames, uint8 (F, H, W, 3). That of unit 0 also begins the file.

    index: the number of the unit, from 0. first_frame: the number of its first frame in the video, from 0. fps: frames
    per second, the same for all units. Raises ``ValueError`` for frames of another type, shape or an odd size, and
    ``EncodeError`` when ffmpeg fails.
    """
    if frames.dtype != numpy.uint8 or frames.ndim != 4 or not frames.shape[0] or frames.shape[3] != 3:
        raise ValueError(f"frames: {frames.dtype} {frames.shape}, must be uint8 (F, H, W, 3)")
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise ValueError(f"frames: size {width}x{height}, but a video's must be even")
    rate = _rate(fps)
    ticks_per_second, ticks_per_frame = _ticks(rate)
    encoded = run_ffmpeg(
        [
            *raw_frames(width=width, height=height, fps=rate),
            *("-i", "pipe:0", "-fragment_index", str(index + 1)),
            *_ENCODE,
            *("-video_track_timescale", str(ticks_per_second), *_FRAGMENTED),
        ],
        stdin=numpy.ascontiguousarray(frames).tobytes(),
        timeout_s=ENCODE_TIMEOUT_S,
    )
    return _placed(encoded, first_frame * ticks_per_frame, with_head=index == 0)


def join_fragments(fragments: Iterable[bytes], path: Path) -> None:
    """Write the fragments of all units, in their order, as one MP4 with its index in front. Nothing is encoded again.

    Raises ``EncodeError`` when ffmpeg fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        stream = Path(folder) / "stream.mp4"
        with stream.open("wb") as opened:
            opened.writelines(fragments)
        copied = ("-c", "copy", "-bitexact", "-movflags", "+faststart", "-f", "mp4", f"file:{path}")
        run_ffmpeg(["-i", f"file:{stream}", *copied], timeout_s=JOIN_TIMEOUT_S)


def _rate(fps: float) -> Fraction:
    """Frames per second as an exact fraction; 29.97002997 becomes 30000/1001."""
    if not _MIN_FPS <= fps <= _MAX_FPS:
        raise ValueError(f"fps={fps!r}: must be from {_MIN_FPS} to {_MAX_FPS}")
    return Fraction(fps).limit_denominator(1001)


def _ticks(rate: Fraction) -> tuple[int, int]:
    """(ticks per second, ticks per frame), both whole numbers, so that the time of every frame is exact."""
    ticks_per_frame = Fraction(_TICKS_PER_SECOND) / rate
    if ticks_per_frame.denominator == 1:
        return _TICKS_PER_SECOND, int(ticks_per_frame)
    return rate.numerator, rate.denominator


def _placed(encoded: bytes, start: int, *, with_head: bool) -> bytes:
    """The boxes that are needed of a unit that ffmpeg encoded alone, with the decode time set to ``start`` ticks."""
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
