"""Picture files and colour profiles, made as cameras and programs make them."""

import io
import struct
import zlib

import numpy
from PIL import Image, ImageCms

SRGB_COLORANTS = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
DISPLAY_P3_COLORANTS = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
ADOBE_RGB_COLORANTS = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
"""XYZ of red, green and blue, adapted to D50 as profiles have them."""


def gradient(width: int = 40, height: int = 24) -> Image.Image:
    """A picture of which no two corners, rows or columns are alike."""
    x, y = numpy.meshgrid(numpy.linspace(0, 1, width), numpy.linspace(0, 1, height))
    return Image.fromarray((numpy.stack([x, y, 1 - x * y], axis=-1) * 255).astype(numpy.uint8))


def file_of(image: Image.Image, kind: str, **options: object) -> bytes:
    """The file of an image; options as for its ``save``."""
    content = io.BytesIO()
    if kind == "HEIC":
        import pillow_heif

        pillow_heif.from_pillow(image).save(content, quality=-1, chroma=444, **options)
    else:
        image.save(content, format=kind, **options)
    return content.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(
    samples: numpy.ndarray, *, colour_type: int, depth: int, before: tuple[bytes, ...] = (), width: int | None = None
) -> bytes:
    """A PNG of rows of bytes as they are stored, with more chunks before the pixels."""
    height = samples.shape[0]
    width = samples.shape[1] if width is None else width
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    raw = b"".join(b"\0" + row.tobytes() for row in samples)
    chunks = (chunk(b"IHDR", header), *before, chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def with_chunks(png: bytes, *chunks: bytes) -> bytes:
    """A PNG with more chunks after its header."""
    return png[:33] + b"".join(chunks) + png[33:]


def exif(*entries: tuple[int, int, int, bytes], next_ifd: int = 0) -> bytes:
    """Big-endian EXIF without its name: entries of tag, type, count, and 4 bytes of value or offset."""
    body = b"".join(struct.pack(">HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    return b"MM\0*" + struct.pack(">IH", 8, len(entries)) + body + struct.pack(">I", next_ifd)


def orientation(value: int) -> tuple[int, int, int, bytes]:
    return 0x0112, 3, 1, struct.pack(">HH", value, 0)


# --- colour profiles


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def rgb_profile(colorants: tuple[tuple[float, ...], ...], *, gamma: float = 2.2) -> bytes:
    """A matrix profile, as Display P3 and Adobe RGB are."""
    tags = {name: _xyz(*xyz) for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), colorants, strict=True)}
    return _profile(b"RGB ", b"XYZ ", tags | {name: _curve(gamma) for name in (b"rTRC", b"gTRC", b"bTRC")})


def gray_profile(*, gamma: float) -> bytes:
    return _profile(b"GRAY", b"XYZ ", {b"kTRC": _curve(gamma)})


def cmyk_profile() -> bytes:
    """A profile of an ink set whose magenta prints green, so that nobody takes it for the usual one."""
    lab = bytearray()
    for index in range(16):
        cyan, magenta, yellow, black = (index >> bit & 1 for bit in (3, 2, 1, 0))
        lightness = 0 if black else 255 - 80 * (cyan + magenta + yellow)
        lab += bytes([max(lightness, 0), 60 if magenta and not black else 128, 128])
    identity = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    return _profile(b"CMYK", b"Lab ", {b"A2B0": table + identity * 4 + bytes(lab) + identity * 3}, kind=b"prtr")


def _xyz(x: float, y: float, z: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in (x, y, z)))


def _curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def _profile(space: bytes, connection: bytes, tags: dict[bytes, bytes], *, kind: bytes = b"mntr") -> bytes:
    text = b"made for a test\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78),
        b"cprt": b"text\0\0\0\0" + text,
        b"wtpt": _xyz(0.9642, 1.0, 0.8249),
        **tags,
    }
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    content = struct.pack(">I", len(tags)) + table + body
    header = struct.pack(">I4sI4s4s4s12s4s", 128 + len(content), b"", 0x02400000, kind, space, connection, b"", b"acsp")
    header += bytes(28) + struct.pack(">3i", 63190, 65536, 54061)  # the white of the connection space, D50
    return header.ljust(128, b"\0") + content


# --- pixels


NO_TIFF = b"this is no TIFF at all, and yet it is the EXIF"


def values(image: Image.Image) -> numpy.ndarray:
    return numpy.asarray(image).astype(int)


def largest_difference(a: Image.Image, b: Image.Image) -> int:
    assert a.size == b.size
    return int(abs(values(a) - values(b)).max())


def plain(image: Image.Image) -> Image.Image:
    """The image without metadata, as ``read_picture`` gives it."""
    image.info = {}
    return image


def ramp() -> numpy.ndarray:
    return numpy.arange(256, dtype=numpy.uint8).reshape(16, 16)


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
