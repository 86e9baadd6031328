"""Frames to files.

Frames are uint8 tensors (F, H, W, 3), RGB, on any device. A video is an iterable of such chunks of any length, so that
encoding runs while frames are still being made. A file is written beside its path and then moved there, so that the
path never holds an incomplete file.
"""

import os
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pyramid_serve.media.conversions import gif_options, new_entry, webp_options
from pyramid_serve.media.ffmpeg import STALL_TIMEOUT_S, FfmpegStream, raw_frames
from pyramid_serve.media.fragments import encode_fragment, join_fragments
from pyramid_serve.whole_files import aside_of, move_whole, replaced_whole

_ENDINGS = (".mp4", ".gif", ".webp", ".png", ".zip", "")


def check_video_path(path: str | os.PathLike[str]) -> Path:
    """The path, if a video can be written there; otherwise raises ``ValueError``. Meant to be called before the work.

    The ending is ``.mp4``, ``.gif``, ``.webp`` (animated), ``.png`` (a single frame), ``.zip`` (of PNG files), or
    nothing for a new or empty folder of PNG files.
    """
    path = Path(path)
    if path.suffix.lower() not in _ENDINGS:
        raise ValueError(
            f"{path}: must end in .mp4, .gif, .webp, .png (a single frame), .zip (of PNG files) "
            "or nothing (a folder of PNG files)"
        )
    if not path.parent.is_dir():
        raise ValueError(f"{path}: no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path}: {path.parent} cannot be written to")
    if path.suffix and path.is_dir():
        raise ValueError(f"{path}: is a folder")
    if not path.suffix and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: there already, and no empty folder")
    return path


def write_video(chunks: Tensor | Iterable[Tensor], path: str | os.PathLike[str], *, fps: float) -> None:
    """Write frames, or an iterable of chunks of frames, to a file or folder by its ending (``check_video_path``).

    fps: frames per second. The bytes of an MP4 depend on how its frames are divided into chunks; those of units are the
    bytes of a server. Raises ``ValueError`` for a path or frames that cannot be written and ``EncodeError`` when ffmpeg
    fails. After an error, also one of ``chunks``, whatever was at ``path`` before is unchanged.
    """
    path = check_video_path(path)
    chunks = [chunks] if isinstance(chunks, Tensor) else chunks
    match path.suffix.lower():
        case ".mp4" | ".gif" | ".webp":
            writer = Mp4Writer(path, fps=fps) if path.suffix.lower() == ".mp4" else AnimationWriter(path, fps=fps)
            with writer:
                for frames in chunks:
                    writer.write(frames)
        case ".png":
            _write_png(chunks, path)
        case ".zip":
            _write_png_zip(chunks, path)
        case _:
            _write_png_folder(chunks, path)


class _FileWriter(ABC):
    """Frames to a file that is written beside ``path``, moved there by ``close`` and removed by ``abort``.

    As a context manager it is closed at the end of the block, or aborted after an error.
    """

    def __init__(self, path: str | os.PathLike[str], *, fps: float) -> None:
        self.path = Path(path)
        self._aside = aside_of(self.path)
        self._fps = fps
        self._size: tuple[int, int] | None = None
        self._is_over = False

    def write(self, frames: Tensor) -> None:
        """Append uint8 frames (F, H, W, 3), all of one even size.

        Raises ``ValueError`` for other frames or after the end, ``EncodeError`` when ffmpeg fails, also for frames that
        were written before.
        """
        if self._is_over:
            raise ValueError("frames: the video is closed")
        _check_frames(frames)
        if frames.shape[0] == 0:
            return
        height, width = frames.shape[1:3]
        if height % 2 or width % 2:
            raise ValueError(f"frames: size {width}x{height}, but a video's must be even")
        if self._size is not None and (height, width) != self._size:
            raise ValueError(f"frames: size {width}x{height}, but the video is {self._size[1]}x{self._size[0]}")
        self._size = (height, width)
        self._encode(frames.contiguous().cpu().numpy())

    def close(self) -> None:
        """Finish the file and move it to ``path``. Does nothing after ``close`` or ``abort``.

        Raises ``ValueError`` without a frame, ``EncodeError`` when ffmpeg fails.
        """
        if self._is_over:
            return
        try:
            if self._size is None:
                raise ValueError("frames: none were written")
            self._finish()
            move_whole(self._aside, self.path)
        finally:
            self.abort()

    def abort(self) -> None:
        """Stop encoding and remove the unfinished file. After ``close`` there is nothing to remove."""
        self._is_over = True
        self._stop()
        self._aside.unlink(missing_ok=True)

    @abstractmethod
    def _encode(self, frames: NDArray[numpy.uint8]) -> None:
        """Begin to encode frames, the next of the video."""

    @abstractmethod
    def _finish(self) -> None:
        """Write the whole file aside."""

    @abstractmethod
    def _stop(self) -> None:
        """Release what encoding takes. It may be over already, or not have begun."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


class Mp4Writer(_FileWriter):
    """H.264 in yuv420p, with the index in front (faststart): the file that a server makes of the same chunks.

    Each chunk is a fragment, see :mod:`fragments`, which a thread encodes while the next frames are made.
    """

    def __init__(self, path: str | os.PathLike[str], *, fps: float) -> None:
        super().__init__(path, fps=fps)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._encoding: Future[bytes] | None = None
        self._fragments: list[bytes] = []
        self._num_frames = 0

    def _encode(self, frames: NDArray[numpy.uint8]) -> None:
        self._take_encoded()
        place = {"index": len(self._fragments), "first_frame": self._num_frames}
        own = frames.copy()  # the caller may reuse its memory for the next frames
        self._encoding = self._thread.submit(encode_fragment, own, fps=self._fps, **place)
        self._num_frames += frames.shape[0]

    def _take_encoded(self) -> None:
        if self._encoding is not None:
            self._fragments.append(self._encoding.result())
            self._encoding = None

    def _finish(self) -> None:
        self._take_encoded()
        join_fragments(self._fragments, self._aside)

    def _stop(self) -> None:
        self._thread.shutdown(cancel_futures=True)


class AnimationWriter(_FileWriter):
    """A looping GIF or WebP, by the path's ending. Its ffmpeg starts with the first frames, for their size.

    stall_timeout_s: an ffmpeg that takes nothing for so long is killed.
    """

    def __init__(self, path: str | os.PathLike[str], *, fps: float, stall_timeout_s: float = STALL_TIMEOUT_S) -> None:
        super().__init__(path, fps=fps)
        self._stall_timeout_s = stall_timeout_s
        self._ffmpeg: FfmpegStream | None = None

    def _encode(self, frames: NDArray[numpy.uint8]) -> None:
        if self._ffmpeg is None:
            raw = raw_frames(width=frames.shape[2], height=frames.shape[1], fps=self._fps)
            at_once = ("-probesize", "32", "-analyzeduration", "0")
            output = f"file:{self._aside}"  # without "file:", a name like "12:30.gif" would name a protocol
            is_gif = self.path.suffix.lower() == ".gif"
            options = gif_options(self._fps) if is_gif else webp_options()
            arguments = [*raw, *at_once, "-i", "pipe:0", *options, output]
            self._ffmpeg = FfmpegStream(arguments, stall_timeout_s=self._stall_timeout_s)
        self._ffmpeg.write(frames.data)

    def _finish(self) -> None:
        assert self._ffmpeg is not None
        self._ffmpeg.finish()

    def _stop(self) -> None:
        if self._ffmpeg is not None:
            self._ffmpeg.kill()


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
    with replaced_whole(path) as aside:
        picture.save(aside, format="PNG")


def _write_png_folder(chunks: Iterable[Tensor], path: Path) -> None:
    aside = aside_of(path)
    aside.mkdir()
    try:
        index = -1
        for index, picture in enumerate(_pictures(chunks)):
            picture.save(aside / f"{index:05d}.png")
        if index < 0:
            raise ValueError(f"{path}: no frames to write")
        move_whole(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_png_zip(chunks: Iterable[Tensor], path: Path) -> None:
    with replaced_whole(path) as aside:
        with zipfile.ZipFile(aside, "w") as packed:
            index = -1
            for index, picture in enumerate(_pictures(chunks)):
                with new_entry(packed, f"{index:05d}.png") as entry:
                    picture.save(entry, format="PNG")
        if index < 0:
            raise ValueError(f"{path}: no frames to write")
