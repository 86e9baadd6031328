import struct
import zlib
from typing import Any

import numpy
import pytest
from PIL import Image

from pyramid_serve.media.pictures import read_picture
from tests.unit.media.pictures_at_hand import (
    ADOBE_RGB_COLORANTS,
    DISPLAY_P3_COLORANTS,
    SRGB_COLORANTS,
    chunk,
    cmyk_profile,
    file_of,
    gradient,
    gray_profile,
    plain,
    rgb_profile,
    srgb_profile,
    with_chunks,
)


def converted(colour: tuple[int, int, int], colorants: tuple[tuple[float, ...], ...], gamma: float) -> numpy.ndarray:
    """A colour of a matrix profile in sRGB, by the definitions of both."""
    linear = (numpy.array(colour) / 255) ** gamma
    xyz = numpy.array(colorants).T @ linear
    srgb = numpy.clip(numpy.linalg.inv(numpy.array(SRGB_COLORANTS).T) @ xyz, 0, 1)
    return 255 * numpy.where(srgb <= 0.0031308, 12.92 * srgb, 1.055 * srgb ** (1 / 2.4) - 0.055)


COLOURS = [(200, 100, 100), (90, 160, 60), (30, 60, 120), (128, 128, 128), (255, 255, 255)]


@pytest.mark.parametrize("colorants", [DISPLAY_P3_COLORANTS, ADOBE_RGB_COLORANTS], ids=["Display P3", "Adobe RGB"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP", "HEIC", "AVIF"])
def test_a_colour_profile_is_converted_to_srgb(kind: str, colorants: tuple[tuple[float, ...], ...]) -> None:
    options: dict[str, Any] = {
        "JPEG": {"quality": 100, "subsampling": 0},
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    }.get(kind, {})
    for colour in COLOURS:
        content = file_of(Image.new("RGB", (16, 16), colour), kind, icc_profile=rgb_profile(colorants), **options)
        seen = numpy.array(read_picture(content).getpixel((8, 8)))
        assert abs(seen - converted(colour, colorants, 2.2)).max() < 4, colour


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_pixels_of_an_srgb_profile_are_left_as_they_are(kind: str) -> None:
    plain = file_of(gradient(), kind)
    assert read_picture(file_of(gradient(), kind, icc_profile=srgb_profile())) == read_picture(plain)


def test_a_profile_counts_beside_transparency_and_palettes() -> None:
    profile, colour = rgb_profile(DISPLAY_P3_COLORANTS), (200, 100, 100)
    expected = converted(colour, DISPLAY_P3_COLORANTS, 2.2)
    for image in (Image.new("RGBA", (4, 4), (*colour, 255)), Image.new("P", (4, 4), 1)):
        if image.mode == "P":
            image.putpalette([0, 0, 0, *colour])
        content = file_of(image, "PNG", icc_profile=profile)
        assert abs(numpy.array(read_picture(content).getpixel((0, 0))) - expected).max() < 3
    half = read_picture(file_of(Image.new("RGBA", (4, 4), (*colour, 128)), "PNG", icc_profile=profile))
    assert abs(numpy.array(half.getpixel((0, 0))) - (expected * 128 + 255 * 127) / 255).max() < 3


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("JPEG", "L"), *((kind, mode) for kind in ("PNG", "TIFF") for mode in ("L", "LA", "I;16"))],
)
def test_a_gray_profile_is_converted(kind: str, mode: str) -> None:
    white = {"L": 128, "LA": (128, 255), "I;16": 128 << 8}[mode]
    content = file_of(Image.new(mode, (8, 8), white), kind, icc_profile=gray_profile(gamma=1.0))
    assert read_picture(content).getpixel((4, 4)) == pytest.approx((188, 188, 188), abs=2)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_a_cmyk_profile_says_what_its_inks_look_like(kind: str) -> None:
    magenta = Image.new("CMYK", (8, 8), (0, 255, 0, 0))
    plain = read_picture(file_of(magenta, kind))
    red, green, blue = read_picture(file_of(magenta, kind, icc_profile=cmyk_profile())).getpixel((4, 4))  # type: ignore[misc]
    assert plain.getpixel((4, 4))[1] < 10  # type: ignore[index]
    assert green > 150
    assert max(red, blue) < green - 20


@pytest.mark.parametrize(
    "profile",
    [b"", b"no profile", rgb_profile(DISPLAY_P3_COLORANTS)[:200], gray_profile(gamma=1.0), cmyk_profile()],
    ids=["empty", "text", "cut short", "of gray", "of CMYK"],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_a_profile_that_is_broken_or_of_other_pixels_is_ignored(kind: str, profile: bytes) -> None:
    assert read_picture(file_of(gradient(), kind, icc_profile=profile)) == read_picture(file_of(gradient(), kind))


def test_a_profile_of_megabytes_is_converted() -> None:
    profile = rgb_profile(DISPLAY_P3_COLORANTS)
    padded = struct.pack(">I", 3_000_000) + profile[4:].ljust(3_000_000 - 4, b"\0")
    content = with_chunks(file_of(gradient(), "PNG"), chunk(b"iCCP", b"P3\0\0" + zlib.compress(padded)))
    assert read_picture(content) == read_picture(file_of(gradient(), "PNG", icc_profile=profile))
    assert read_picture(content) != plain(gradient())
