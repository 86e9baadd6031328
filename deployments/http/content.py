"""Files and streams of finished videos over HTTP, whole or in ranges, with validators.

A preview or another form of the video is made when it is first requested.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from deployments.http.errors import ApiError
from deployments.http.previews import File, Previews
from pyramid_serve.api import Status, VideoRecord
from pyramid_serve.api.plans import Plan
from pyramid_serve.storage import FrameFile, VideoFile, VideoNotFoundError, VideoStore

Variant = Literal["video", "thumbnail", "spritesheet", "gif", "webp", "frame", "frames"]

_FILES: dict[Variant, VideoFile] = {
    "video": VideoFile.VIDEO,
    "thumbnail": VideoFile.THUMBNAIL,
    "spritesheet": VideoFile.SPRITESHEET,
    "gif": VideoFile.GIF,
    "webp": VideoFile.WEBP,
    "frames": VideoFile.FRAMES,
}
_MEDIA_TYPES = {
    "mp4": "video/mp4",
    "webp": "image/webp",
    "gif": "image/gif",
    "png": "image/png",
    "zip": "application/zip",
}
MEDIA_TYPES = tuple(_MEDIA_TYPES.values())
"""What ``content`` may be."""
_TIME = re.compile(r"\d{1,9}(\.\d{1,9})?", re.ASCII)
_TIME_ROUNDING_S = 1e-6
_CHUNK_BYTES = 1024 * 1024
_RANGE = re.compile(r"(?i:bytes)=(\d{0,18})-(\d{0,18})")
_BROWSER_BLOCK_BYTES = 32 * 1024
_BOX_HEAD_BYTES = 8


class ByteRange(NamedTuple):
    """The bytes from ``start`` up to, but not including, ``end``."""

    start: int
    end: int


@dataclass(frozen=True)
class Content:
    """What an answer sends of a finished video: one of its files, or its stream."""

    file_name: str
    """The name under which a browser saves it."""
    media_type: str
    num_bytes: int
    etag: str
    chunks: Callable[[ByteRange], AsyncIterator[bytes]]
    """Reads a range of its bytes."""


async def open_content(
    store: VideoStore, previews: Previews, record: VideoRecord, variant: Variant, at: str | None = None
) -> Content:
    """A file of a video. at: which frame, as ``frame_at`` takes it; only for the variant ``frame``, the first if None.

    Raises ``ApiError`` 400 for a wrong ``at`` and 409 for a video that is not finished, and ``VideoNotFoundError`` for
    one that was deleted; for a file that must be made also what ``Previews.get`` raises.
    """
    if at is not None and variant != "frame":
        raise ApiError(400, f"at={at[:60]}: only with variant=frame", param="at")
    is_frame = variant == "frame"
    file: File = FrameFile(frame_at("first" if at is None else at, record.plan)) if is_frame else _FILES[variant]
    if record.status is not Status.COMPLETED:
        reason = f": {record.error.message}" if record.error else f", {record.progress} % done"
        raise ApiError(409, f"{record.id}: is {record.status}{reason}", param="video_id")
    preview = None
    try:
        num_bytes = await asyncio.to_thread(store.files.size_of, record.id, file)
    except VideoNotFoundError:
        if file is VideoFile.VIDEO:
            raise
        # It is sent from memory, because the storage may have refused it.
        preview = await previews.get(record, file)
        num_bytes = await asyncio.to_thread(store.files.size_of, record.id, file) if preview is None else len(preview)
    ending = str(file).rpartition(".")[2]
    frame = f"-{file.index:05d}" if isinstance(file, FrameFile) else ""
    return Content(
        file_name=f"{record.id}{frame}.{ending}",
        media_type=_MEDIA_TYPES[ending],
        num_bytes=num_bytes,
        etag=f'"{record.id}-{variant}{frame}-{num_bytes}"',
        chunks=lambda span: (
            _read_chunks(store, record.id, file, span) if preview is None else _chunks_of(preview, span)
        ),
    )


def frame_at(at: str, plan: Plan) -> int:
    """The index of the frame that is shown ``at`` a time in seconds, or of the ``first`` or ``last``.

    Raises ``ApiError`` 400 for a time after the end and for anything else.
    """
    if at in ("first", "last"):
        return 0 if at == "first" else plan.num_frames - 1
    index = int((float(at) + _TIME_ROUNDING_S) * plan.fps) if _TIME.fullmatch(at) else plan.num_frames
    if index >= plan.num_frames:
        end = f"{plan.num_frames / plan.fps:.3f}".rstrip("0").rstrip(".")
        raise ApiError(
            400, f"at={at[:60]}: must be first, last, or a time in seconds from 0 to below {end}", param="at"
        )
    return index


async def open_stream(store: VideoStore, record: VideoRecord) -> Content:
    """The stream of a finished video, byte for byte the stream that was sent while the video was made.

    Raises ``VideoNotFoundError`` for a video that was deleted.
    """
    sizes = [size + len(padding(size)) for size in await asyncio.to_thread(store.files.fragment_sizes, record.id)]
    if len(sizes) < record.plan.num_units:
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
    """An empty MP4 box that pads a fragment to whole blocks: Chromium plays a block only when it is full."""
    size = -num_bytes % _BROWSER_BLOCK_BYTES
    if 0 < size < _BOX_HEAD_BYTES:
        size += _BROWSER_BLOCK_BYTES
    return size.to_bytes(4) + b"free" + bytes(size - _BOX_HEAD_BYTES) if size else b""


def respond_whole(content: Content, *, headers: Mapping[str, str]) -> Response:
    """An answer with the whole content, and these headers in addition to its own."""
    sent = {**_headers_of(content), "Content-Length": str(content.num_bytes), **headers}
    chunks = content.chunks(ByteRange(0, content.num_bytes))
    return StreamingResponse(chunks, headers=sent, media_type=content.media_type)


def respond(request: Request, content: Content) -> Response:
    """An answer with the whole content or the range requested, or 304. ``ApiError`` 416 for a range beyond the end."""
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
    """The range requested. None means the whole: no ``Range``, or one that is not a single range of bytes."""
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


async def _read_chunks(store: VideoStore, video_id: str, file: File, span: ByteRange) -> AsyncIterator[bytes]:
    for start in range(span.start, span.end, _CHUNK_BYTES):
        end = min(start + _CHUNK_BYTES, span.end)
        yield await asyncio.to_thread(store.files.read_range, video_id, file, start, end)


async def _read_fragments(
    store: VideoStore, video_id: str, sizes: Sequence[int], span: ByteRange
) -> AsyncIterator[bytes]:
    """A range of the stream. ``sizes``: of the padded fragments, of which one is in memory at a time."""
    start = 0
    for unit, size in enumerate(sizes):
        if start < span.end and start + size > span.start:
            fragment = await asyncio.to_thread(store.files.load_fragment, video_id, unit)
            padded = fragment + padding(len(fragment))
            yield padded[max(span.start - start, 0) : span.end - start]
        start += size


async def _chunks_of(content: bytes, span: ByteRange) -> AsyncIterator[bytes]:
    yield content[span.start : span.end]
