"""What the routes that ask for videos share: the body, the idempotency key, and what is refused."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import Request

from deployments.errors import QueueFullError
from deployments.http.body import parse_body, read_body
from deployments.http.door import Door
from deployments.http.errors import ApiError, reachable
from deployments.http.places import Upload
from deployments.http.request_schema import MAX_KEY_CHARACTERS
from deployments.videos.videos import picture_of
from pyramid_serve.api import VideoRecord, VideoRequest, parse_request
from pyramid_serve.storage import VideoFile, VideoNotFoundError


@contextmanager
def refusals() -> Iterator[None]:
    """What the block raises where no video can be accepted now, as ``ApiError`` 429 or 503."""
    try:
        with reachable():
            yield
    except QueueFullError as error:
        raise ApiError(429, str(error), headers={"Retry-After": str(error.retry_after_s)}) from None


async def read_request(request: Request, door: Door, upload: Upload) -> VideoRequest:
    """The request in a body. Raises ``ApiError`` and ``RequestError`` for one that is wrong."""
    body = await read_body(request, door.config.body, upload)
    fields = await asyncio.to_thread(
        parse_body,
        body,
        content_type=request.headers.get("content-type", ""),
        content_encoding=request.headers.get("content-encoding", ""),
        limits=door.config.body,
        fields_with_several_values=door.videos.models.fields_with_several_values,
    )
    parsed = parse_request(fields)
    max_picture_bytes = door.videos.models.choose(parsed.model).limits.max_picture_bytes
    if parsed.input_reference is not None and len(parsed.input_reference) > max_picture_bytes:
        came = len(parsed.input_reference)
        raise ApiError(413, f"input_reference: {came} bytes, at most {max_picture_bytes}", param="input_reference")
    return parsed


def idempotency_key(request: Request) -> str | None:
    """The key in the header, if there is one. Raises ``ApiError`` 400 for one that is too long, or empty."""
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= MAX_KEY_CHARACTERS:
        raise ApiError(
            400,
            f"Idempotency-Key: {len(key)} characters, must be 1 to {MAX_KEY_CHARACTERS}",
            param="Idempotency-Key",
        )
    return key


async def check_same(door: Door, request: VideoRequest, record: VideoRecord) -> None:
    """Raise ``ApiError`` 400 if the key was first used with another request.

    The status is not 409, because clients repeat a request after that.
    """
    model = door.videos.models.choose(request.model)
    plan = model.plan(request)
    if request.seed is None:
        plan = plan.model_copy(update={"seed": record.plan.seed})
    # `seconds` only repeats how the length was given; `num_frames` may give the same length.
    is_same = plan.model_copy(update={"seconds": record.plan.seconds}) == record.plan
    is_same = is_same and (request.user, request.metadata) == (record.user, record.metadata)
    if is_same and request.input_reference is not None:
        max_pixels = model.limits.max_picture_pixels
        is_same = await asyncio.to_thread(_is_same_picture, door, request.input_reference, record, max_pixels)
    if not is_same:
        raise key_reused(record)


def key_reused(record: VideoRecord) -> ApiError:
    """400 for a key that was first used with another request, which made this video."""
    return ApiError(
        400,
        f"Idempotency-Key: was used for {record.id}, which another request asked for; take a new key",
        param="Idempotency-Key",
        code="idempotency_key_reused",
    )


def _is_same_picture(door: Door, picture: bytes, record: VideoRecord, max_pixels: int) -> bool:
    """Whether the same video would be made of both pictures."""
    try:
        stored = door.videos.store.files.fetch(record.id, VideoFile.PICTURE)
    except VideoNotFoundError:
        return False
    given = picture_of(picture, record.plan, max_pixels=max_pixels)
    return given == picture_of(stored, record.plan, max_pixels=None)
