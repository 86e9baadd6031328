"""Colours: from the colour space of a picture to sRGB."""

import io

import numpy
from PIL import Image, ImageCms

MAX_PROFILE_BYTES = 16 * 2**20


def converted_to_srgb(image: Image.Image, profile: object) -> Image.Image:
    """An opaque image with 8 bits per sample as sRGB (mode RGB), converted by its colour profile if that is usable."""
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return _applied(ImageCms.buildTransform(lab, srgb, "LAB", "RGB"), image)
    if image.mode in ("1", "L"):
        space, image = "GRAY", image.convert("L")
    elif image.mode == "CMYK":
        space = "CMYK"
    else:
        space, image = "RGB", _without_key(image.convert("RGB"))
    transform = _srgb_transform(profile, space, image.mode) if isinstance(profile, bytes) else None
    return image.convert("RGB") if transform is None else _applied(transform, image)


def _without_key(image: Image.Image) -> Image.Image:
    image.info.pop("transparency", None)
    return image


def _srgb_transform(profile: bytes, space: str, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from a colour profile to sRGB; None if the profile is sRGB, broken, or of another colour space."""
    if len(profile) > MAX_PROFILE_BYTES:
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
    """Whether a transform only rounds, as that of sRGB itself does: then the pixels must stay as they are."""
    steps = numpy.linspace(0, 255, 17).round().astype(numpy.uint8)
    grid = numpy.stack(numpy.meshgrid(steps, steps, steps), axis=-1).reshape(17, -1, 3)
    sample = Image.fromarray(numpy.arange(256, dtype=numpy.uint8)[None] if mode == "L" else grid)
    before, after = (numpy.asarray(x, numpy.int16) for x in (sample.convert("RGB"), _applied(transform, sample)))
    return int(abs(after - before).max()) <= 2


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # it is None only for a conversion in place
    return converted
