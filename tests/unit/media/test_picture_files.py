import io
import random
import re
import struct
import sys
import threading
import time
import warnings
import zlib
from typing import Any

import numpy
import pytest
from PIL import Image

from pyramid_serve.media.picture_files import PICTURE_FORMATS
from pyramid_serve.media.pictures import read_picture
from tests.unit.media.pictures_at_hand import (
    DISPLAY_P3_COLORANTS,
    exif,
    file_of,
    gradient,
    largest_difference,
    orientation,
    plain,
    ramp,
    rgb_profile,
)


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
    assert read_picture(content) == plain(Image.open(io.BytesIO(content)).convert("RGB"))


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


def test_a_jpeg_of_hundreds_of_scans_is_refused() -> None:
    content = file_of(gradient(), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    with pytest.raises(ValueError, match="more than 100 scans"):
        read_picture(content[:last] + content[last:-2] * 200 + content[-2:])


def test_scans_of_thumbnails_and_of_what_follows_a_jpeg_are_not_counted() -> None:
    content, scans = file_of(gradient(), "JPEG", progressive=True), b"\xff\xda\0\2" * 1000
    thumbnails = b"\xff\xe1" + struct.pack(">H", len(scans) + 2) + scans
    assert read_picture(content[:2] + thumbnails + content[2:] + scans) == read_picture(content)


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
