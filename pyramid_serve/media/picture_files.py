"""Picture files of every format that is read, opened with their size known and their pixels not yet unpacked."""

import io
import re

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    ImageFile,
    JpegImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from pyramid_serve.media.picture_errors import RefusedError
from pyramid_serve.media.png import open_png

PICTURE_FORMATS = ("PNG", "JPEG", "WebP", "GIF", "BMP", "TIFF", "AVIF", "HEIC")

_MAX_JPEG_SCANS = 100
"""A progressive JPEG has about ten. Each scan, however short, takes a pass over the whole picture."""
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
"""The start of a segment. The excluded bytes stand for a sample of 255, fill bytes, and restarts within a scan."""


def format_of(content: bytes) -> str | None:
    """One of ``PICTURE_FORMATS``, by the first bytes of a file; None for other files."""
    if content[4:8] == b"ftyp":
        brands = content[8 : min(int.from_bytes(content[:4]), 256)]
        known = {brands[i : i + 4] for i in range(0, len(brands), 4)}
        if known & {b"avif", b"avis"}:
            return "AVIF"
        return "HEIC" if known & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"} else None
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WebP"
    for start, kind in (
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"\xff\xd8\xff", "JPEG"),
        (b"GIF8", "GIF"),
        (b"BM", "BMP"),
        (b"II*\0", "TIFF"),
        (b"MM\0*", "TIFF"),
        (b"II+\0", "TIFF"),
        (b"MM\0+", "TIFF"),
    ):
        if content.startswith(start):
            return kind
    return None


def open_picture(content: bytes, kind: str) -> ImageFile.ImageFile:
    """The image of a file of this format. Raises ``RefusedError``, or whatever the decoder raises for a broken file.

    The decoders are called directly, because ``Image.open`` depends on Pillow's process-wide limit and registry.
    """
    match kind:
        case "PNG":
            return open_png(content)
        case "JPEG":
            if _has_more_scans(content, _MAX_JPEG_SCANS):
                raise RefusedError(f"not a readable image: its JPEG data has more than {_MAX_JPEG_SCANS} scans")
            return JpegImagePlugin.JpegImageFile(io.BytesIO(content))  # also the first picture of a phone's MPO
        case "WebP":
            return WebPImagePlugin.WebPImageFile(io.BytesIO(content))
        case "GIF":
            return GifImagePlugin.GifImageFile(io.BytesIO(content))
        case "BMP":
            return BmpImagePlugin.BmpImageFile(io.BytesIO(content))
        case "TIFF":
            return Tiff(io.BytesIO(content))
        case "AVIF":
            return AvifImagePlugin.AvifImageFile(io.BytesIO(content))
        case _:
            from pillow_heif import HeifImageFile  # loads a library that only such pictures need

            return HeifImageFile(io.BytesIO(content))


def _has_more_scans(content: bytes, most: int) -> bool:
    """Whether a JPEG has more than ``most`` scans. Thumbnails in its metadata are not counted."""
    num_scans, at = 0, 2
    while (found := _JPEG_MARKER.search(content, at)) is not None and found[1] != b"\xd9":
        at = found.end()
        num_scans += found[1] == b"\xda"
        if num_scans > most:
            return True
        at += int.from_bytes(content[at : at + 2])
    return False


class Tiff(TiffImagePlugin.TiffImageFile):
    """A TIFF that is unpacked without reading its metadata, where an error would cost the picture."""

    def load_end(self) -> None:
        """Do not turn the picture: ``pixels.to_srgb`` does, and reads the tag itself."""
