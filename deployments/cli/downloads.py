"""Checks of a file that a server sends: what its headers say, and whether it is whole."""

from typing import BinaryIO

import httpx

from pyramid_serve.terminal import printable

_MAX_BOXES = 1_000_000
_OTHER_KINDS = ("application/octet-stream", "application/zip")
_ENDS = (
    (b"GIF8", 1, b"\x3b"),
    (b"\x89PNG", 12, b"\0\0\0\0IEND\xaeB\x60\x82"),
    (b"PK\x03\x04", 22, b"PK\x05\x06"),  # a ZIP without a comment
)
"""How a kind of file begins, and how many bytes before its end what comes that ends it."""


def problem_of(headers: httpx.Headers, *, max_bytes: int) -> str | None:
    """What is wrong with the headers of an answer that should be a video or a picture; None if nothing is."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind and not kind.startswith(("video/", "image/")) and kind not in _OTHER_KINDS:
        return f"sends {printable(kind)[:100]} instead of a video or picture"
    if headers.get("content-encoding", "identity").lower() != "identity":
        return "sends a file in an encoding that was not asked for"
    length = headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        return f"sends a file of more than {max_bytes} bytes"
    return None


def is_cut_off(file: BinaryIO, num_bytes: int) -> bool:
    """Whether an MP4, WebP, GIF, PNG or ZIP file does not end where its own structure says.

    This alone detects a server that announces a length that is too small, or breaks off without having announced one.
    """
    file.seek(0)
    head = file.read(8)
    if head[:4] == b"RIFF":
        return int.from_bytes(head[4:8], "little") + 8 != num_bytes
    for begin, num_last, end in _ENDS:
        if head.startswith(begin):
            file.seek(max(num_bytes - num_last, 0))
            return not file.read(num_last).startswith(end)
    if head[4:8] != b"ftyp":
        return False
    position, num_boxes = 0, 0
    while position < num_bytes and num_boxes < _MAX_BOXES:
        file.seek(position)
        box = file.read(16)
        size = int.from_bytes(box[8:16]) if box[:4] == b"\0\0\0\1" else int.from_bytes(box[:4])
        if size == 0:
            return False  # the last box, which reaches to the end of the file
        if size < 8:
            return True
        position += size
        num_boxes += 1
    return position != num_bytes
