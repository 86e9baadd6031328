"""Files and streams of finished videos over HTTP, whole or in ranges, with validators; previews made when first asked
for."""

import asyncio
import io
import logging
import re
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import imageio_ffmpeg
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from PIL import Image

from deployments.http.errors import ApiError
from pyramid_serve.api import Status, VideoRecord
from pyramid_serve.media.writers import EncodeError
from pyramid_serve.storage import VideoFile, VideoNotFoundError, VideoStore

logger = logging.getLogger(__name__)

Variant = Literal["video", "thumbnail", "spritesheet"]

_FILES: dict[Variant, tuple[VideoFile, str]] = {
    "video": (VideoFile.VIDEO, "video/mp4"),
    "thumbnail": (VideoFile.THUMBNAIL, "image/webp"),
    "spritesheet": (VideoFile.SPRITESHEET, "image/webp"),
}
_CHUNK_BYTES = 1024 * 1024
_RANGE = re.compile(r"(?i:bytes)=(\d{0,18})-(\d{0,18})")
_BROWSER_BLOCK_BYTES = 32 * 1024
_BOX_HEAD_BYTES = 8
_THUMBNAIL_WIDTH = 640
_SPRITE_WIDTH = 256
_SPRITE_COLUMNS = 5
_MAX_SPRITES = 25


class ByteRange(NamedTuple):
    """Bytes ``start`` up to ``end``, without it."""

    start: int
    end: int


@dataclass(frozen=True)
class Content:
    """What is sent of a finished video: one of its files, or its stream."""

    file_name: str
    """As a browser is to save it."""
    media_type: str
    num_bytes: int
    etag: str
    chunks: Callable[[ByteRange], AsyncIterator[bytes]]
    """Reads some of it."""


async def open_content(store: VideoStore, record: VideoRecord, variant: Variant) -> Content:
    """A file of a video. ``ApiError`` 409 for one that is not finished, ``VideoNotFoundError`` for a deleted one."""
    if record.status is not Status.COMPLETED:
        reason = f": {record.error.message}" if record.error else f", {record.progress} % done"
        raise ApiError(409, f"{record.id}: is {record.status}{reason}", param="video_id")
    file, media_type = _FILES[variant]
    preview = None
    try:
        num_bytes = await asyncio.to_thread(store.size_of, record.id, file)
    except VideoNotFoundError:
        if file is VideoFile.VIDEO:
            raise
        # Sent from memory, for the storage may not have taken it.
        preview = await asyncio.to_thread(_make_preview, store, record, file)
        num_bytes = len(preview)
    return Content(
        file_name=f"{record.id}.{file.rpartition('.')[2]}",
        media_type=media_type,
        num_bytes=num_bytes,
        etag=f'"{record.id}-{variant}-{num_bytes}"',
        chunks=lambda span: (
            _read_chunks(store, record.id, file, span) if preview is None else _chunks_of(preview, span)
        ),
    )


async def open_stream(store: VideoStore, record: VideoRecord) -> Content:
    """The stream of a finished video: the same bytes that those had who watched it being made.

    Raises ``VideoNotFoundError`` for a deleted one.
    """
    sizes = [size + len(padding(size)) for size in await asyncio.to_thread(store.fragment_sizes, record.id)]
    if len(sizes) < record.spec.num_latent_frames:
        raise VideoNotFoundError(f"{record.id}: no unit {len(sizes)}")
    num_bytes = sum(sizes)
    return Content(
        file_name=f"{record.id}.mp4",
        media_type="video/mp4",
        num_bytes=num_bytes,
        etag=f'"{record.id}-stream-{num_bytes}"',
        chunks=lambda span: _read_fragments(store, record.id, sizes, span),
    )


def padding(num_bytes: int) -> bytes:
    """An MP4 box of nothing that brings a fragment to whole blocks: Chromium plays nothing of one that is not full."""
    size = -num_bytes % _BROWSER_BLOCK_BYTES
    if 0 < size < _BOX_HEAD_BYTES:
        size += _BROWSER_BLOCK_BYTES
    return size.to_bytes(4) + b"free" + bytes(size - _BOX_HEAD_BYTES) if size else b""


def respond_whole(content: Content, *, headers: Mapping[str, str]) -> Response:
    """All of it, with these headers besides its own."""
    sent = {**_headers_of(content), "Content-Length": str(content.num_bytes), **headers}
    chunks = content.chunks(ByteRange(0, content.num_bytes))
    return StreamingResponse(chunks, headers=sent, media_type=content.media_type)


def respond(request: Request, content: Content) -> Response:
    """The whole or the range of it that was asked for, or 304. ``ApiError`` 416 for a range that it does not have."""
    headers = _headers_of(content)
    if _matches(request.headers.get("if-none-match"), content.etag):
        return Response(status_code=304, headers=headers)
    span = _range_of(request, content)
    status = 200 if span is None else 206
    if span is None:
        span = ByteRange(0, content.num_bytes)
    else:
        headers["Content-Range"] = f"bytes {span.start}-{span.end - 1}/{content.num_bytes}"
    headers["Content-Length"] = str(span.end - span.start)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=content.media_type)
    return StreamingResponse(content.chunks(span), status_code=status, headers=headers, media_type=content.media_type)


def _headers_of(content: Content) -> dict[str, str]:
    return {
        "Accept-Ranges": "bytes",
        "ETag": content.etag,
        "Cache-Control": "private, no-cache",
        "Content-Disposition": f'inline; filename="{content.file_name}"',
    }


def _matches(header: str | None, etag: str) -> bool:
    return header is not None and any(tag.strip() in (etag, f"W/{etag}", "*") for tag in header.split(","))


def _range_of(request: Request, content: Content) -> ByteRange | None:
    """The range asked for; None for the whole, as for what is no single range of bytes."""
    found = _RANGE.fullmatch(request.headers.get("range", "").replace(" ", ""))
    if found is None or request.headers.get("if-range", content.etag) != content.etag:
        return None
    first, last = found.groups()
    if not first and not last:
        return None
    size = content.num_bytes
    start = int(first) if first else max(size - int(last), 0)
    end = min(int(last) + 1, size) if first and last else size
    if first and last and int(last) < int(first):
        return None
    if start >= size or (not first and int(last) == 0):
        raise ApiError(
            416,
            f"Range={found.group()!r}: there are {size} bytes",
            param="Range",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return ByteRange(start, end)


async def _read_chunks(store: VideoStore, video_id: str, file: VideoFile, span: ByteRange) -> AsyncIterator[bytes]:
    for start in range(span.start, span.end, _CHUNK_BYTES):
        end = min(start + _CHUNK_BYTES, span.end)
        yield await asyncio.to_thread(store.read_range, video_id, file, start, end)


async def _read_fragments(
    store: VideoStore, video_id: str, sizes: Sequence[int], span: ByteRange
) -> AsyncIterator[bytes]:
    """The stream's bytes of ``span``, of fragments that have ``sizes`` with their padding; one in memory at a time."""
    start = 0
    for unit, size in enumerate(sizes):
        if start < span.end and start + size > span.start:
            fragment = await asyncio.to_thread(store.load_fragment, video_id, unit)
            padded = fragment + padding(len(fragment))
            yield padded[max(span.start - start, 0) : span.end - start]
        start += size


async def _chunks_of(content: bytes, span: ByteRange) -> AsyncIterator[bytes]:
    yield content[span.start : span.end]


# --- previews -------------------------------------------------------------------------------------------------------


def _make_preview(store: VideoStore, record: VideoRecord, file: VideoFile) -> bytes:
    """Make a thumbnail or sprite sheet of a finished video, and keep it if the storage takes it. Always the same."""
    video = store.fetch(record.id, VideoFile.VIDEO)
    picture = _thumbnail(video) if file is VideoFile.THUMBNAIL else _sprite_sheet(video, record.spec.num_frames)
    content = io.BytesIO()
    picture.save(content, format="WEBP", quality=85)
    try:
        store.attach(record.id, file, content.getvalue())
    except OSError as error:
        logger.warning("%s is not kept: %s", file, error, extra={"video_id": record.id})
    return content.getvalue()


def _thumbnail(video: bytes) -> Image.Image:
    """The first frame."""
    return _picture_of(video, f"scale='min({_THUMBNAIL_WIDTH},iw)':-2")


def _sprite_sheet(video: bytes, num_frames: int) -> Image.Image:
    """Up to 25 frames, evenly spaced, in rows of 5."""
    interval = -(-num_frames // _MAX_SPRITES)
    num_sprites = -(-num_frames // interval)
    columns = min(num_sprites, _SPRITE_COLUMNS)
    rows = -(-num_sprites // columns)
    scale = f"scale='min({_SPRITE_WIDTH},iw)':-2"
    return _picture_of(video, f"select='not(mod(n,{interval}))',{scale},tile={columns}x{rows}")


def _picture_of(video: bytes, filters: str) -> Image.Image:
    """What ffmpeg's filters make of a video as their first picture."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-i", "pipe:0"]
    output = ["-vf", filters, "-frames:v", "1", "-f", "image2pipe", "-c:v", "png", "pipe:1"]
    finished = subprocess.run([*command, *output], input=video, capture_output=True, check=False)
    if finished.returncode or not finished.stdout:
        raise EncodeError(
            f"ffmpeg ended with {finished.returncode}: {finished.stderr.decode(errors='replace')[-1000:]}"
        )
    return Image.open(io.BytesIO(finished.stdout))
