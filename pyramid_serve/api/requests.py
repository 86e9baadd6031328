"""Requests: what a client sends. The fields that every model takes; a family adds fields of its own."""

import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from pyramid_serve.api.errors import RequestError

MAX_SEED = 2**64 - 1
MAX_SECONDS = 3600
MAX_FRAMES = 86_400
MAX_SIDE = 99_999
"""Pixels."""
MAX_USER_CHARACTERS = 512
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY_CHARACTERS = 64
MAX_METADATA_VALUE_CHARACTERS = 512

_MAX_DRAWN_SEED = 2**31
_SIZE = re.compile(r"([1-9][0-9]{0,4})[xX*]([1-9][0-9]{0,4})")
_NO_TEXT = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)"  # C0, DEL and C1, without tab, newline and CR LF
    "|[\u202a-\u202e\u2066-\u2069]"  # these let a text be shown in another order than it has
    "|[\ud800-\udfff]"  # lone surrogates, which JSON can carry and no encoder downstream can
)


def no_bool(value: object) -> object:
    """Refuse ``true`` and ``false`` for a number, for which pydantic takes them by itself."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _check_seed(seed: int) -> int:
    if seed > MAX_SEED:  # pydantic's own message would round the bound
        raise ValueError(f"must be less than or equal to {MAX_SEED}")
    return seed


def _check_text(text: str) -> str:
    found = _NO_TEXT.search(text)
    if found is not None:
        raise ValueError(
            f"has U+{ord(found.group()):04X} at character {found.start() + 1}; must be text without control characters "
            "(except newline and tab), characters that reverse the reading direction, and halves of surrogate pairs"
        )
    return text


def _check_pairs(value: object) -> object:
    if not isinstance(value, Mapping):
        raise ValueError("must be an object whose values are texts")
    if len(value) > MAX_METADATA_PAIRS:
        raise ValueError(f"{len(value)} pairs, at most {MAX_METADATA_PAIRS}")
    return value


# The constraints come before the validators that run first: so pydantic tells them in the JSON schema.
Seed = Annotated[int, Field(ge=-1), BeforeValidator(no_bool), AfterValidator(_check_seed)]
Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS, allow_inf_nan=False), BeforeValidator(no_bool)]
Side = Annotated[int, Field(ge=1, le=MAX_SIDE), BeforeValidator(no_bool)]
FrameCount = Annotated[int, Field(ge=1, le=MAX_FRAMES), BeforeValidator(no_bool)]
FrameRate = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(no_bool)]
Text = Annotated[str, AfterValidator(_check_text)]
"""Unicode text that can be stored, encoded and shown in a terminal. Records made earlier may hold any other text."""
MetadataKey = Annotated[str, Field(min_length=1, max_length=MAX_METADATA_KEY_CHARACTERS), AfterValidator(_check_text)]
MetadataValue = Annotated[str, Field(max_length=MAX_METADATA_VALUE_CHARACTERS), AfterValidator(_check_text)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], BeforeValidator(_check_pairs)]


class VideoRequest(BaseModel):
    """What a client may ask for. A field that is left out gets the model's own value.

    Fields that are not listed here belong to the model's family, for example ``num_inference_steps``. They are checked
    when the request is planned, since only then the model is known; see ``ServedModel.plan``.
    """

    model_config = ConfigDict(extra="allow", frozen=True, hide_input_in_errors=True, use_attribute_docstrings=True)

    prompt: Text
    """What the video shows. No control characters but newline and tab."""
    model: Text | None = None
    """The public name of the model; the first of the server's unless given."""
    seconds: Seconds | None = None
    """Length, brought to the nearest that the model makes."""
    num_frames: FrameCount | None = None
    """The length in frames, instead of seconds; brought to the nearest that the model makes."""
    fps: FrameRate | None = None
    """Frames a second; the model makes no other number than its own."""
    size: str | None = None
    """WIDTHxHEIGHT in pixels; a * or X between them is taken too."""
    width: Side | None = None
    """Pixels; with height, instead of size."""
    height: Side | None = None
    """Pixels; with width, instead of size."""
    input_reference: bytes | None = None
    """The file of a picture that the video is made from."""
    negative_prompt: Text | None = None
    """What the video is not to show. No control characters but newline and tab."""
    prompt_suffix: Text | None = None
    """Added to the prompt; the model's own unless given."""
    seed: Seed | None = None
    """The same seed gives the same video; drawn and told unless given, and for -1."""
    user: Annotated[str, Field(max_length=MAX_USER_CHARACTERS), AfterValidator(_check_text)] | None = None
    """Whom the video is for. Kept and given back."""
    metadata: Metadata | None = None
    """Notes of the client. Kept and given back."""

    @field_validator("prompt")
    @classmethod
    def _not_blank(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("must not be blank")
        return prompt

    @field_validator("size")
    @classmethod
    def _is_size(cls, size: str | None) -> str | None:
        if size is None:
            return None
        found = _SIZE.fullmatch(size)
        if found is None:
            raise ValueError("must be WIDTHxHEIGHT in pixels, like 640x384")
        return f"{found[1]}x{found[2]}"

    @field_validator("seed")
    @classmethod
    def _to_be_drawn(cls, seed: int | None) -> int | None:
        return None if seed == -1 else seed

    @property
    def family_fields(self) -> dict[str, Any]:
        """The fields that only the model's family knows, as they came."""
        return dict(self.model_extra or {})

    @property
    def size_asked_for(self) -> tuple[int, int] | None:
        """(width, height) in pixels, from ``size`` or from ``width`` and ``height``; None where neither is given.

        Raises ``RequestError`` where one side is missing or the two contradict each other.
        """
        width, height = self.width, self.height
        if (width is None) != (height is None):
            given, missing = ("width", "height") if height is None else ("height", "width")
            raise RequestError(f"{missing}: is required with {given}={width or height}", param=missing)
        size = None if self.size is None else tuple(map(int, self.size.split("x")))
        if width is None or height is None:
            return None if size is None else (size[0], size[1])
        if size is not None and size != (width, height):
            raise RequestError(
                f"width={width}, height={height}: contradicts size={self.size}; give one of the two", param="width"
            )
        return width, height


def drawn_seed() -> int:
    """A seed for a video that was asked for without one: short enough to be typed."""
    return secrets.randbelow(_MAX_DRAWN_SEED)


def parse_request(fields: Mapping[str, object]) -> VideoRequest:
    """The request that these fields make. Raises ``RequestError`` naming the first field that is wrong."""
    try:
        return VideoRequest.model_validate(dict(fields))
    except ValidationError as error:
        raise request_error(error, fields) from None


def request_error(
    error: ValidationError, fields: Mapping[str, object], *, known: Iterable[str] = VideoRequest.model_fields
) -> RequestError:
    """The first problem of a failed validation as a ``RequestError`` that says what came.

    known: the names of all fields that may be given, for the message about one that may not.
    """
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    param = location[0] if location else None
    if problem["type"] == "missing":
        return RequestError(f"{param}: is required", param=param)
    if problem["type"] == "extra_forbidden":
        if len(location) > 1:
            return RequestError(f"{param}[{_shortened(repr(location[1]))}]: unknown key", param=param)
        return RequestError(f"{param}: unknown field; known are {', '.join(known)}", param=param)
    message = problem["msg"].removeprefix("Value error, ")
    where, value = _place_of(location, fields)
    came = f"={_shortened(repr(value))}" if value is not None and not isinstance(value, bytes) else ""
    return RequestError(f"{where}{came}: {message[0].lower()}{message[1:]}", param=param)


def _place_of(location: list[str], fields: Mapping[str, object]) -> tuple[str, object]:
    """How a message names the place of a problem, and what came there."""
    if not location:
        return "request", None
    param, *inner = location
    value = fields.get(param)
    if not inner or not isinstance(value, Mapping):
        return param, value
    key = inner[0]
    where = f"{param}[{_shortened(repr(key))}]"
    return where, (None if len(inner) > 1 else value.get(key))  # with more parts it is the key itself that is wrong


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
