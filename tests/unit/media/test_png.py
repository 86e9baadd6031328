import random
import tracemalloc
import zlib

import pytest

from pyramid_serve.media.pictures import read_picture
from tests.unit.media.pictures_at_hand import (
    chunk,
    exif,
    file_of,
    gradient,
    orientation,
    plain,
    with_chunks,
)


def test_megabytes_of_text_do_not_cost_a_png() -> None:
    text = b"workflow\0" + random.Random(0).randbytes(1_700_000).hex().encode()
    texts = [
        chunk(b"tEXt", text),
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(text)),
        chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(text)),
        *[chunk(b"tEXt", b"a\0b")] * 20_000,
    ]
    assert read_picture(with_chunks(file_of(gradient(), "PNG"), *texts)) == plain(gradient())


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
        assert read_picture(content) == plain(gradient())
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
    finally:
        tracemalloc.stop()


def test_a_wrong_checksum_of_metadata_does_not_cost_a_png() -> None:
    wrong = chunk(b"tEXt", b"a\0b")[:-1] + b"?"
    assert read_picture(with_chunks(file_of(gradient(), "PNG"), wrong)) == plain(gradient())


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt"])
def test_a_png_is_turned_by_exif_and_xmp_in_its_texts(kind: bytes) -> None:
    hexadecimal = b"\nexif\n    40\n" + exif(orientation(6)).hex().encode()
    xmp = b'<x tiff:Orientation="6"/>'
    text, keyword = (xmp, b"XML:com.adobe.xmp") if kind == b"iTXt" else (hexadecimal, b"Raw profile type exif")
    body = {b"tEXt": b"\0" + text, b"zTXt": b"\0\0" + zlib.compress(text), b"iTXt": bytes(5) + text}[kind]
    picture = read_picture(with_chunks(file_of(gradient(), "PNG"), chunk(kind, keyword + body)))
    assert picture.size == (24, 40)
