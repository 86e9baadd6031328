"""Pixels of any kind to 8-bit sRGB: sample depth, transparency, orientation."""

import numpy
from PIL import ExifTags, Image, PngImagePlugin, TiffImagePlugin

from pyramid_serve.media.colours import converted_to_srgb
from pyramid_serve.media.picture_errors import RefusedError, check_size
from pyramid_serve.media.picture_files import Tiff

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_ON_ITS_SIDE = (5, 6, 7, 8)
"""Orientations that exchange width and height."""


def to_srgb(image: Image.Image, max_pixels: int | None) -> Image.Image:
    """An image as 8-bit sRGB (mode RGB, nothing in ``info``): upright by its EXIF, transparency over white.

    Raises ``RefusedError``, or whatever the decoder raises for a broken file.
    """
    image = _with_scaled_key(image)
    image.load()
    check_size(image, max_pixels)  # again: some formats have their true size only after loading
    profile, orientation = image.info.get("icc_profile"), _orientation(image)
    colours, alpha = _split(_with_8_bits(image))
    picture = converted_to_srgb(colours, profile)
    if alpha is not None:
        picture = picture.convert("RGBA")
        picture.putalpha(alpha)
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    if orientation in _UPRIGHT:
        picture = picture.transpose(_UPRIGHT[orientation])
    picture.info = {}
    return picture


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an image that is turned as its EXIF says. Its pixels need not be loaded."""
    width, height = image.size
    is_turned = isinstance(image, Tiff)  # Pillow tells the size of a TIFF as it will be
    return (height, width) if not is_turned and _orientation(image) in _ON_ITS_SIDE else (width, height)


def _with_scaled_key(image: Image.Image) -> Image.Image:
    """A PNG with its transparent colour scaled like the samples; Pillow scales the samples only."""
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
    """The orientation by EXIF (tag 0x0112), 1 if that cannot be read."""
    if isinstance(image, Tiff):
        value = image.tag_v2.get(ExifTags.Base.Orientation, 1)
    else:
        try:
            value = image.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # broken EXIF makes Pillow raise almost anything, and viewers ignore it
            return 1
    return value if isinstance(value, int) else 1


def _with_8_bits(image: Image.Image) -> Image.Image:
    """The image with 8 bits per sample and black at 0; unchanged if it is like that already."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = numpy.asarray(image)
    bits, is_signed, is_inverted = _samples_of(image)
    gray = scaled_floats(values) if image.mode == "F" else _scaled_integers(values, bits=bits, is_signed=is_signed)
    result = Image.fromarray(255 - gray if is_inverted else gray)
    if isinstance(key := image.info.get("transparency"), int):
        result.putalpha(Image.fromarray(numpy.where(values == key, 0, 255).astype(numpy.uint8)))
    return result


def _samples_of(image: Image.Image) -> tuple[int | None, bool, bool]:
    """(bits per gray sample or None if the values decide, whether samples are signed, whether 0 is white)."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return (16 if image.mode.startswith("I;16") else None), True, False
    tags = image.tag_v2
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
    is_signed = tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0] == 2
    is_inverted = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    return (bits if bits < 32 else None), is_signed, is_inverted


def _scaled_integers(values: numpy.ndarray, *, bits: int | None, is_signed: bool) -> numpy.ndarray:
    """The upper 8 of ``bits`` bits. None means the smallest of 8, 16 and 32 that holds all values."""
    if values.dtype == numpy.int32 and not is_signed:
        values = values.view(numpy.uint32)
    least, most = int(values.min()), int(values.max())
    if least < 0:
        raise RefusedError(f"has values from {least} to {most}; integer values must not be negative")
    if bits is None:
        bits = 8 if most < 2**8 else 16 if most < 2**16 else 32
        is_signed = is_signed and bits == 32
    return (values >> (bits - 8 - int(is_signed and values.dtype == numpy.int32))).astype(numpy.uint8)


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours of an image, and its opacity (mode L) or None."""
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


def scaled_floats(values: numpy.ndarray) -> numpy.ndarray:
    """8-bit values of floats from 0 to 1. ``RefusedError`` for other floats."""
    if not numpy.isfinite(values).all():
        raise RefusedError("has values that are NaN or infinite; floating-point values must be from 0 to 1")
    least, most = float(values.min()), float(values.max())
    if least < 0 or most > 1:
        raise RefusedError(f"has values from {least:g} to {most:g}; floating-point values must be from 0 to 1")
    return numpy.rint(values * numpy.float32(255)).astype(numpy.uint8)
