import io
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from pyramid_serve.errors import InputError
from pyramid_serve.media.picture_files import PICTURE_FORMATS
from pyramid_serve.media.pictures import MAX_PICTURE_PIXELS, PictureSource, picture_size, read_picture
from tests.unit.media.pictures_at_hand import (
    ADOBE_RGB_COLORANTS,
    NO_TIFF,
    cmyk_profile,
    exif,
    file_of,
    gradient,
    orientation,
    plain,
    ramp,
    rgb_profile,
    tiff_of,
)


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
        assert read_picture(source) == plain(gradient())


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
    with pytest.raises(InputError, match=f"(?s)^input_reference.*{message}"):
        read_picture(source, name="input_reference")


def test_a_folder_or_a_pipe_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_picture(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        read_picture("/dev/zero")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIC"])
def test_the_limit_of_pixels_holds_in_every_format_before_it_is_unpacked(kind: str) -> None:
    content = file_of(Image.new("RGB", (640, 640)), kind)
    with pytest.raises(InputError, match="picture: 640x640 is more than 400000 pixels"):
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


@pytest.mark.parametrize("kind", PICTURE_FORMATS)
@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_the_size_of_a_file_is_that_of_the_picture_which_is_read(kind: str, turn: int) -> None:
    options = {} if kind in ("GIF", "BMP") else {"exif": b"Exif\0\0" + exif(orientation(turn))}
    content = file_of(gradient(40, 24), kind, **options)
    assert picture_size(content) == read_picture(content).size


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_a_file_without_a_size_is_refused_with_the_name_of_the_field(content: bytes) -> None:
    with pytest.raises(InputError, match=r"^image: not a readable image"):
        picture_size(content, name="image")
