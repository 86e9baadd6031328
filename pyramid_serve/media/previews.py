"""Previews of a finished video, as WebP pictures. The same video always gives the same bytes."""

import io

from PIL import Image

from pyramid_serve.media.ffmpeg import EncodeError, run_ffmpeg

PREVIEW_TIMEOUT_S = 120.0
"""A sprite sheet decodes the whole video, which takes seconds; the rest is for a machine under load."""

_THUMBNAIL_WIDTH = 640
_SPRITE_WIDTH = 256
_SPRITE_COLUMNS = 5
_MAX_SPRITES = 25


def thumbnail(video: bytes) -> bytes:
    """The first frame of an MP4, at most 640 pixels wide. Raises ``EncodeError``."""
    return _preview(video, f"scale='min({_THUMBNAIL_WIDTH},iw)':-2")


def sprite_sheet(video: bytes, num_frames: int) -> bytes:
    """Up to 25 evenly spaced frames of an MP4 with ``num_frames``, in rows of 5, each at most 256 pixels wide.

    Raises ``EncodeError``.
    """
    interval = -(-num_frames // _MAX_SPRITES)
    num_sprites = -(-num_frames // interval)
    columns = min(num_sprites, _SPRITE_COLUMNS)
    rows = -(-num_sprites // columns)
    scale = f"scale='min({_SPRITE_WIDTH},iw)':-2"
    return _preview(video, f"select='not(mod(n,{interval}))',{scale},tile={columns}x{rows}")


def _preview(video: bytes, filters: str) -> bytes:
    """The first picture that ffmpeg's filters make of a video, as WebP."""
    output = ("-vf", filters, "-frames:v", "1", "-f", "image2pipe", "-c:v", "png", "pipe:1")
    png = run_ffmpeg(["-i", "pipe:0", *output], stdin=video, timeout_s=PREVIEW_TIMEOUT_S)
    if not png:
        raise EncodeError("ffmpeg found no frame in the video")
    content = io.BytesIO()
    Image.open(io.BytesIO(png)).save(content, format="WEBP", quality=85)
    return content.getvalue()
