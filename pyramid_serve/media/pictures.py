"""Pictures in: a file of any common format, a PIL image or an array becomes 8-bit sRGB, and then a tensor.

There is one way in, :func:`read_picture`, so that the same picture gives the same pixels to the library, the command
line and the server. Metadata is read apart from the pixels: what is broken or oversized in it never costs the picture.
"""

import contextlib
import io
import os
import re
import stat
import threading
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageCms,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from torch import Tensor

PICTURE_FORMATS = ("PNG", "JPEG", "WebP", "GIF", "BMP", "TIFF", "AVIF", "HEIC")
MAX_PICTURE_PIXELS = 64 * 1024 * 1024

PictureSource = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | numpy.ndarray | Tensor
"""What a picture can be given as: the path of a file, its bytes, a PIL image, or an array.

Arrays are (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), the fourth channel opacity, as uint8 from 0 to 255 or as floats
from 0 to 1.
"""

_MAX_FILE_BYTES = 2**30
"""What the most pixels need uncompressed in the largest format that is read: 16 bytes each."""
_MAX_PROFILE_BYTES = 16 * 2**20
_MAX_TEXT_BYTES = 2**20
_MAX_JPEG_SCANS = 100
"""A progressive JPEG has about ten. Each one, however short, costs a pass over the whole picture."""
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
"""The start of a segment; the others are samples of 255 and restarts within a scan."""

_ONE_AT_A_TIME = threading.Lock()
"""Warnings are process-wide, so they are silenced by one thread at a time; it also bounds the memory of pictures."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class _RefusedError(Exception):
    """Why a picture is not taken, for the user to read, without the name of the field."""


def read_picture(
    source: PictureSource, *, max_pixels: int | None = MAX_PICTURE_PIXELS, name: str = "picture"
) -> Image.Image:
    """A picture as 8-bit sRGB (mode RGB, nothing in ``info``): upright by its EXIF, transparency over white.

    Of several frames or pages it is the first. Colours are converted from the picture's colour profile, unless that is
    sRGB, broken, or of another colour space than the pixels. 16-bit samples keep their upper 8 bits; 32-bit integers
    are scaled from the smallest of 8, 16 and 32 bits that holds them all; floats must be from 0 to 1.

    source: see ``PictureSource``; it is not changed. max_pixels: checked before the file is unpacked, None for no
    limit. Raises ``ValueError``, which begins with ``name``, for whatever cannot be read as a picture.
    """
    label = name
    try:
        match source:
            case Image.Image():
                return _from_image(source, max_pixels)
            case numpy.ndarray():
                return _from_array(source, max_pixels)
            case Tensor():
                return _from_array(_array_of(source), max_pixels)
            case bytes() | bytearray() | memoryview():
                return _from_bytes(bytes(source), max_pixels)
            case str() | os.PathLike():
                path = os.fsdecode(source)
                label = f"{name}={path if path.isprintable() else repr(path)}"[:200]
                return _from_bytes(_read_file(Path(path)), max_pixels)
            case _:
                raise _RefusedError(
                    "must be a path, the bytes of a picture file, a PIL image, a numpy array or a torch tensor, not "
                    f"{type(source).__name__}"
                )
    except _RefusedError as refused:
        raise ValueError(f"{label}: {refused}") from None


def fit_picture(image: Image.Image, *, height: int, width: int, name: str = "picture") -> Tensor:
    """A picture brought to ``height`` x ``width`` pixels as the published demo does: (3, H, W) in [-1, 1], float32.

    Scaled with its aspect kept until it just covers the size (Lanczos), then cut from its centre. A picture of that
    size comes through unchanged. ``ValueError``, which begins with ``name``, for one so narrow that what is cut off
    would fill the memory.
    """
    size = covering_size(image, height=height, width=width, name=name)
    covering = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    left, top = round((covering.width - width) / 2), round((covering.height - height) / 2)
    cropped = covering.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(numpy.array(cropped)).permute(2, 0, 1)
    return (pixels.float() / 127.5 - 1).contiguous()


def covering_size(image: Image.Image, *, height: int, width: int, name: str = "picture") -> tuple[int, int]:
    """(width, height) to which ``fit_picture`` scales a picture before it is cut; raises as that does."""
    scale = max(height / image.height, width / image.width)
    size = (round(image.width * scale), round(image.height * scale))
    if size[0] * size[1] > MAX_PICTURE_PIXELS:
        raise ValueError(f"{name}: {image.width}x{image.height} is too long and narrow for {width}x{height}")
    return size


# --- sources --------------------------------------------------------------------------------------------------------


def _read_file(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _RefusedError("no such file")
        if status.st_size > _MAX_FILE_BYTES:
            raise _RefusedError(f"{status.st_size} bytes, at most {_MAX_FILE_BYTES}")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the path
        raise _RefusedError("no such file") from None
    except OSError as error:
        raise _RefusedError(f"cannot be read: {error.strerror}") from None


def _from_bytes(content: bytes, max_pixels: int | None) -> Image.Image:
    kind = _format_of(content)
    if kind is None:
        why = "it is empty" if not content else f"it is none of {', '.join(PICTURE_FORMATS)}"
        raise _RefusedError(f"not a readable image: {why}")
    with _refusing(f"its {kind} data is damaged, or of a kind that cannot be read here"), _quietly():
        image = _open(content, kind)
        _check_size(image, max_pixels)
        return _to_srgb(image, max_pixels)


def _from_image(image: Image.Image, max_pixels: int | None) -> Image.Image:
    _check_size(image, max_pixels)
    with _refusing("its pixels cannot be loaded: its file is damaged, or was closed"), _quietly():
        return _to_srgb(image, max_pixels)


def _array_of(tensor: Tensor) -> numpy.ndarray:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise _RefusedError("must be a dense tensor that holds values")
    values = tensor.detach().cpu()
    return (values.float() if values.is_floating_point() else values).numpy()


def _from_array(values: numpy.ndarray, max_pixels: int | None) -> Image.Image:
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (1, 3, 4)):
        raise _RefusedError(f"shape {values.shape}; an array must be (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    height, width = values.shape[:2]
    _check_num_pixels(width, height, max_pixels)
    if numpy.issubdtype(values.dtype, numpy.floating):
        values = _scaled_floats(values)
    elif values.dtype != numpy.uint8:
        raise _RefusedError(f"dtype {values.dtype}; an array must be uint8 (0 to 255) or floating point (0 to 1)")
    squeezed = values[:, :, 0] if values.ndim == 3 and values.shape[2] == 1 else values
    return _to_srgb(Image.fromarray(numpy.ascontiguousarray(squeezed)), max_pixels)


def _scaled_floats(values: numpy.ndarray) -> numpy.ndarray:
    """8-bit values of floats from 0 to 1."""
    if not numpy.isfinite(values).all():
        raise _RefusedError("has values that are NaN or infinite; floating-point values must be from 0 to 1")
    least, most = float(values.min()), float(values.max())
    if least < 0 or most > 1:
        raise _RefusedError(f"has values from {least:g} to {most:g}; floating-point values must be from 0 to 1")
    return numpy.rint(values * numpy.float32(255)).astype(numpy.uint8)


def _check_size(image: Image.Image, max_pixels: int | None) -> None:
    _check_num_pixels(image.width, image.height, max_pixels)


def _check_num_pixels(width: int, height: int, max_pixels: int | None) -> None:
    if width < 1 or height < 1:
        raise _RefusedError(f"not a readable image: {width}x{height} has no pixels")
    if max_pixels is not None and width * height > max_pixels:
        raise _RefusedError(f"{width}x{height} is more than {max_pixels} pixels")


@contextlib.contextmanager
def _refusing(otherwise: str) -> Iterator[None]:
    """Refuse in plain words whatever fails; ``otherwise`` says what it is when nothing better is known."""
    try:
        yield
    except _RefusedError:
        raise
    except Exception as error:  # broken files make the decoders raise nearly everything that there is
        why = otherwise
        if isinstance(error, MemoryError):
            why = "it needs more memory than there is"
        elif isinstance(error, Image.DecompressionBombError):
            why = "it has too many pixels"
        elif isinstance(error, EOFError) or "truncated" in str(error).lower():
            why = "the file ends too early"
        raise _RefusedError(f"not a readable image: {why}") from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without warnings of the decoders, which are about metadata that no pixel depends on."""
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(PIL|pillow_heif)\b")
        yield


# --- files ----------------------------------------------------------------------------------------------------------


def _format_of(content: bytes) -> str | None:
    """One of ``PICTURE_FORMATS``, by how a file begins."""
    if content[4:8] == b"ftyp":
        brands = content[8 : min(int.from_bytes(content[:4]), 256)]
        known = {brands[i : i + 4] for i in range(0, len(brands), 4)}
        if known & {b"avif", b"avis"}:
            return "AVIF"
        return "HEIC" if known & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"} else None
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WebP"
    for start, kind in (
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"\xff\xd8\xff", "JPEG"),
        (b"GIF8", "GIF"),
        (b"BM", "BMP"),
        (b"II*\0", "TIFF"),
        (b"MM\0*", "TIFF"),
        (b"II+\0", "TIFF"),
        (b"MM\0+", "TIFF"),
    ):
        if content.startswith(start):
            return kind
    return None


def _open(content: bytes, kind: str) -> ImageFile.ImageFile:
    """The image of a file, its size known and its pixels not yet unpacked.

    The decoders are called themselves: ``Image.open`` would add the process-wide limit of pixels and registry to ours.
    """
    match kind:
        case "PNG":
            return _open_png(content)
        case "JPEG":
            if _has_more_scans(content, _MAX_JPEG_SCANS):
                raise _RefusedError(f"not a readable image: its JPEG data has more than {_MAX_JPEG_SCANS} scans")
            return JpegImagePlugin.JpegImageFile(io.BytesIO(content))  # also the first picture of a phone's MPO
        case "WebP":
            return WebPImagePlugin.WebPImageFile(io.BytesIO(content))
        case "GIF":
            return GifImagePlugin.GifImageFile(io.BytesIO(content))
        case "BMP":
            return BmpImagePlugin.BmpImageFile(io.BytesIO(content))
        case "TIFF":
            return _Tiff(io.BytesIO(content))
        case "AVIF":
            return AvifImagePlugin.AvifImageFile(io.BytesIO(content))
        case _:
            from pillow_heif import HeifImageFile  # loads a library that only such pictures need

            return HeifImageFile(io.BytesIO(content))


def _has_more_scans(content: bytes, most: int) -> bool:
    """Whether a JPEG is sent in more than ``most`` scans, without those of the thumbnails in its metadata."""
    num_scans, at = 0, 2
    while (found := _JPEG_MARKER.search(content, at)) is not None and found[1] != b"\xd9":
        at = found.end()
        num_scans += found[1] == b"\xda"
        if num_scans > most:
            return True
        at += int.from_bytes(content[at : at + 2])
    return False


class _Tiff(TiffImagePlugin.TiffImageFile):
    """A TIFF whose metadata is not read along with its pixels, where an error in it would cost the picture."""

    def load_end(self) -> None:
        """Leave the picture as it lies; ``_orientation`` asks the tag itself."""


def _open_png(content: bytes) -> ImageFile.ImageFile:
    """A PNG without the chunks that say nothing of its pixels, but with what is needed of its metadata in ``info``.

    Texts may be longer than Pillow takes (a workflow, as picture generators write them, is megabytes), and none of
    their checksums matters.
    """
    kept, info = [content[:8]], dict[str, bytes | str | None]()
    view, at = memoryview(content), 8
    while at + 8 <= len(content):
        length, kind = int.from_bytes(view[at : at + 4]), bytes(view[at + 4 : at + 8])
        end = at + 12 + length
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(bytes(view[at:end]))
        else:
            _read_png_metadata(info, kind, view[at + 8 : at + 8 + length])
        if kind == b"IEND":
            break
        at = end
    image = PngImagePlugin.PngImageFile(io.BytesIO(b"".join(kept)))
    image.info.update({name: value for name, value in info.items() if value is not None})
    return image


def _read_png_metadata(info: dict[str, bytes | str | None], kind: bytes, body: memoryview) -> None:
    """Put the colour profile, EXIF, and texts that hold EXIF or XMP where Pillow has them, None for a broken one.

    Only the first of each is unpacked, as there may be thousands, each of them megabytes.
    """
    if kind == b"eXIf":
        info.setdefault("exif", b"Exif\0\0" + body)
    elif kind == b"iCCP" and "icc_profile" not in info:
        _, _, rest = bytes(body).partition(b"\0")
        info["icc_profile"] = _inflate(rest[1:], _MAX_PROFILE_BYTES)
    elif kind in (b"tEXt", b"zTXt", b"iTXt"):
        keyword = bytes(body[:80]).partition(b"\0")[0].decode("latin-1")
        if keyword in ("XML:com.adobe.xmp", "Raw profile type exif") and keyword not in info:
            text = _png_text(kind, bytes(body[len(keyword) + 1 :]))
            info[keyword] = text.decode("utf-8", errors="replace") if text and len(text) <= _MAX_TEXT_BYTES else None


def _png_text(kind: bytes, body: bytes) -> bytes | None:
    """The text of a chunk's body after its keyword, None where it is broken or too long."""
    if kind == b"tEXt":
        return body
    if kind == b"zTXt":
        return _inflate(body[1:], _MAX_TEXT_BYTES)
    parts = body[2:].split(b"\0", 2)  # language, keyword in that language, text
    if len(parts) < 3:
        return None
    return _inflate(parts[2], _MAX_TEXT_BYTES) if body[0] else parts[2]


def _inflate(compressed: bytes, most: int) -> bytes | None:
    """What was compressed, None where it is broken or more than ``most`` bytes."""
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(compressed, most)
    except zlib.error:
        return None
    return content if stream.eof else None


# --- pixels ---------------------------------------------------------------------------------------------------------


def _to_srgb(image: Image.Image, max_pixels: int | None) -> Image.Image:
    image = _with_scaled_key(image)
    image.load()
    _check_size(image, max_pixels)  # again: some formats tell their true size only now
    profile, orientation = image.info.get("icc_profile"), _orientation(image)
    colours, alpha = _split(_with_8_bits(image))
    picture = _converted(colours, profile)
    if alpha is not None:
        picture = picture.convert("RGBA")
        picture.putalpha(alpha)
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    if orientation in _UPRIGHT:
        picture = picture.transpose(_UPRIGHT[orientation])
    picture.info = {}
    return picture


def _with_scaled_key(image: Image.Image) -> Image.Image:
    """A PNG with its transparent colour in the samples that Pillow makes of it; Pillow leaves it as it is stored."""
    if not isinstance(image, PngImagePlugin.PngImageFile) or not image.tile:
        return image
    key, samples = image.info.get("transparency"), image.tile[0].args
    if isinstance(key, tuple):
        scaled: int | tuple[int, ...] = tuple(x >> 8 if samples == "RGB;16B" else x & 255 for x in key)
    elif isinstance(key, int) and image.mode == "L":
        scaled = {"L;2": 85 * (key & 3), "L;4": 17 * (key & 15)}.get(str(samples), key & 255)
    else:
        return image
    copied = image.copy()
    copied.info["transparency"] = scaled
    return copied


def _orientation(image: Image.Image) -> int:
    """How the picture lies (EXIF 0x0112), 1 where that cannot be read."""
    if isinstance(image, _Tiff):
        value = image.tag_v2.get(ExifTags.Base.Orientation, 1)
    else:
        try:
            value = image.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # broken EXIF makes Pillow raise nearly everything, and no viewer minds it
            return 1
    return value if isinstance(value, int) else 1


def _with_8_bits(image: Image.Image) -> Image.Image:
    """The image in samples of 8 bits, black at 0; unchanged where it is so already."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = numpy.asarray(image)
    bits, is_signed, is_inverted = _samples_of(image)
    gray = _scaled_floats(values) if image.mode == "F" else _scaled_integers(values, bits=bits, is_signed=is_signed)
    result = Image.fromarray(255 - gray if is_inverted else gray)
    if isinstance(key := image.info.get("transparency"), int):
        result.putalpha(Image.fromarray(numpy.where(values == key, 0, 255).astype(numpy.uint8)))
    return result


def _samples_of(image: Image.Image) -> tuple[int | None, bool, bool]:
    """Bits of a gray sample (None: told by the values), whether it is signed, and whether its 0 is white."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return (16 if image.mode.startswith("I;16") else None), True, False
    tags = image.tag_v2
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
    is_signed = tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0] == 2
    is_inverted = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    return (bits if bits < 32 else None), is_signed, is_inverted


def _scaled_integers(values: numpy.ndarray, *, bits: int | None, is_signed: bool) -> numpy.ndarray:
    """The upper 8 of ``bits`` bits; None: of the smallest of 8, 16 and 32 that holds all values."""
    if values.dtype == numpy.int32 and not is_signed:
        values = values.view(numpy.uint32)
    least, most = int(values.min()), int(values.max())
    if least < 0:
        raise _RefusedError(f"has values from {least} to {most}; integer values must not be negative")
    if bits is None:
        bits = 8 if most < 2**8 else 16 if most < 2**16 else 32
        is_signed = is_signed and bits == 32
    return (values >> (bits - 8 - int(is_signed and values.dtype == numpy.int32))).astype(numpy.uint8)


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours of an image, and its opacity (L) where it has one."""
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    has_key = "transparency" in image.info and image.mode in ("1", "L", "RGB", "P")
    if image.mode in ("RGBA", "PA") or has_key or (image.mode == "P" and image.has_transparency_data):
        rgba = image.convert("RGBA")
        colours = image if image.mode in ("1", "L") else rgba.convert("RGB")
        return colours, rgba.getchannel("A")
    return image, None


# --- colours --------------------------------------------------------------------------------------------------------


def _converted(image: Image.Image, profile: object) -> Image.Image:
    """An opaque image of 8 bits as sRGB, by its colour profile where that can be used."""
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return _applied(ImageCms.buildTransform(lab, srgb, "LAB", "RGB"), image)
    if image.mode in ("1", "L"):
        space, image = "GRAY", image.convert("L")
    elif image.mode == "CMYK":
        space = "CMYK"
    else:
        space, image = "RGB", _without_key(image.convert("RGB"))
    transform = _to_srgb_transform(profile, space, image.mode) if isinstance(profile, bytes) else None
    return image.convert("RGB") if transform is None else _applied(transform, image)


def _without_key(image: Image.Image) -> Image.Image:
    image.info.pop("transparency", None)
    return image


def _to_srgb_transform(profile: bytes, space: str, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What brings pixels of a profile to sRGB; None where it is sRGB, broken, or not of this colour space."""
    if len(profile) > _MAX_PROFILE_BYTES:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != space:
            return None
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError):
        return None
    return None if mode != "CMYK" and _changes_nothing(transform, mode) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform is that of sRGB itself, but for rounding, which must not touch the pixels."""
    steps = numpy.linspace(0, 255, 17).round().astype(numpy.uint8)
    grid = numpy.stack(numpy.meshgrid(steps, steps, steps), axis=-1).reshape(17, -1, 3)
    sample = Image.fromarray(numpy.arange(256, dtype=numpy.uint8)[None] if mode == "L" else grid)
    before, after = (numpy.asarray(x, numpy.int16) for x in (sample.convert("RGB"), _applied(transform, sample)))
    return int(abs(after - before).max()) <= 2


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # only in place there is none
    return converted
