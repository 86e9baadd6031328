import io
import struct
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from pyramid_serve.media.pictures import PictureSource, read_picture
from tests.unit.media.pictures_at_hand import (
    NO_TIFF,
    chunk,
    exif,
    file_of,
    gradient,
    largest_difference,
    orientation,
    png_of,
    ramp,
    tiff_of,
    with_chunks,
)

BROKEN_EXIF = {
    "a resolution that divides by zero": exif(
        orientation(6), (0x011A, 10, 1, struct.pack(">I", 50)), (0x0128, 3, 1, b"\0\2\0\0")
    )
    + struct.pack(">ii", -1, 0),
    "cut short": exif(orientation(6), (0x010F, 2, 4000, b"\0\0\1\0"))[:-3],
    "directories in a circle": exif(orientation(6), (0x8769, 4, 1, struct.pack(">I", 8)), next_ifd=8),
    "a directory beyond the end": exif(orientation(6), (0x8769, 4, 1, b"\x7f\xff\xff\xff")),
}


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
