import io
import random
import re
import struct
import sys
import threading
import time
import tracemalloc
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from pyramid_serve.media.pictures import MAX_PICTURE_PIXELS, PICTURE_FORMATS, PictureSource, fit_picture, read_picture
from pyramid_serve.media.writers import to_uint8
from tests.unit.media.pictures_at_hand import (
    ADOBE_RGB_COLORANTS,
    DISPLAY_P3_COLORANTS,
    SRGB_COLORANTS,
    chunk,
    cmyk_profile,
    exif,
    file_of,
    gradient,
    gray_profile,
    orientation,
    png_of,
    rgb_profile,
    srgb_profile,
    with_chunks,
)

NO_TIFF = b"this is no TIFF at all, and yet it is the EXIF"
BROKEN_EXIF = {
    "a resolution that divides by zero": exif(
        orientation(6), (0x011A, 10, 1, struct.pack(">I", 50)), (0x0128, 3, 1, b"\0\2\0\0")
    )
    + struct.pack(">ii", -1, 0),
    "cut short": exif(orientation(6), (0x010F, 2, 4000, b"\0\0\1\0"))[:-3],
    "directories in a circle": exif(orientation(6), (0x8769, 4, 1, struct.pack(">I", 8)), next_ifd=8),
    "a directory beyond the end": exif(orientation(6), (0x8769, 4, 1, b"\x7f\xff\xff\xff")),
}


def values(image: Image.Image) -> numpy.ndarray:
    return numpy.asarray(image).astype(int)


def largest_difference(a: Image.Image, b: Image.Image) -> int:
    assert a.size == b.size
    return int(abs(values(a) - values(b)).max())


def converted(colour: tuple[int, int, int], colorants: tuple[tuple[float, ...], ...], gamma: float) -> numpy.ndarray:
    """A colour of a matrix profile in sRGB, by the definitions of both."""
    linear = (numpy.array(colour) / 255) ** gamma
    xyz = numpy.array(colorants).T @ linear
    srgb = numpy.clip(numpy.linalg.inv(numpy.array(SRGB_COLORANTS).T) @ xyz, 0, 1)
    return 255 * numpy.where(srgb <= 0.0031308, 12.92 * srgb, 1.055 * srgb ** (1 / 2.4) - 0.055)


# --- formats


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP", "HEIC"])
def test_a_format_without_loss_gives_its_pixels_as_they_are(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    most = 2 if kind == "HEIC" else 0  # by way of YCbCr
    picture = read_picture(file_of(gradient(), kind, **options))
    assert picture.mode == "RGB"
    assert largest_difference(picture, gradient()) <= most


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_an_ordinary_picture_is_what_pillow_reads_bit_for_bit(kind: str) -> None:
    content = file_of(gradient(), kind)
    assert read_picture(content) == _plain(Image.open(io.BytesIO(content)).convert("RGB"))


def _plain(image: Image.Image) -> Image.Image:
    image.info = {}
    return image


def test_an_avif_is_read() -> None:
    assert largest_difference(read_picture(file_of(gradient(), "AVIF", quality=95)), gradient()) < 16


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO", "AVIF"])
def test_of_several_frames_or_pages_it_is_the_first(kind: str) -> None:
    first, second = Image.new("RGB", (32, 32), (255, 0, 0)), Image.new("RGB", (32, 32), (0, 0, 255))
    content = file_of(first, kind, save_all=True, append_images=[second])
    red, _, blue = read_picture(content).getpixel((16, 16))  # type: ignore[misc]
    assert red > 240
    assert blue < 15


def test_a_phone_picture_whose_list_of_pictures_is_broken_is_the_first_picture() -> None:
    content = file_of(gradient(), "MPO", save_all=True, append_images=[gradient()])
    at = content.index(b"MPF\0") + 4
    assert read_picture(content[:at] + b"\xff" * 40 + content[at + 40 :]).size == (40, 24)


# --- metadata


def test_megabytes_of_text_do_not_cost_a_png() -> None:
    text = b"workflow\0" + random.Random(0).randbytes(1_700_000).hex().encode()
    texts = [
        chunk(b"tEXt", text),
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(text)),
        chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(text)),
        *[chunk(b"tEXt", b"a\0b")] * 20_000,
    ]
    assert read_picture(with_chunks(file_of(gradient(), "PNG"), *texts)) == _plain(gradient())


@pytest.mark.parametrize(
    "bomb",
    [
        chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000), 9)),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(200_000_000), 9)),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(200_000_000), 9)),
        chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(200_000_000), 9)),
    ],
    ids=["text", "xmp", "exif", "profile"],
)
def test_a_bomb_in_the_metadata_is_not_unpacked(bomb: bytes) -> None:
    content = with_chunks(file_of(gradient(), "PNG"), *[bomb] * 200)
    tracemalloc.start()
    try:
        assert read_picture(content) == _plain(gradient())
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
    finally:
        tracemalloc.stop()


def test_a_wrong_checksum_of_metadata_does_not_cost_a_png() -> None:
    wrong = chunk(b"tEXt", b"a\0b")[:-1] + b"?"
    assert read_picture(with_chunks(file_of(gradient(), "PNG"), wrong)) == _plain(gradient())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "HEIC"])
@pytest.mark.parametrize("turned", [1, 3, 6, 8])
def test_a_picture_is_turned_upright_by_its_exif(kind: str, turned: int) -> None:
    data = Image.Exif()
    data[0x0112] = turned
    image = Image.new("RGB", (64, 32))
    image.paste("white", (0, 0, 32, 16))  # the corner that tells how it lies
    picture = read_picture(file_of(image, kind, exif=data.tobytes()))
    quarters = {1: (0, 0), 3: (1, 1), 6: (1, 0), 8: (0, 1)}
    assert picture.size == ((64, 32) if turned in (1, 3) else (32, 64))
    x, y = quarters[turned]
    width, height = picture.size
    corner = picture.getpixel((width // 4 + x * width // 2, height // 4 + y * height // 2))
    assert min(corner) > 240  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BROKEN_EXIF)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_costs_nothing_and_its_orientation_counts_where_it_can_be_read(kind: str, name: str) -> None:
    data = BROKEN_EXIF[name]
    plain = file_of(gradient(), kind)
    if kind == "PNG":
        content = with_chunks(plain, chunk(b"eXIf", data))
    elif kind == "JPEG":
        segment = b"Exif\0\0" + data
        content = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + plain[2:]
    else:
        content = file_of(gradient(), kind, exif=b"Exif\0\0" + data)
    assert read_picture(content) == read_picture(plain).transpose(Image.Transpose.ROTATE_270)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_that_is_no_tiff_is_none(kind: str) -> None:
    content = file_of(gradient(), kind, exif=b"Exif\0\0" + NO_TIFF)
    assert read_picture(content) == read_picture(file_of(gradient(), kind))


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt"])
def test_a_png_is_turned_by_exif_and_xmp_in_its_texts(kind: bytes) -> None:
    hexadecimal = b"\nexif\n    40\n" + exif(orientation(6)).hex().encode()
    xmp = b'<x tiff:Orientation="6"/>'
    text, keyword = (xmp, b"XML:com.adobe.xmp") if kind == b"iTXt" else (hexadecimal, b"Raw profile type exif")
    body = {b"tEXt": b"\0" + text, b"zTXt": b"\0\0" + zlib.compress(text), b"iTXt": bytes(5) + text}[kind]
    picture = read_picture(with_chunks(file_of(gradient(), "PNG"), chunk(kind, keyword + body)))
    assert picture.size == (24, 40)


# --- samples and transparency


@pytest.mark.parametrize(
    ("mode", "white"),
    [
        ("1", 1),
        ("L", 255),
        ("LA", (255, 255)),
        ("P", "white"),
        ("I;16", 65535),
        ("CMYK", (0, 0, 0, 0)),
        ("YCbCr", (255, 128, 128)),
        ("LAB", (255, 128, 128)),
        ("F", 1.0),
        ("I", 2**31 - 1),
        ("RGBX", (255, 255, 255, 0)),
    ],
)
def test_every_mode_of_a_tiff_becomes_rgb(mode: str, white: Any) -> None:
    picture = read_picture(file_of(Image.new(mode, (2, 2), white), "TIFF"))
    assert picture.mode == "RGB"
    assert picture.getpixel((0, 0)) == pytest.approx((255, 255, 255), abs=1 if mode == "LAB" else 0)


def ramp() -> numpy.ndarray:
    return numpy.arange(256, dtype=numpy.uint8).reshape(16, 16)


def gray(array: numpy.ndarray) -> Image.Image:
    return Image.fromarray(array).convert("RGB")


@pytest.mark.parametrize(
    "samples",
    [
        ramp().astype(numpy.uint16) * 257,
        ramp().astype(">u2") * 257,
        (ramp() / 255).astype(numpy.float32),
        ramp().astype(numpy.int32),
        ramp().astype(numpy.int32) * 257,
        ramp().astype(numpy.int32) << 23,
    ],
    ids=["16 bits", "16 bits, big-endian", "floats", "8 bits in 32", "16 bits in 32", "31 bits"],
)
@pytest.mark.parametrize("way", ["file", "image"])
def test_gray_samples_are_scaled_by_their_range(samples: numpy.ndarray, way: str) -> None:
    image = Image.fromarray(samples)
    assert read_picture(file_of(image, "TIFF") if way == "file" else image) == gray(ramp())


def tiff_of(
    samples: bytes, *, bits: int, sample_format: int = 1, photometric: int = 1, turned: int = 1, exif_at: int = 8
) -> bytes:
    """A little-endian TIFF of 16 x 16 gray samples, with its orientation and where its EXIF is said to be."""
    tags = {
        256: (3, 16),
        257: (3, 16),
        258: (3, bits),
        259: (3, 1),
        262: (3, photometric),
        273: (4, 8),
        274: (3, turned),
        277: (3, 1),
        278: (3, 16),
        279: (4, len(samples)),
        339: (3, sample_format),
        0x8769: (4, exif_at),
    }
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, (kind, value) in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(samples)) + samples + directory


def test_a_tiff_with_a_broken_exif_directory_is_read_and_turned() -> None:
    picture = read_picture(tiff_of(ramp().tobytes(), bits=8, turned=6, exif_at=2**31 - 1))
    assert picture == gray(ramp()).transpose(Image.Transpose.ROTATE_270)


def test_a_tiff_of_12_bits_is_scaled_by_12_bits() -> None:
    samples = ramp().astype(int).flatten() * 16 + 15
    packed = b"".join(
        bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in zip(samples[::2], samples[1::2], strict=True)
    )
    assert read_picture(tiff_of(packed, bits=12)) == gray(ramp())


def test_a_tiff_of_signed_or_unsigned_integers_is_scaled_by_their_range() -> None:
    signed = (ramp().astype("<i2") << 7).tobytes()
    unsigned = (ramp().astype("<u4") << 24).tobytes()
    assert read_picture(tiff_of(signed, bits=16, sample_format=2)) == gray(ramp())
    assert read_picture(tiff_of(unsigned, bits=32)) == gray(ramp())


def test_a_tiff_whose_zero_is_white_is_so_in_16_bits_and_floats() -> None:
    samples = (ramp().astype("<u2") * 257).tobytes()
    assert read_picture(tiff_of(samples, bits=16, photometric=0)) == gray(255 - ramp())
    floats = (ramp() / 255).astype("<f4").tobytes()
    assert read_picture(tiff_of(floats, bits=32, sample_format=3, photometric=0)) == gray(255 - ramp())


@pytest.mark.parametrize(
    ("worst", "message"),
    [
        (float("nan"), "NaN or infinite"),
        (float("inf"), "NaN or infinite"),
        (-0.5, "from -0.5 to 0; floating-point values must be from 0 to 1"),
        (4.5, "from 0 to 4.5; floating-point values must be from 0 to 1"),
    ],
)
@pytest.mark.parametrize("way", ["file", "image", "array", "tensor"])
def test_floats_that_are_not_from_0_to_1_are_refused(worst: float, message: str, way: str) -> None:
    samples = numpy.zeros((4, 4), numpy.float32)
    samples[2, 1] = worst
    sources: dict[str, PictureSource] = {
        "file": file_of(Image.fromarray(samples), "TIFF"),
        "image": Image.fromarray(samples),
        "array": samples,
        "tensor": torch.from_numpy(samples),
    }
    with pytest.raises(ValueError, match=message):
        read_picture(sources[way])


def test_negative_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="picture: has values from -3 to 0; integer values must not be negative"):
        read_picture(file_of(Image.fromarray(numpy.array([[-3, 0]], numpy.int32)), "TIFF"))


def test_a_lab_picture_has_its_colours() -> None:
    lab = Image.new("LAB", (2, 2), (round(53.24 * 2.55), 128 + 80, 128 + 67))  # sRGB red
    red, green, blue = read_picture(file_of(lab, "TIFF")).getpixel((0, 0))  # type: ignore[misc]
    assert red > 245
    assert green < 20
    assert blue < 20


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La"])
def test_half_transparent_black_is_gray_over_white_in_every_mode(mode: str) -> None:
    channels = (0, 0, 0, 51) if mode.startswith("RGB") else (0, 51)
    assert read_picture(Image.new(mode, (2, 2), channels)).getpixel((0, 0)) == (204, 204, 204)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_do_not_show_their_hidden_colour(mode: str) -> None:
    hidden = (255, 0, 0, 0) if mode == "RGBA" else (0, 0)
    for source in (Image.new(mode, (2, 2), hidden), file_of(Image.new(mode, (2, 2), hidden), "PNG")):
        assert read_picture(source).getpixel((0, 0)) == (255, 255, 255)


def test_a_premultiplied_tiff_equals_its_straight_one() -> None:
    straight = Image.new("RGBA", (4, 4), (200, 100, 0, 128))
    content = file_of(straight, "TIFF")
    at = content.index(struct.pack("<HHI", 338, 3, 1)) + 8
    premultiplied = file_of(Image.frombytes("RGBA", (4, 4), straight.convert("RGBa").tobytes()), "TIFF")
    premultiplied = premultiplied[:at] + b"\1" + premultiplied[at + 1 :]
    assert largest_difference(read_picture(premultiplied), read_picture(straight)) <= 2


@pytest.mark.parametrize(
    ("key", "opacity"),
    [(b"\0", 0), (b"\x80", 128), (b"\xff\x00", 255)],
    ids=["transparent", "half transparent", "opaque beside a transparent one"],
)
def test_a_palette_with_transparency_is_laid_over_white(key: bytes, opacity: int) -> None:
    palette = chunk(b"PLTE", bytes([200, 0, 0, 0, 0, 0]))
    content = png_of(numpy.zeros((2, 2), numpy.uint8), colour_type=3, depth=8, before=(palette, chunk(b"tRNS", key)))
    expected = [round((colour * opacity + 255 * (255 - opacity)) / 255) for colour in (200, 0, 0)]
    assert abs(numpy.array(read_picture(content).getpixel((0, 0))) - expected).max() <= 1


@pytest.mark.parametrize(
    ("samples", "colour_type", "depth", "key", "width"),
    [
        (numpy.array([[0b10000000]], numpy.uint8), 0, 1, (1,), 2),
        (numpy.array([[0b01000000]], numpy.uint8), 0, 2, (1,), 2),
        (numpy.array([[0x70]], numpy.uint8), 0, 4, (7,), 2),
        (numpy.array([[7, 0]], numpy.uint8), 0, 8, (7,), 2),
        (numpy.array([[0x1234, 0x0034]], ">u2"), 0, 16, (0x1234,), 2),
        (numpy.array([[[9, 8, 7], [0, 0, 0]]], numpy.uint8), 2, 8, (9, 8, 7), 2),
        (numpy.array([[[0x0909, 0x0808, 0x0707], [0, 0, 0]]], ">u2"), 2, 16, (0x0909, 0x0808, 0x0707), 2),
    ],
    ids=["1 bit", "2 bits", "4 bits", "8 bits", "16 bits", "RGB", "RGB of 16 bits"],
)
def test_the_transparent_colour_of_a_png_is_white_and_no_other(
    samples: numpy.ndarray, colour_type: int, depth: int, key: tuple[int, ...], width: int
) -> None:
    transparent = chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))
    content = png_of(samples, colour_type=colour_type, depth=depth, before=(transparent,), width=width)
    for source in (content, Image.open(io.BytesIO(content))):
        picture = read_picture(source)
        assert picture.getpixel((0, 0)) == (255, 255, 255)
        assert picture.getpixel((1, 0)) != (255, 255, 255)


def test_16_bits_with_opacity_keep_their_upper_8() -> None:
    samples = numpy.array([[[0xFFFF, 0x8000, 0x0000, 0xFFFF], [0, 0, 0, 0]]], ">u2")
    picture = read_picture(png_of(samples, colour_type=6, depth=16))
    assert [picture.getpixel((x, 0)) for x in (0, 1)] == [(255, 128, 0), (255, 255, 255)]


# --- colour profiles

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
    assert read_picture(content) != _plain(gradient())


# --- what it is given as


def sources_of(image: Image.Image, path: Path) -> list[PictureSource]:
    """The same picture in every way that one can be given."""
    image.save(path)
    content = path.read_bytes()
    array = numpy.asarray(image.convert("RGB"))
    return [
        str(path),
        path,
        content,
        bytearray(content),
        Image.open(path),
        array,
        (array / 255).astype(numpy.float64),
        torch.from_numpy(array.copy()),
        (torch.from_numpy(array.copy()) / 255).requires_grad_(),
    ]


def test_a_picture_is_the_same_in_whatever_way_it_is_given(tmp_path: Path) -> None:
    for source in sources_of(gradient(), tmp_path / "a.png"):
        assert read_picture(source) == _plain(gradient())


@pytest.mark.parametrize(
    "content",
    [
        file_of(
            gradient(), "JPEG", exif=b"Exif\0\0" + exif(orientation(6)), icc_profile=rgb_profile(ADOBE_RGB_COLORANTS)
        ),
        file_of(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "PNG"),
        file_of(Image.fromarray(ramp().astype(numpy.uint16) * 257), "PNG"),
        file_of(gradient(), "TIFF", exif=b"Exif\0\0" + exif(orientation(8))),
        file_of(gradient(), "GIF", transparency=3),
        file_of(gradient(), "WEBP", exif=b"Exif\0\0" + NO_TIFF),
        tiff_of((ramp().astype("<u2") * 257).tobytes(), bits=16, photometric=0),
    ],
    ids=["turned, with a profile", "transparent", "16 bits", "turned TIFF", "GIF", "broken EXIF", "white is zero"],
)
def test_an_opened_image_is_the_picture_of_its_file(content: bytes) -> None:
    with Image.open(io.BytesIO(content)) as image:
        assert read_picture(image) == read_picture(content)


def test_a_picture_that_was_read_is_read_as_it_is_and_shares_nothing() -> None:
    content = file_of(gradient(), "JPEG", exif=b"Exif\0\0" + exif(orientation(6)), icc_profile=cmyk_profile())
    once = read_picture(content)
    again = read_picture(once)
    assert again == once
    assert once.info == {}
    once.paste("white", (0, 0, *once.size))
    assert again == read_picture(content)
    assert file_of(again, "PNG") == file_of(read_picture(file_of(again, "PNG")), "PNG")


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 3), (4, 6, 4)])
@pytest.mark.parametrize("dtype", [numpy.uint8, numpy.float16, numpy.float32, numpy.float64])
def test_arrays_of_gray_colours_and_opacity_are_pictures(shape: tuple[int, ...], dtype: Any) -> None:
    white = numpy.full(shape, 1, dtype) * (255 if dtype == numpy.uint8 else 1)
    for source in (white, torch.from_numpy(white)):
        picture = read_picture(source)
        assert (picture.mode, picture.size) == ("RGB", (6, 4))
        assert picture.getpixel((5, 3)) == (255, 255, 255)


def test_a_bfloat16_tensor_is_a_picture_and_its_opacity_counts() -> None:
    assert read_picture(torch.zeros(2, 2, 4, dtype=torch.bfloat16)).getpixel((0, 0)) == (255, 255, 255)


CLOSED = Image.open(io.BytesIO(file_of(gradient(), "PNG")))
CLOSED.close()
CLOSED_PLAIN = gradient()
CLOSED_PLAIN.close()
CLOSED_FILE = io.BytesIO(b"")
CLOSED_FILE.close()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "must be a path, .* not NoneType"),
        ([[0, 1]], "must be a path, .* not list"),
        (7, "must be a path, .* not int"),
        (CLOSED_FILE, "must be a path, .* not BytesIO"),
        (CLOSED_PLAIN, "its pixels cannot be loaded"),
        (CLOSED, "its pixels cannot be loaded: its file is damaged, or was closed"),
        ("no such file.png", "no such file.png: no such file"),
        ("a\0b.png", "no such file"),
        ("x" * 5000, "cannot be read: File name too long"),
        ("", "no such file"),
        (b"", "not a readable image: it is empty"),
        (b"no picture", "not a readable image: it is none of PNG, JPEG"),
        (Image.new("RGB", (0, 4)), "0x4 has no pixels"),
        (numpy.zeros((4, 4), numpy.int64), "dtype int64"),
        (numpy.zeros((4, 4), bool), "dtype bool"),
        (numpy.zeros((4, 4), object), "dtype object"),
        (numpy.zeros((4, 4), numpy.complex64), "dtype complex64"),
        (torch.zeros(4, 4, dtype=torch.int16), "dtype int16"),
        (numpy.zeros((0, 4), numpy.uint8), "4x0 has no pixels"),
        (numpy.zeros((3, 8, 8), numpy.uint8), r"shape \(3, 8, 8\); an array must be \(H, W\)"),
        (numpy.zeros((1, 8, 8, 3), numpy.uint8), r"shape \(1, 8, 8, 3\)"),
        (numpy.zeros(8, numpy.uint8), r"shape \(8,\)"),
        (torch.zeros(4, 4).to_sparse(), "dense tensor"),
        (torch.zeros(4, 4, device="meta"), "dense tensor"),
    ],
)
def test_what_cannot_be_a_picture_is_refused_with_the_name_of_the_field(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)^input_reference.*{message}"):
        read_picture(source, name="input_reference")


def test_a_folder_or_a_pipe_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_picture(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        read_picture("/dev/zero")


# --- limits


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIC"])
def test_the_limit_of_pixels_holds_in_every_format_before_it_is_unpacked(kind: str) -> None:
    content = file_of(Image.new("RGB", (640, 640)), kind)
    with pytest.raises(ValueError, match="picture: 640x640 is more than 400000 pixels"):
        read_picture(content[: len(content) * 3 // 4] if kind in ("PNG", "GIF") else content, max_pixels=400_000)
    assert read_picture(content, max_pixels=640 * 640).size == (640, 640)


def test_the_limit_of_pixels_holds_for_images_and_arrays() -> None:
    for source in (gradient(), numpy.asarray(gradient()), torch.zeros(24, 40)):
        with pytest.raises(ValueError, match="40x24 is more than 959 pixels"):
            read_picture(source, max_pixels=959)


def test_a_picture_of_more_pixels_than_pillow_takes_is_read_where_there_is_no_limit() -> None:
    content = file_of(Image.new("1", (20000, 10000)), "PNG")
    with pytest.raises(ValueError, match=f"20000x10000 is more than {MAX_PICTURE_PIXELS} pixels"):
        read_picture(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_picture(content, max_pixels=None).size == (20000, 10000)


def test_a_tile_larger_than_its_picture_may_be_is_refused() -> None:
    content = bytearray(tiff_of(bytes(256), bits=8))
    for tag, new, value in ((278, 322, 65520), (279, 323, 65520), (273, 324, 8)):
        at = content.index(struct.pack("<HH", tag, 3 if tag == 278 else 4))
        content[at : at + 12] = struct.pack("<HHII", new, 4, 1, value)
    with pytest.raises(ValueError, match="not a readable image"):
        read_picture(bytes(content))


def test_a_jpeg_of_hundreds_of_scans_is_refused() -> None:
    content = file_of(gradient(), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    with pytest.raises(ValueError, match="more than 100 scans"):
        read_picture(content[:last] + content[last:-2] * 200 + content[-2:])


def test_scans_of_thumbnails_and_of_what_follows_a_jpeg_are_not_counted() -> None:
    content, scans = file_of(gradient(), "JPEG", progressive=True), b"\xff\xda\0\2" * 1000
    thumbnails = b"\xff\xe1" + struct.pack(">H", len(scans) + 2) + scans
    assert read_picture(content[:2] + thumbnails + content[2:] + scans) == read_picture(content)


# --- broken files


def files() -> dict[str, bytes]:
    """Small files of every format and of the ways in which they hold their pixels and metadata."""
    image, data = gradient(), exif(orientation(6))
    rgba = image.copy()
    rgba.putalpha(Image.linear_gradient("L").resize(image.size))
    metadata: dict[str, Any] = {"exif": b"Exif\0\0" + data, "icc_profile": rgb_profile(DISPLAY_P3_COLORANTS)}
    return {
        "PNG": file_of(rgba, "PNG", **metadata),
        "PNG of a palette": file_of(image.quantize(16), "PNG"),
        "JPEG": file_of(image, "JPEG", **metadata),
        "progressive JPEG": file_of(image, "JPEG", progressive=True),
        "CMYK JPEG": file_of(image.convert("CMYK"), "JPEG"),
        "MPO": file_of(image, "MPO", save_all=True, append_images=[image]),
        "WebP": file_of(rgba, "WEBP", **metadata),
        "WebP without loss": file_of(image, "WEBP", lossless=True),
        "GIF": file_of(image, "GIF"),
        "BMP": file_of(image, "BMP"),
        "BMP of a palette": file_of(image.quantize(16), "BMP"),
        "TIFF": file_of(rgba, "TIFF", **metadata),
        "TIFF of floats": file_of(Image.fromarray((ramp() / 255).astype(numpy.float32)), "TIFF"),
        "TIFF of integers": file_of(Image.fromarray(ramp().astype(numpy.int32)), "TIFF"),
        "AVIF": file_of(rgba, "AVIF", **metadata),
        "HEIC": file_of(rgba, "HEIC", **metadata),
    }


def damaged(content: bytes, source: random.Random) -> bytes:
    cut = bytearray(content[: source.randrange(len(content))] if source.random() < 0.3 else content)
    for _ in range(source.choice([1, 1, 2, 4, 16]) if cut else 0):
        cut[source.randrange(len(cut))] = source.choice([0, 1, 127, 128, 255, source.randrange(256)])
    return bytes(cut)


@pytest.mark.parametrize("name", files())
def test_a_damaged_file_is_a_picture_or_refused_in_plain_words(
    name: str, recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]
) -> None:
    content, source = files()[name], random.Random(name)
    num_refused, began = 0, time.process_time()
    for _ in range(60):
        try:
            picture = read_picture(damaged(content, source), max_pixels=1_000_000)
        except ValueError as error:
            num_refused += 1
            message = str(error)
            assert message.startswith("picture: ")
            assert "not a readable image" in message or "pixels" in message or "has values" in message
            assert not re.search(r"PIL|Image[.F]|0x[0-9a-f]{6}|/|MAX_|struct|b'", message)
        else:
            assert picture.mode == "RGB"
    assert num_refused > 5
    assert time.process_time() - began < 60
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "error",
    [struct.error("x"), OverflowError("x"), zlib.error("x"), MemoryError(), RecursionError("x"), AttributeError("x")],
)
def test_whatever_a_decoder_raises_is_a_value_error(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("PIL.BmpImagePlugin.BmpImageFile.load", fail)
    with pytest.raises(ValueError, match=r"^picture: not a readable image: it"):
        read_picture(file_of(gradient(), "BMP"))


def test_a_file_that_ends_too_early_is_told_so() -> None:
    content = file_of(gradient(400, 240), "JPEG")
    with pytest.raises(ValueError, match="picture: not a readable image: the file ends too early"):
        read_picture(content[:-400])


def test_reading_leaves_the_warnings_of_the_process_alone() -> None:
    before = list(warnings.filters)
    threads = [threading.Thread(target=read_picture, args=(content,)) for content in files().values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


def test_the_formats_that_are_named_are_those_that_are_read() -> None:
    kinds = {"WebP": "WEBP"}
    for kind in PICTURE_FORMATS:
        assert read_picture(file_of(gradient(), kinds.get(kind, kind))).size == (40, 24)


def test_reading_a_heic_does_not_register_a_format_with_pillow() -> None:
    read_picture(file_of(gradient(), "HEIC"))
    assert "pillow_heif" in sys.modules
    assert "HEIF" not in Image.OPEN


# --- fitting


def test_a_picture_of_the_size_comes_through_unchanged() -> None:
    picture = read_picture(Path(__file__).parents[2] / "golden/mmdit/i2v_image.png")
    pixels = fit_picture(picture, height=64, width=128)
    expected = torch.from_numpy(numpy.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.equal(pixels, expected)


@pytest.mark.parametrize(("width", "height"), [(300, 100), (100, 300), (128, 66), (64, 32)])
def test_a_picture_is_scaled_to_cover_the_size_and_cut_from_its_centre(width: int, height: int) -> None:
    # A cross through the middle stays in the middle, whatever is cut off.
    image = Image.new("RGB", (width, height))
    image.paste("white", (0, height // 2 - 3, width, height - height // 2 + 3))
    image.paste("white", (width // 2 - 3, 0, width - width // 2 + 3, height))
    pixels = fit_picture(image, height=64, width=128)
    assert pixels.shape == (3, 64, 128)
    assert pixels.min() >= -1
    assert pixels.max() == 1
    assert torch.allclose(pixels, pixels.flip(1), atol=0.3)
    assert torch.allclose(pixels, pixels.flip(2), atol=0.3)


def test_a_cut_between_two_pixels_is_rounded_as_pillow_does() -> None:
    image = Image.fromarray(numpy.arange(67 * 128 * 3, dtype=numpy.uint8).reshape(67, 128, 3))
    expected = numpy.asarray(image.crop((0, 1.5, 128, 65.5)))
    assert torch.equal(
        to_uint8(fit_picture(image, height=64, width=128).unsqueeze(1) + 1e-3)[0], torch.tensor(expected)
    )


def test_a_picture_too_narrow_to_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="picture: 10000x1 is too long and narrow for 1280x768"):
        fit_picture(Image.new("RGB", (10000, 1)), height=768, width=1280)
