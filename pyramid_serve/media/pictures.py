"""Pictures in: a file of any common format, a PIL image or an array becomes 8-bit sRGB.

:func:`read_picture` is the only way in, so that the library, the command line and the server get the same pixels from
the same picture. Metadata is read apart from the pixels: a broken or oversized part of it never costs the picture.
"""

import contextlib
import os
import stat
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard, Union

import numpy
from PIL import Image

from pyramid_serve.errors import InputError
from pyramid_serve.media.picture_errors import RefusedError, check_num_pixels, check_size
from pyramid_serve.media.picture_files import PICTURE_FORMATS, format_of, open_picture
from pyramid_serve.media.pixels import scaled_floats, to_srgb, upright_size

if TYPE_CHECKING:
    from torch import Tensor

MAX_PICTURE_PIXELS = 64 * 1024 * 1024

PictureSource = Union[str, os.PathLike[str], bytes, bytearray, memoryview, Image.Image, numpy.ndarray, "Tensor"]
"""What a picture can be given as: the path of a file, its bytes, a PIL image, or an array.

Arrays are (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), the fourth channel opacity, as uint8 from 0 to 255 or as floats
from 0 to 1.
"""

_MAX_FILE_BYTES = 2**30
"""The size of a picture with the most pixels in the largest format, uncompressed with 16 bytes per pixel."""

_ONE_AT_A_TIME = threading.Lock()
"""Warning filters are process-wide, so only one thread may change them at a time. This also bounds the memory used."""


def read_picture(
    source: PictureSource, *, max_pixels: int | None = MAX_PICTURE_PIXELS, name: str = "picture"
) -> Image.Image:
    """A picture as 8-bit sRGB (mode RGB, nothing in ``info``): upright by its EXIF, transparency over white.

    If there are several frames or pages, the first is read. Colours are converted from the picture's colour profile,
    unless that is sRGB, broken, or of another colour space than the pixels. 16-bit samples keep their upper 8 bits;
    32-bit integers are scaled from the smallest of 8, 16 and 32 bits that holds them all; floats must be from 0 to 1.

    source: see ``PictureSource``; it is not changed. max_pixels: checked before the file is unpacked; None for no
    limit. Raises ``InputError``, whose message begins with ``name``, for anything that cannot be read as a picture.
    """
    label = name
    try:
        match source:
            case Image.Image():
                return _from_image(source, max_pixels)
            case numpy.ndarray():
                return _from_array(source, max_pixels)
            case bytes() | bytearray() | memoryview():
                return _from_bytes(bytes(source), max_pixels)
            case str() | os.PathLike():
                path = os.fsdecode(source)
                label = f"{name}={path if path.isprintable() else repr(path)}"[:200]
                return _from_bytes(_read_file(Path(path)), max_pixels)
            case _ if _is_tensor(source):
                from pyramid_serve.media.tensors import (
                    array_of,
                )  # it imports torch, which whoever has a tensor has done

                return _from_array(array_of(source), max_pixels)
            case _:
                raise RefusedError(
                    "must be a path, the bytes of a picture file, a PIL image, a numpy array or a torch tensor, not "
                    f"{type(source).__name__}"
                )
    except RefusedError as refused:
        raise InputError(f"{label}: {refused}") from None


def picture_size(content: bytes, *, name: str = "picture") -> tuple[int, int]:
    """(width, height) of the picture that ``read_picture`` makes of a file, without unpacking it.

    Raises ``InputError``, whose message begins with ``name``, for a file that is not a picture.
    """
    try:
        with _refusing("it is damaged, or of a kind that cannot be read here"), _quietly():
            image = open_picture(content, _kind_of(content))
            check_size(image, None)
            return upright_size(image)
    except RefusedError as refused:
        raise InputError(f"{name}: {refused}") from None


def covering_size(image: Image.Image, *, height: int, width: int, name: str = "picture") -> tuple[int, int]:
    """(width, height) to which ``fitted`` scales a picture before it crops it to ``height`` x ``width``.

    Raises ``InputError``, whose message begins with ``name``, for a picture so narrow that the scaled one would fill
    the memory.
    """
    scale = max(height / image.height, width / image.width)
    size = (round(image.width * scale), round(image.height * scale))
    if size[0] * size[1] > MAX_PICTURE_PIXELS:
        raise InputError(f"{name}: {image.width}x{image.height} is too long and narrow for {width}x{height}")
    return size


def fitted(image: Image.Image, *, height: int, width: int, name: str = "picture") -> Image.Image:
    """A picture in RGB, brought to ``height`` x ``width`` pixels as the published demo does.

    It is scaled (Lanczos), keeping its aspect, until it just covers the size, and then cropped around its centre. A
    picture that has the size already is not changed. Raises ``ValueError`` as ``covering_size`` does.
    """
    size = covering_size(image, height=height, width=width, name=name)
    covering = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    left, top = round((covering.width - width) / 2), round((covering.height - height) / 2)
    return covering.crop((left, top, left + width, top + height))


def _read_file(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise RefusedError("no such file")
        if status.st_size > _MAX_FILE_BYTES:
            raise RefusedError(f"{status.st_size} bytes, at most {_MAX_FILE_BYTES}")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the path
        raise RefusedError("no such file") from None
    except OSError as error:
        raise RefusedError(f"cannot be read: {error.strerror}") from None


def _from_bytes(content: bytes, max_pixels: int | None) -> Image.Image:
    kind = _kind_of(content)
    with _refusing(f"its {kind} data is damaged, or of a kind that cannot be read here"), _quietly():
        image = open_picture(content, kind)
        check_size(image, max_pixels)
        return to_srgb(image, max_pixels)


def _kind_of(content: bytes) -> str:
    kind = format_of(content)
    if kind is None:
        why = "it is empty" if not content else f"it is none of {', '.join(PICTURE_FORMATS)}"
        raise RefusedError(f"not a readable image: {why}")
    return kind


def _from_image(image: Image.Image, max_pixels: int | None) -> Image.Image:
    check_size(image, max_pixels)
    with _refusing("its pixels cannot be loaded: its file is damaged, or was closed"), _quietly():
        return to_srgb(image, max_pixels)


def _from_array(values: numpy.ndarray, max_pixels: int | None) -> Image.Image:
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (1, 3, 4)):
        raise RefusedError(f"shape {values.shape}; an array must be (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    height, width = values.shape[:2]
    check_num_pixels(width, height, max_pixels)
    if numpy.issubdtype(values.dtype, numpy.floating):
        values = scaled_floats(values)
    elif values.dtype != numpy.uint8:
        raise RefusedError(f"dtype {values.dtype}; an array must be uint8 (0 to 255) or floating point (0 to 1)")
    squeezed = values[:, :, 0] if values.ndim == 3 and values.shape[2] == 1 else values
    return to_srgb(Image.fromarray(numpy.ascontiguousarray(squeezed)), max_pixels)


def _is_tensor(source: object) -> "TypeGuard[Tensor]":
    """Whether this is a tensor, found out without importing torch: where nobody has imported it, there is none."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.Tensor)


@contextlib.contextmanager
def _refusing(otherwise: str) -> Iterator[None]:
    """Turn every error of the block into ``RefusedError``; ``otherwise`` is the reason if no better one is known."""
    try:
        yield
    except RefusedError:
        raise
    except Exception as error:  # broken files make the decoders raise almost anything
        why = otherwise
        if isinstance(error, MemoryError):
            why = "it needs more memory than there is"
        elif isinstance(error, Image.DecompressionBombError):
            why = "it has too many pixels"
        elif isinstance(error, EOFError) or "truncated" in str(error).lower():
            why = "the file ends too early"
        raise RefusedError(f"not a readable image: {why}") from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Suppress warnings of the decoders, which are about metadata that no pixel depends on."""
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(PIL|pillow_heif)\b")
        yield
