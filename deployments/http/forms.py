"""Bodies of the type ``multipart/form-data``."""

import json
from collections import defaultdict
from collections.abc import Container
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from deployments.http.errors import ApiError, repeated_field
from deployments.http.picture_field import PICTURE_FIELD, picture_error, picture_of_object, picture_of_url
from deployments.http.strict_json import RepeatedNameError, load_json

FORM_TYPE = "multipart/form-data"
METADATA_FIELD = "metadata"

_MAX_PARTS = 100


@dataclass
class _Part:
    """One part of a multipart form."""

    headers: dict[str, bytes] = field(default_factory=dict)
    content: bytearray = field(default_factory=bytearray)
    name: str = ""
    filename: bytes | None = None
    """None if the part is not a file."""

    @property
    def text(self) -> str:
        try:
            return self.content.decode("utf-8")
        except UnicodeDecodeError:
            raise ApiError(400, f"{self.name[:60]}: not valid UTF-8", param=self.name[:60]) from None


def fields_of_form(
    body: bytes, *, boundary: bytes, max_field_bytes: int, fields_with_several_values: Container[str]
) -> dict[str, object]:
    """The fields of a form. A list is a field that is repeated, with or without ``[]`` after its name.

    ``metadata`` is one field for each key, ``metadata[key]``, or a single field with a JSON object. Raises ``ApiError``
    400 for a form that is not valid, 413 for a field (except the picture) of more than ``max_field_bytes``.
    """
    fields: dict[str, object] = {}
    pairs: dict[str, str] = {}
    texts: dict[str, list[str]] = defaultdict(list)
    for part in _read_parts(body, boundary):
        if part.name.partition("[")[0] == PICTURE_FIELD:
            if part.filename == b"" and not part.content:
                continue  # a browser's form where no file was chosen
            if PICTURE_FIELD in fields:
                raise repeated_field(PICTURE_FIELD)
            fields[PICTURE_FIELD] = _picture_of_part(part)
        elif part.filename is not None:
            raise ApiError(400, f"{part.name[:60]}: this field does not take a file", param=part.name[:60])
        elif len(part.content) > max_field_bytes:
            raise ApiError(413, f"{part.name[:60]}: more than {max_field_bytes} bytes", param=part.name[:60])
        elif part.name.startswith(f"{METADATA_FIELD}["):
            key = _metadata_key(part.name)
            if key in pairs:
                raise repeated_field(METADATA_FIELD, part.name)
            pairs[key] = part.text
        else:
            texts[part.name.removesuffix("[]")].append(part.text)
    if pairs:
        if METADATA_FIELD in texts:
            raise repeated_field(METADATA_FIELD)
        fields[METADATA_FIELD] = pairs
    for name, values in texts.items():
        if len(values) > 1 and name not in fields_with_several_values:
            raise repeated_field(name)
        fields[name] = values[0] if len(values) == 1 else _list_of(values)
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
        value: object = load_json(text)
        return value
    except RepeatedNameError as error:
        raise repeated_field(METADATA_FIELD, f"{METADATA_FIELD}[{error.name}]") from None
    except (ValueError, RecursionError):
        raise ApiError(
            400,
            f"{METADATA_FIELD}={text[:60]!r}: must be a JSON object, or fields like {METADATA_FIELD}[key]",
            param=METADATA_FIELD,
        ) from None


def _picture_of_part(part: _Part) -> bytes:
    """The bytes of a picture sent as a file, as ``input_reference[image_url]``, or as a JSON object."""
    if part.name == f"{PICTURE_FIELD}[image_url]":
        return picture_of_url(part.text)
    if part.name != PICTURE_FIELD:
        raise picture_error(f"{part.name[:60]!r} is unknown, only image_url is taken")
    if part.filename is not None:
        return bytes(part.content)
    try:
        return picture_of_object(json.loads(part.text))
    except (ValueError, RecursionError):
        raise picture_error("must be a file, or image_url with a data URL, not a text") from None


def _list_of(values: list[str]) -> list[int] | list[str]:
    """The values of a repeated field: whole numbers, or texts if any is something else."""
    if all(value.strip().isdecimal() and len(value) < 20 for value in values):
        return [int(value) for value in values]
    return values


def _read_parts(body: bytes, boundary: bytes) -> list[_Part]:
    """The parts of a form. ``ApiError`` 400 for a form that is not valid or is cut short."""
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
