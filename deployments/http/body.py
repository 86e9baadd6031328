"""The body of a request for a video: read within limits, then parsed to the fields of a ``VideoRequest``."""

import asyncio
import time
from collections.abc import Container
from typing import Self

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, model_validator
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect, Request

from deployments.http.errors import ApiError, repeated_field
from deployments.http.forms import FORM_TYPE, fields_of_form
from deployments.http.picture_field import PICTURE_FIELD, picture_of_object
from deployments.http.places import Upload
from deployments.http.strict_json import RepeatedNameError, load_json

JSON_TYPE = "application/json"


class BodyLimits(BaseModel):
    """How large a body may be, how long it may take to arrive, and what all bodies of a replica may take together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_bytes: PositiveInt = 32 * 1024 * 1024
    """Should exceed ``max_picture_bytes`` by a third, because a picture may be sent in base64."""
    max_field_bytes: PositiveInt = 1024 * 1024
    """The limit for each form field except the picture."""
    max_uploads: PositiveInt = 500
    """How many bodies are read at once."""
    max_total_bytes: PositiveInt = 256 * 1024 * 1024
    """How many bytes all bodies together may hold until their videos are accepted."""
    idle_timeout_s: PositiveFloat = 15.0
    """How long the client may send nothing."""
    min_bytes_per_s: PositiveFloat = 1024.0
    """The slowest a body may arrive on the whole, after the first ``idle_timeout_s``."""
    timeout_s: PositiveFloat = 300.0
    """How long the whole body may take."""
    discard_timeout_s: PositiveFloat = 10.0
    """How long a body whose declared length is too large is read and discarded, as many clients only read the answer
    after sending. A body of unknown length is not discarded: the answer comes at once, and the connection is closed."""

    @model_validator(mode="after")
    def _check_total(self) -> Self:
        if self.max_total_bytes < self.max_bytes:
            raise ValueError(
                f"max_total_bytes={self.max_total_bytes}: must be at least max_bytes, which is {self.max_bytes}"
            )
        return self


async def read_body(request: Request, limits: BodyLimits, upload: Upload) -> bytes:
    """The whole body, whose bytes ``upload`` holds. Never more than ``limits.max_bytes`` are kept in memory.

    Raises ``ApiError`` 413 for a body that is too large, 408 for one that stops arriving or arrives too slowly, 429 for
    one that does not fit beside the others, and 400 for one that breaks off.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limits.max_bytes:
        await _discard(request, int(declared[:20]), limits, upload)
        raise _too_large(limits)
    body = bytearray()
    started = time.monotonic()
    chunks = request.stream()
    while True:
        slowest_s = min(limits.timeout_s, limits.idle_timeout_s + len(body) / limits.min_bytes_per_s)
        try:
            async with asyncio.timeout(min(limits.idle_timeout_s, started + slowest_s - time.monotonic())):
                chunk = await anext(chunks, None)
        except TimeoutError:
            raise ApiError(
                408,
                f"body: {len(body)} bytes came and then nothing for {limits.idle_timeout_s:g} s, "
                f"or less than {limits.min_bytes_per_s:g} bytes a second, or not all within {limits.timeout_s:g} s",
                headers={"Connection": "close"},
            ) from None
        except ClientDisconnect:
            raise ApiError(400, f"body: broke off after {len(body)} bytes", code="broken_body") from None
        if chunk is None:
            return bytes(body)
        if len(body) + len(chunk) > limits.max_bytes:
            raise _too_large(limits)
        upload.hold(len(chunk))
        body += chunk


async def _discard(request: Request, declared: int, limits: BodyLimits, upload: Upload) -> None:
    """Read a body that is too large and keep nothing of it, for as long as the limits allow.

    Its bytes count all the same, because what is in front of this process reads ahead of it.
    """
    if not upload.has_room(declared):
        return
    upload.hold(declared)
    deadline = time.monotonic() + limits.discard_timeout_s
    chunks = request.stream()
    try:
        while True:
            async with asyncio.timeout(min(limits.idle_timeout_s, deadline - time.monotonic())):
                if await anext(chunks, None) is None:
                    return
    except (TimeoutError, ClientDisconnect):
        return


def _too_large(limits: BodyLimits) -> ApiError:
    return ApiError(413, f"body: more than {limits.max_bytes} bytes", headers={"Connection": "close"})


def parse_body(
    body: bytes,
    *,
    content_type: str,
    content_encoding: str,
    limits: BodyLimits,
    fields_with_several_values: Container[str] = (),
) -> dict[str, object]:
    """The fields of a JSON or form body. ``ApiError`` 415 for other content types, 400 for a body that is not valid.

    ``input_reference`` holds the bytes of the picture, no matter whether it was sent as a file or as a data URL.
    """
    if content_encoding.lower() not in ("", "identity"):
        raise ApiError(
            415,
            f"Content-Encoding={content_encoding[:60]!r}: compressed bodies are not taken",
            param="Content-Encoding",
        )
    kind, options = parse_options_header(content_type)
    charset = options.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in ("utf-8", "utf8", "us-ascii"):
        raise ApiError(415, f"Content-Type: charset={charset[:40]!r}: must be utf-8", param="Content-Type")
    match kind.decode("latin-1"):
        case "application/json":
            return _fields_of_json(body)
        case "multipart/form-data":
            return fields_of_form(
                body,
                boundary=options.get(b"boundary", b""),
                max_field_bytes=limits.max_field_bytes,
                fields_with_several_values=fields_with_several_values,
            )
        case _:
            raise ApiError(
                415,
                f"Content-Type={content_type[:60]!r}: must be {JSON_TYPE} or {FORM_TYPE}",
                param="Content-Type",
            )


def _fields_of_json(body: bytes) -> dict[str, object]:
    try:
        content = load_json(body.decode("utf-8"))
    except RecursionError:
        raise ApiError(400, "body: nested too deeply", code="invalid_json") from None
    except RepeatedNameError as error:
        raise repeated_field(error.name) from None
    except ValueError as error:
        raise ApiError(400, f"body: not valid JSON (UTF-8): {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(content, dict):
        raise ApiError(400, f"body: must be a JSON object, not {type(content).__name__}", code="invalid_json")
    for name in content:
        if not name.isascii():
            raise ApiError(400, f"{name[:60]}: unknown field", param=name[:60])
    if PICTURE_FIELD in content and content[PICTURE_FIELD] is not None:
        content[PICTURE_FIELD] = picture_of_object(content[PICTURE_FIELD])
    return content
