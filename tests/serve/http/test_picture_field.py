"""Pictures that are refused, as files and as data URLs."""

import base64
import struct
import zlib
from typing import Any

import pytest
from PIL import Image

from tests.serve.http.http_at_hand import check, png
from tests.serve.local_server import LocalServer
from tests.unit.media.pictures_at_hand import file_of


def png_bomb(width: int, height: int) -> bytes:
    """A small PNG file that says it is huge."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 100_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


BROKEN_PICTURES = {
    "empty": b"",
    "text": b"no picture at all",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "pdf": b"%PDF-1.4\n",
    "cut short": png(64, 64)[:60],
    "only its signature": b"\x89PNG\r\n\x1a\n",
    "wrong checksum": png(64, 64)[:40] + b"xxxx" + png(64, 64)[44:],
    "a bomb": png_bomb(60_000, 60_000),
    "too many pixels": png(1200, 900),
    "too narrow to fill a frame": png(100_000, 1),
    "no pixels": png_bomb(0, 0),
    "a jpeg cut short": b"\xff\xd8\xff\xe0\x00\x10JFIF",
    "a gif cut short": b"GIF89a\x01\x00",
    "an avif that is none": b"\0\0\0\x18ftypavif\0\0\0\0avifmif1" + bytes(40),
    "a heic that is none": b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(40),
    "floats above 1": file_of(Image.new("F", (64, 64), 7.0), "TIFF"),
    "floats that are no numbers": file_of(Image.new("F", (64, 64), float("nan")), "TIFF"),
}


@pytest.mark.parametrize("name", BROKEN_PICTURES)
@pytest.mark.parametrize("way", ["file", "url"])
def test_a_broken_or_huge_picture_is_refused(server: LocalServer, name: str, way: str) -> None:
    picture = BROKEN_PICTURES[name]
    if way == "file":
        files: Any = {"prompt": (None, "a"), "input_reference": ("a.png", picture, "image/png")}
        answer = server.client.post("/v1/videos", files=files)
    else:
        url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        answer = server.client.post("/v1/videos", json={"prompt": "a", "input_reference": {"image_url": url}})
    check(answer, 400, "input_reference", "input_reference")


def test_a_picture_of_too_many_bytes_is_refused(server: LocalServer) -> None:
    files: Any = {"prompt": (None, "a"), "input_reference": ("a.png", png(64, 64) + b"\0" * 200_000, "image/png")}
    check(server.client.post("/v1/videos", files=files), 413, "input_reference", "at most 200000")


@pytest.mark.parametrize("name", ["input_reference[file_id]", "input_reference[]", "input_reference[image_url][0]"])
def test_other_parts_of_a_picture_are_refused(server: LocalServer, name: str) -> None:
    check(server.client.post("/v1/videos", files={"prompt": (None, "a"), name: (None, "b")}), 400, "input_reference")


def test_two_pictures_are_refused(server: LocalServer) -> None:
    files: Any = [("prompt", (None, "a")), *[("input_reference", ("a.png", png(64, 64), "image/png"))] * 2]
    check(server.client.post("/v1/videos", files=files), 400, "input_reference", "more than once")


def test_a_picture_for_a_single_frame_is_refused(server: LocalServer) -> None:
    files: Any = {
        "prompt": (None, "a"),
        "seconds": (None, "0.04"),
        "input_reference": ("a.png", png(64, 64), "image/png"),
    }
    check(server.client.post("/v1/videos", files=files), 400, "input_reference", "more seconds")


def test_a_file_where_none_belongs_is_refused(server: LocalServer) -> None:
    files: Any = {"prompt": (None, "a"), "mask": ("a.png", png(64, 64), "image/png")}
    check(server.client.post("/v1/videos", files=files), 400, "mask")
