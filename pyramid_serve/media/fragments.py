"""A video as fragments of MP4, one for each unit, each encoded on its own.

A fragment depends only on the unit's frames, its place in the video and the frame rate: whichever process encodes it,
and however often, the bytes are the same. One after the other, from unit 0 on, they are a fragmented MP4, which players
start before its end; joined, they are the finished file. Every unit begins with a key frame.

PyAV encodes and joins in this process, without a time limit, since a process of its own would cost more time than the
encoding of a small unit. It lets other threads run meanwhile, and calls from several threads share nothing.
"""

import contextlib
import io
import tempfile
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy
from av.error import FFmpegError
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from numpy.typing import NDArray

from pyramid_serve.media.ffmpeg import EncodeError

_TICKS_PER_SECOND = 24_000
_MIN_FPS, _MAX_FPS = 0.01, 1000
_HEAD_BOXES = (b"ftyp", b"moov")
_MEDIA_BOXES = (b"moof", b"mdat")
# One thread and no version strings: the same bytes on every machine. They are also the bytes that the ffmpeg program of
# imageio-ffmpeg writes, as earlier releases did, as long as both contain the same x264 (core 165): another x264 makes
# other bytes, whether it comes with another PyAV or with another program.
_H264 = {"preset": "fast", "crf": "18", "bf": "0", "threads": "1", "flags": "+bitexact"}
_BT709 = {"color_range": "tv", "colorspace": "bt709", "color_primaries": "bt709", "color_trc": "bt709"}
_ENCODER = "Lavc libx264"
"""The encoder tag that the ffmpeg program writes into the head; PyAV would write none."""
_FRAGMENTED = {"movflags": "+frag_custom+empty_moov+default_base_moof+frag_discont", "fflags": "+bitexact"}
_WHOLE = {"movflags": "+faststart", "fflags": "+bitexact"}


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
    ``EncodeError`` when ffmpeg fails. It computes in this process and cannot be interrupted.
    """
    if frames.dtype != numpy.uint8 or frames.ndim != 4 or not frames.shape[0] or frames.shape[3] != 3:
        raise ValueError(f"frames: {frames.dtype} {frames.shape}, must be uint8 (F, H, W, 3)")
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise ValueError(f"frames: size {width}x{height}, but a video's must be even")
    rate = _rate(fps)
    _, ticks_per_frame = _ticks(rate)
    encoded = _encoded(numpy.ascontiguousarray(frames), index=index, rate=rate)
    return _placed(encoded, first_frame * ticks_per_frame, with_head=index == 0)


def join_fragments(fragments: Iterable[bytes], path: Path) -> None:
    """Write the fragments of all units, in their order, as one MP4 with its index in front. Nothing is encoded again.

    Raises ``EncodeError`` when ffmpeg fails. It copies in this process and cannot be interrupted.
    """
    with tempfile.TemporaryDirectory() as folder:
        stream = Path(folder) / "stream.mp4"
        with stream.open("wb") as opened:
            opened.writelines(fragments)
        with _ffmpeg_errors():
            _copy(stream, path)


def _encoded(frames: NDArray[numpy.uint8], *, index: int, rate: Fraction) -> bytes:
    """One unit as a fragmented MP4 of its own, whose time begins at 0."""
    _, height, width, _ = frames.shape
    ticks_per_second, _ = _ticks(rate)
    options = {
        **_FRAGMENTED,
        "fragment_index": str(index + 1),
        "video_track_timescale": str(ticks_per_second),
        "movie_timescale": _movie_timescale(1 / rate),
    }
    file = io.BytesIO()
    with _ffmpeg_errors(), av.open(file, "w", format="mp4", container_options=options) as output:
        stream = output.add_stream(
            "libx264", rate, options={**_H264, **_BT709}, width=width, height=height, time_base=1 / rate
        )
        stream.metadata["encoder"] = _ENCODER
        for number, pixels in enumerate(frames):
            output.mux(stream.encode(_frame(pixels, number=number, time_base=1 / rate)))
        output.mux(stream.encode(None))
    return file.getvalue()


def _frame(pixels: NDArray[numpy.uint8], *, number: int, time_base: Fraction) -> av.VideoFrame:
    """RGB pixels (H, W, 3) as a frame in BT.709 that is shown from ``number`` to ``number + 1`` in ``time_base``."""
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        interpolation=Interpolation.BICUBIC,
        threads=1,
    )
    frame.pts, frame.duration, frame.time_base = number, 1, time_base
    return frame


def _copy(stream: Path, path: Path) -> None:
    """Copy the packets of a fragmented MP4 into an MP4 with its index in front."""
    # Without "file:", a name like "12:30.mp4" would name a protocol.
    with av.open(f"file:{stream}", "r") as source:
        videos = [video for video in source.streams.video if video.codec_context is not None]
        if not videos:
            raise EncodeError("ffmpeg failed: the fragments hold no video")
        time_base = videos[0].time_base
        assert time_base is not None  # it is None only for a stream to be written
        options = {**_WHOLE, "movie_timescale": _movie_timescale(time_base)}
        with av.open(f"file:{path}", "w", format="mp4", container_options=options) as output:
            copied = output.add_stream_from_template(videos[0])
            copied.metadata.update(videos[0].metadata)
            output.start_encoding()
            for packet in source.demux(videos[0]):
                if packet.dts is not None:  # the last packet is empty and ends the stream
                    packet.stream = copied
                    output.mux(packet)


def _movie_timescale(time_base: Fraction) -> str:
    """The ticks per second of the whole file, as the ffmpeg program chooses them: those of the video, at least 1000."""
    return str(max(1000, time_base.denominator))


@contextlib.contextmanager
def _ffmpeg_errors() -> Iterator[None]:
    """Raise ``EncodeError`` with the first line of what ffmpeg reports for every failure of it."""
    try:
        yield
    except FFmpegError as error:
        raise EncodeError(f"ffmpeg failed: {str(error).partition(chr(10))[0]}") from error


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
