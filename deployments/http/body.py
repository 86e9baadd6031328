"""Bodies of requests: read within limits, then JSON or a multipart form to the fields of a ``VideoRequest``."""

import asyncio
import base64
import binascii
import json
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NoReturn

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from deployments.http.errors import ApiError

Fields = dict[str, object]

JSON_TYPE = "application/json"
FORM_TYPE = "multipart/form-data"
PICTURE_FIELD = "input_reference"
METADATA_FIELD = "metadata"

_MAX_PARTS = 100


class BodyLimits(BaseModel):
    """What is taken of a body, and how long it may take to come."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_bytes: PositiveInt = 32 * 1024 * 1024
    """Larger than ``max_picture_bytes`` by a third, for a picture may come in base64."""
    max_field_bytes: PositiveInt = 1024 * 1024
    """Of one field of a form that is no file and no data URL."""
    idle_timeout_s: PositiveFloat = 15.0
    """Without a byte."""
    timeout_s: PositiveFloat = 300.0
    """For the whole."""
    discard_timeout_s: PositiveFloat = Field(default=10.0)
    """How long the rest of a body that is too large is read and thrown away: clients listen only after sending."""


async def read_body(request: Request, limits: BodyLimits) -> bytes:
    """The body, of which never more than the limit is held.

    Raises ``ApiError`` 413 for one that is too large, 408 for one that does not go on, 400 for one that breaks off.
    """
    declared = request.headers.get("content-length", "")
    is_too_large = declared.isdecimal() and int(declared[:20]) > limits.max_bytes
    body = bytearray()
    deadline = time.monotonic() + (limits.discard_timeout_s if is_too_large else limits.timeout_s)
    chunks = request.stream()
    while True:
        try:
            async with asyncio.timeout(min(limits.idle_timeout_s, deadline - time.monotonic())):
                chunk = await anext(chunks, None)
        except TimeoutError:
            if is_too_large:
                raise _too_large(limits) from None
            raise ApiError(
                408,
                f"body: {len(body)} bytes came and then nothing for {limits.idle_timeout_s:g} s, "
                f"or not all within {limits.timeout_s:g} s",
                headers={"Connection": "close"},
            ) from None
        except ClientDisconnect:
            raise ApiError(400, f"body: broke off after {len(body)} bytes", code="broken_body") from None
        if chunk is None:
            break
        if not is_too_large and len(body) + len(chunk) > limits.max_bytes:
            is_too_large = True
            deadline = time.monotonic() + limits.discard_timeout_s
        if is_too_large:
            body.clear()
        else:
            body += chunk
    if is_too_large:
        raise _too_large(limits)
    return bytes(body)


def _too_large(limits: BodyLimits) -> ApiError:
    return ApiError(413, f"body: more than {limits.max_bytes} bytes", headers={"Connection": "close"})


def parse_body(body: bytes, *, content_type: str, content_encoding: str, limits: BodyLimits) -> Fields:
    """The fields of a body by its content type. ``ApiError`` 415 for other types, 400 for what cannot be read.

    A picture becomes its bytes under ``input_reference``, whether it came as a file or as a data URL.
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
            return _from_json(body)
        case "multipart/form-data":
            return _from_form(body, boundary=options.get(b"boundary", b""), limits=limits)
        case _:
            raise ApiError(
                415,
                f"Content-Type={content_type[:60]!r}: must be {JSON_TYPE} or {FORM_TYPE}",
                param="Content-Type",
            )


# --- JSON -----------------------------------------------------------------------------------------------------------


def _from_json(body: bytes) -> Fields:
    try:
        content = json.loads(
            body.decode("utf-8"), object_pairs_hook=_without_repetition, parse_constant=_no_such_constant
        )
    except RecursionError:
        raise ApiError(400, "body: nested too deeply", code="invalid_json") from None
    except _RepetitionError as error:
        raise _repeated(error.name) from None
    except ValueError as error:
        raise ApiError(400, f"body: not valid JSON (UTF-8): {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(content, dict):
        raise ApiError(400, f"body: must be a JSON object, not {type(content).__name__}", code="invalid_json")
    for name in content:
        if not name.isascii():
            raise ApiError(400, f"{name[:60]}: unknown field", param=name[:60])
    if PICTURE_FIELD in content and content[PICTURE_FIELD] is not None:
        content[PICTURE_FIELD] = _picture_of_object(content[PICTURE_FIELD])
    return content


class _RepetitionError(ValueError):
    """An object of JSON has a name twice."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def _without_repetition(pairs: list[tuple[str, object]]) -> Fields:
    fields: Fields = {}
    for name, value in pairs:
        if name in fields:
            raise _RepetitionError(name)
        fields[name] = value
    return fields


def _no_such_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


# --- pictures -------------------------------------------------------------------------------------------------------


def _picture_of_object(value: object) -> bytes:
    """The picture of ``{"image_url": data URL}``."""
    if not isinstance(value, dict):
        raise _picture_error(f"must be {{'image_url': data URL}}, not {_name_of(value)}; files come in a form")
    unknown = sorted(value.keys() - {"image_url"})
    if unknown:
        raise _picture_error(f"{unknown[0][:60]!r} is unknown, only image_url is taken")
    if not isinstance(value.get("image_url"), str):
        raise _picture_error(f"image_url must be a data URL, not {_name_of(value.get('image_url'))}")
    return _picture_of_url(value["image_url"])


def _picture_of_url(url: str) -> bytes:
    """The content of a base64 data URL. Nothing is ever fetched from elsewhere."""
    scheme, _, rest = url.partition(":")
    if scheme.lower() != "data":
        raise _picture_error(f"image_url={url[:40]!r}: must be a data URL; nothing is fetched from elsewhere")
    kind, comma, content = rest.partition(",")
    if not comma or not kind.lower().startswith("image/") or not kind.lower().endswith(";base64"):
        raise _picture_error(f"image_url={url[:40]!r}: must be like data:image/png;base64,iVBORw0...")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _picture_error(f"image_url: not valid base64: {error}") from None


def _picture_error(message: str) -> ApiError:
    return ApiError(400, f"{PICTURE_FIELD}: {message}", param=PICTURE_FIELD)


def _name_of(value: object) -> str:
    names = {type(None): "null", str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object")


# --- forms ----------------------------------------------------------------------------------------------------------


@dataclass
class _Part:
    """One part of a multipart form."""

    headers: dict[str, bytes] = field(default_factory=dict)
    content: bytearray = field(default_factory=bytearray)
    name: str = ""
    filename: bytes | None = None
    """None where it is no file."""

    @property
    def text(self) -> str:
        try:
            return self.content.decode("utf-8")
        except UnicodeDecodeError:
            raise ApiError(400, f"{self.name[:60]}: not valid UTF-8", param=self.name[:60]) from None


def _from_form(body: bytes, *, boundary: bytes, limits: BodyLimits) -> Fields:
    """Fields of a form. A list is one field repeated, with or without ``[]``, as clients write it.

    ``metadata`` is one field for each key, ``metadata[key]``, or a single one with a JSON object.
    """
    fields: Fields = {}
    pairs: dict[str, str] = {}
    texts: dict[str, list[str]] = defaultdict(list)
    for part in _read_parts(body, boundary):
        if part.name.partition("[")[0] == PICTURE_FIELD:
            if part.filename == b"" and not part.content:
                continue  # a browser's form where no file was chosen
            if PICTURE_FIELD in fields:
                raise _repeated(PICTURE_FIELD)
            fields[PICTURE_FIELD] = _picture_of_part(part)
        elif part.filename is not None:
            raise ApiError(400, f"{part.name[:60]}: this field does not take a file", param=part.name[:60])
        elif len(part.content) > limits.max_field_bytes:
            raise ApiError(413, f"{part.name[:60]}: more than {limits.max_field_bytes} bytes", param=part.name[:60])
        elif part.name.startswith(f"{METADATA_FIELD}["):
            key = _metadata_key(part.name)
            if key in pairs:
                raise _repeated(METADATA_FIELD, part.name)
            pairs[key] = part.text
        else:
            texts[part.name.removesuffix("[]")].append(part.text)
    if pairs:
        if METADATA_FIELD in texts:
            raise _repeated(METADATA_FIELD)
        fields[METADATA_FIELD] = pairs
    for name, values in texts.items():
        fields[name] = values[0] if len(values) == 1 else _numbers(name, values)
    if METADATA_FIELD in texts:
        fields[METADATA_FIELD] = _metadata_of_text(texts[METADATA_FIELD][0])
    return fields


def _metadata_key(name: str) -> str:
    """The key of a field ``metadata[key]``."""
    key = name.removeprefix(f"{METADATA_FIELD}[").removesuffix("]")
    if not name.endswith("]") or "][" in key:
        raise ApiError(
            400, f"{name[:60]}: must be {METADATA_FIELD}[key], with a text as its value", param=METADATA_FIELD
        )
    return key


def _metadata_of_text(text: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_without_repetition, parse_constant=_no_such_constant)
    except _RepetitionError as error:
        raise _repeated(METADATA_FIELD, f"{METADATA_FIELD}[{error.name}]") from None
    except (ValueError, RecursionError):
        raise ApiError(
            400,
            f"{METADATA_FIELD}={text[:60]!r}: must be a JSON object, or fields like {METADATA_FIELD}[key]",
            param=METADATA_FIELD,
        ) from None


def _picture_of_part(part: _Part) -> bytes:
    """A picture as a file, as ``input_reference[image_url]`` or as the JSON object that has it."""
    if part.name == f"{PICTURE_FIELD}[image_url]":
        return _picture_of_url(part.text)
    if part.name != PICTURE_FIELD:
        raise _picture_error(f"{part.name[:60]!r} is unknown, only image_url is taken")
    if part.filename is not None:
        return bytes(part.content)
    try:
        return _picture_of_object(json.loads(part.text))
    except (ValueError, RecursionError):
        raise _picture_error("must be a file, or image_url with a data URL, not a text") from None


def _repeated(name: str, said: str | None = None) -> ApiError:
    """``said``: how the message names the field, where that is not its ``name``."""
    return ApiError(400, f"{(said or name)[:60]}: given more than once", param=name[:60])


def _numbers(name: str, values: list[str]) -> list[int]:
    """The only fields with several values are numbers of steps."""
    if name not in ("num_inference_steps", "video_num_inference_steps"):
        raise _repeated(name)
    if not all(value.strip().isdecimal() and len(value) < 20 for value in values):
        raise ApiError(400, f"{name}={values!r:.60}: must be whole numbers", param=name)
    return [int(value) for value in values]


def _read_parts(body: bytes, boundary: bytes) -> list[_Part]:
    """The parts of a form that is whole. ``ApiError`` 400 for one that is broken or cut short."""
    if not boundary:
        raise ApiError(400, f"Content-Type: {FORM_TYPE} without a boundary", param="Content-Type", code="broken_body")
    parts: list[_Part] = []
    header_name, header_value = bytearray(), bytearray()
    is_whole = False

    def begin_part() -> None:
        if len(parts) == _MAX_PARTS:
            raise ApiError(400, f"body: more than {_MAX_PARTS} fields", code="broken_body")
        parts.append(_Part())

    def end_header() -> None:
        parts[-1].headers[header_name.decode("latin-1").lower()] = bytes(header_value)
        header_name.clear()
        header_value.clear()

    def end_headers() -> None:
        _name_part(parts[-1])

    def end() -> None:
        nonlocal is_whole
        is_whole = True

    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": begin_part,
                "on_part_data": lambda content, start, stop: parts[-1].content.extend(content[start:stop]),
                "on_header_field": lambda content, start, stop: header_name.extend(content[start:stop]),
                "on_header_value": lambda content, start, stop: header_value.extend(content[start:stop]),
                "on_header_end": end_header,
                "on_headers_finished": end_headers,
                "on_end": end,
            },
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise ApiError(400, f"body: not valid {FORM_TYPE}: {str(error)[:200]}", code="broken_body") from None
    if not is_whole:
        raise ApiError(400, f"body: {FORM_TYPE} is cut short: its last boundary is missing", code="broken_body")
    return parts


def _name_part(part: _Part) -> None:
    disposition, options = parse_options_header(part.headers.get("content-disposition"))
    if disposition != b"form-data" or not options.get(b"name"):
        raise ApiError(400, "body: a part of the form has no name", code="broken_body")
    part.name = options[b"name"].decode("utf-8", errors="replace")
    part.filename = options.get(b"filename")
