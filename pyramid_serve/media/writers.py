"""Frames to files.

Frames are uint8 tensors (F, H, W, 3), RGB, on any device; a video is an iterable of such chunks, of any lengths, so
that encoding runs while frames are still being made. Files are written aside and then moved: what is there is whole.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from uuid import uuid4

import imageio_ffmpeg
import torch
from PIL import Image
from torch import Tensor

from pyramid_serve.pyramid_flow.shapes import FRAMES_PER_SECOND

FFMPEG_OPTIONS = ["-hide_banner", "-loglevel", "error", "-nostats", "-y"]
# Converted and tagged as BT.709, for that is what players take video of these sizes to be.
BT709 = "setparams=range=tv:color_primaries=bt709:color_trc=bt709:colorspace=bt709"
_H264 = [
    *("-vf", f"scale=out_color_matrix=bt709:out_range=tv,format=yuv420p,{BT709}"),
    *("-c:v", "libx264"),
]
_MP4 = [*_H264, "-preset", "medium", "-crf", "18", "-movflags", "+faststart", "-f", "mp4"]
# A palette for each frame: good colours, and nothing waits for the last frame.
_PALETTES = "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1"
_GIF = ["-lavfi", _PALETTES, "-loop", "0", "-f", "gif"]


class EncodeError(RuntimeError):
    """ffmpeg failed; the message ends with what it said."""


def to_uint8(pixels: Tensor) -> Tensor:
    """Frames (F, H, W, 3) of pixels (3, F, H, W) in [-1, 1]: ``clamp(127.5 x + 127.5, 0, 255)``, truncated."""
    return (pixels.float() * 127.5 + 127.5).clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def check_video_path(path: str | os.PathLike[str]) -> Path:
    """The path, if a video can be written there; else ``ValueError`` saying why. Made for asking before the work.

    Endings: ``.mp4``, ``.gif``, ``.png`` (a single frame), and none for a folder of PNG files, new or empty.
    """
    path = Path(path)
    if path.suffix.lower() not in (".mp4", ".gif", ".png", ""):
        raise ValueError(f"{path}: must end in .mp4, .gif, .png (a single frame) or nothing (a folder of PNG files)")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path}: {path.parent} cannot be written to")
    if path.suffix and path.is_dir():
        raise ValueError(f"{path}: is a folder")
    if not path.suffix and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: there already, and no empty folder")
    return path


def write_video(
    chunks: Tensor | Iterable[Tensor], path: str | os.PathLike[str], *, fps: int = FRAMES_PER_SECOND
) -> None:
    """Write frames, or an iterable of chunks of frames, to a file or folder by its ending (``check_video_path``).

    Raises ``ValueError`` for a path or frames that cannot be written and ``EncodeError`` when ffmpeg fails; then, as
    when ``chunks`` raises or is interrupted, whatever was at ``path`` before is untouched.
    """
    path = check_video_path(path)
    chunks = [chunks] if isinstance(chunks, Tensor) else chunks
    match path.suffix.lower():
        case ".mp4" | ".gif":
            writer = Mp4Writer(path, fps=fps) if path.suffix.lower() == ".mp4" else GifWriter(path, fps=fps)
            with writer:
                for frames in chunks:
                    writer.write(frames)
        case ".png":
            _write_png(chunks, path)
        case _:
            _write_png_folder(chunks, path)


class _FileWriter:
    """Frames to a file through ffmpeg: aside while they come, moved in place on ``close``, removed on ``abort``."""

    def __init__(self, path: str | os.PathLike[str], *, arguments: list[str], fps: int) -> None:
        self.path = Path(path)
        self._aside = _beside(self.path)
        self._ffmpeg = _Ffmpeg([*arguments, f"file:{self._aside}"], fps=fps)  # else "12:30.mp4" is a protocol

    def write(self, frames: Tensor) -> None:
        """Append uint8 frames (F, H, W, 3), all of one even size."""
        self._ffmpeg.write(frames)

    def close(self) -> None:
        """Finish the file and move it in place. ``ValueError`` without a frame, ``EncodeError`` when ffmpeg failed."""
        if self._ffmpeg.is_over:
            return
        try:
            self._ffmpeg.finish()
            os.replace(self._aside, self.path)
        finally:
            self.abort()

    def abort(self) -> None:
        """Stop and leave nothing behind. Nothing after ``close``."""
        self._ffmpeg.kill()
        self._aside.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


class Mp4Writer(_FileWriter):
    """H.264 in yuv420p, the index in front (faststart). A context manager: closed on leaving, aborted on an error."""

    def __init__(self, path: str | os.PathLike[str], *, fps: int = FRAMES_PER_SECOND) -> None:
        super().__init__(path, arguments=_MP4, fps=fps)


class GifWriter(_FileWriter):
    """A looping GIF with a palette for each frame. A context manager like ``Mp4Writer``."""

    def __init__(self, path: str | os.PathLike[str], *, fps: int = FRAMES_PER_SECOND) -> None:
        super().__init__(path, arguments=_GIF, fps=fps)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid4().hex}")


def _check_frames(frames: Tensor) -> None:
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames: must be uint8 (F, H, W, 3), not {frames.dtype} {tuple(frames.shape)}")


def _pictures(chunks: Iterable[Tensor]) -> Iterator[Image.Image]:
    for frames in chunks:
        _check_frames(frames)
        for frame in frames.cpu().numpy():
            yield Image.fromarray(frame)


def _write_png(chunks: Iterable[Tensor], path: Path) -> None:
    pictures = _pictures(chunks)
    picture = next(pictures, None)
    if picture is None or next(pictures, None) is not None:
        number = "no frame" if picture is None else "more than one"
        raise ValueError(f"{path}: a .png holds one frame and there is {number}; for more, name a folder")
    aside = _beside(path)
    try:
        picture.save(aside, format="PNG")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _write_png_folder(chunks: Iterable[Tensor], path: Path) -> None:
    aside = _beside(path)
    aside.mkdir()
    try:
        index = -1
        for index, picture in enumerate(_pictures(chunks)):
            picture.save(aside / f"{index:05d}.png")
        if index < 0:
            raise ValueError(f"{path}: no frames to write")
        os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class _Ffmpeg:
    """One ffmpeg process fed with raw frames. It starts with the first frames, which give the size."""

    def __init__(self, arguments: list[str], *, fps: int) -> None:
        self._arguments = arguments
        self._fps = fps
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._size: tuple[int, int] = (0, 0)
        self.is_over = False

    def write(self, frames: Tensor) -> None:
        if self.is_over:
            raise ValueError("frames: the video is closed")
        _check_frames(frames)
        if frames.shape[0] == 0:
            return
        if self._process is None:
            self._start(height=frames.shape[1], width=frames.shape[2])
        if tuple(frames.shape[1:3]) != self._size:
            height, width = self._size
            raise ValueError(f"frames: size {frames.shape[2]}x{frames.shape[1]}, but the video is {width}x{height}")
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(frames.contiguous().cpu().numpy().data)
            self._process.stdin.flush()
        except BrokenPipeError:
            self._process.wait()
            raise EncodeError(self._failure()) from None

    def finish(self) -> None:
        """Close the input and wait for the rest."""
        if self._process is None:
            raise ValueError("frames: none were written")
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # ffmpeg has ended, which its exit status tells better
            self._process.stdin.close()
        if self._process.wait():
            raise EncodeError(self._failure())

    def kill(self) -> None:
        """End the process, if it still runs, and let go of its pipes."""
        self.is_over = True
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None and self._log is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._log.close()

    def _start(self, *, height: int, width: int) -> None:
        if height % 2 or width % 2:
            raise ValueError(f"frames: size {width}x{height}, but a video's must be even")
        self._size = (height, width)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in kill; a pipe could fill up and stall ffmpeg)
        size = ["-s", f"{width}x{height}", "-r", str(self._fps), "-probesize", "32", "-analyzeduration", "0"]
        raw_frames = ["-f", "rawvideo", "-pix_fmt", "rgb24", *size, "-i", "pipe:0"]
        self._process = subprocess.Popen(
            [imageio_ffmpeg.get_ffmpeg_exe(), *FFMPEG_OPTIONS, *raw_frames, *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
        )

    def _failure(self) -> str:
        assert self._process is not None and self._log is not None
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip()[-1000:]
        return f"ffmpeg ended with {self._process.returncode}: {said or 'it said nothing'}"
