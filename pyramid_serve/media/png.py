"""PNG files, read so that nothing in their metadata costs the picture."""

import io
import zlib

from PIL import ImageFile, PngImagePlugin

from pyramid_serve.media.colours import MAX_PROFILE_BYTES

_MAX_TEXT_BYTES = 2**20


def open_png(content: bytes) -> ImageFile.ImageFile:
    """The image of a PNG, not yet unpacked. The metadata that matters is in ``info``; Pillow does not see the rest.

    Pillow would refuse a file with long texts (picture generators write workflows of megabytes), or with a wrong
    checksum of its metadata.
    """
    kept, info = [content[:8]], dict[str, bytes | str | None]()
    view, at = memoryview(content), 8
    while at + 8 <= len(content):
        length, kind = int.from_bytes(view[at : at + 4]), bytes(view[at + 4 : at + 8])
        end = at + 12 + length
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(bytes(view[at:end]))
        else:
            _read_png_metadata(info, kind, view[at + 8 : at + 8 + length])
        if kind == b"IEND":
            break
        at = end
    image = PngImagePlugin.PngImageFile(io.BytesIO(b"".join(kept)))
    image.info.update({name: value for name, value in info.items() if value is not None})
    return image


def _read_png_metadata(info: dict[str, bytes | str | None], kind: bytes, body: memoryview) -> None:
    """Store the colour profile, EXIF, and texts with EXIF or XMP under Pillow's names; None for a broken one.

    Only the first of each is unpacked, because a file may have thousands, each of them megabytes.
    """
    if kind == b"eXIf":
        info.setdefault("exif", b"Exif\0\0" + body)
    elif kind == b"iCCP" and "icc_profile" not in info:
        _, _, rest = bytes(body).partition(b"\0")
        info["icc_profile"] = _inflate(rest[1:], MAX_PROFILE_BYTES)
    elif kind in (b"tEXt", b"zTXt", b"iTXt"):
        keyword = bytes(body[:80]).partition(b"\0")[0].decode("latin-1")
        if keyword in ("XML:com.adobe.xmp", "Raw profile type exif") and keyword not in info:
            text = _png_text(kind, bytes(body[len(keyword) + 1 :]))
            info[keyword] = text.decode("utf-8", errors="replace") if text and len(text) <= _MAX_TEXT_BYTES else None


def _png_text(kind: bytes, body: bytes) -> bytes | None:
    """The text in the body of a chunk, after its keyword; None if it is broken or too long."""
    if kind == b"tEXt":
        return body
    if kind == b"zTXt":
        return _inflate(body[1:], _MAX_TEXT_BYTES)
    parts = body[2:].split(b"\0", 2)  # language, keyword in that language, text
    if len(parts) < 3:
        return None
    return _inflate(parts[2], _MAX_TEXT_BYTES) if body[0] else parts[2]


def _inflate(compressed: bytes, most: int) -> bytes | None:
    """The unpacked bytes; None if they are broken or more than ``most``."""
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(compressed, most)
    except zlib.error:
        return None
    return content if stream.eof else None
