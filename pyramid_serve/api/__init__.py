"""Requests for videos and records of them, as clients see them: over HTTP, over Ray handles and on disk.

A ``VideoRequest`` is what a client sends; ``resolve`` makes of it a ``VideoSpec``, which leaves nothing open, so that
the same spec is the same video; a ``VideoRecord`` is what is known of one accepted video, and what ``video.json``
holds.
"""

import json
import math
import re
import secrets
import time
from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from pyramid_serve.pyramid_flow.shapes import (
    FRAMES_PER_SECOND,
    NUM_STAGES,
    LatentShape,
    nearest_num_latent_frames,
    num_frames_of,
    seconds_of,
)

if TYPE_CHECKING:  # torch takes seconds to import, and clients and claims need none of it
    from pyramid_serve.checkpoints import Capabilities
    from pyramid_serve.pyramid_flow.pipeline import VideoSettings
    from pyramid_serve.pyramid_flow.sampler import SamplingSettings

MAX_SEED = 2**64 - 1
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0
MAX_SECONDS = 3600
MAX_SIDE = 99_999
"""Pixels."""
MAX_USER_CHARACTERS = 512
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY_CHARACTERS = 64
MAX_METADATA_VALUE_CHARACTERS = 512
MODEL_NOT_FOUND = "model_not_found"
_MAX_DRAWN_SEED = 2**31

Value = TypeVar("Value")

_VIDEO_ID = re.compile(r"video_[0-9a-f]{32}")
_SIZE = re.compile(r"([1-9][0-9]{0,4})[xX*]([1-9][0-9]{0,4})")
_NO_TEXT = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)"  # C0, DEL and C1, without tab, newline and CR LF
    "|[\u202a-\u202e\u2066-\u2069]"  # these let a text be shown in another order than it has
    "|[\ud800-\udfff]"  # lone surrogates, which JSON can carry and no encoder downstream can
)


class RequestError(ValueError):
    """A request that cannot be met. ``param`` names the field; the message what came and what is allowed.

    ``code`` tells programs apart what is more than a wrong value, such as ``MODEL_NOT_FOUND``.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return _request_error, (str(self), self.param, self.code)


def _request_error(message: str, param: str | None, code: str | None) -> RequestError:
    return RequestError(message, param=param, code=code)


# --- ids ------------------------------------------------------------------------------------------------------------


def new_video_id(created_at: float | None = None) -> str:
    """``video_`` and 32 hexadecimal digits: 12 of the time in milliseconds, 20 drawn. Ids sort by time."""
    milliseconds = int((time.time() if created_at is None else created_at) * 1000)
    return f"video_{milliseconds:012x}{secrets.token_hex(10)}"


def is_video_id(text: str) -> bool:
    """Whether a text has the form of an id; to be asked before it goes near the storage."""
    return _VIDEO_ID.fullmatch(text) is not None


def created_at_of(video_id: str) -> float:
    """Unix seconds at which an id was drawn."""
    if not is_video_id(video_id):
        raise RequestError(f"id={video_id[:60]!r}: must be video_ and 32 hexadecimal digits", param="id")
    return int(video_id[6:18], 16) / 1000


# --- requests -------------------------------------------------------------------------------------------------------


def _parse_steps(value: object) -> object:
    """One number, or three; also as text, as multipart forms send them: ``20``, ``20,20,20`` or ``[20, 20, 20]``."""
    if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], list):
        value = value[0]
    if isinstance(value, str):
        text = value.strip()
        try:
            value = json.loads(text if text.startswith("[") else f"[{text}]")
        except (ValueError, RecursionError):
            raise ValueError("must be one whole number, or one for each of the 3 stages") from None
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(value, bool) or not isinstance(value, int | list | tuple):
        raise ValueError("must be one whole number, or one for each of the 3 stages")
    steps = (value,) * NUM_STAGES if isinstance(value, int) else tuple(value)
    if len(steps) != NUM_STAGES:
        raise ValueError(f"must be one whole number, or one for each of the {NUM_STAGES} stages")
    return steps


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


_StepCount = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=MAX_STEPS)]
StageSteps = tuple[_StepCount, _StepCount, _StepCount]
"""Denoising steps of each stage."""
Guidance = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)]


def _check_seed(seed: int) -> int:
    if seed > MAX_SEED:  # pydantic's own message would round the bound
        raise ValueError(f"must be less than or equal to {MAX_SEED}")
    return seed


Seed = Annotated[int, BeforeValidator(_no_bool), Field(ge=-1), AfterValidator(_check_seed)]
Seconds = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, le=MAX_SECONDS, allow_inf_nan=False)]
Side = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=MAX_SIDE)]
FrameCount = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=MAX_SECONDS * FRAMES_PER_SECOND)]
FrameRate = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]


def _check_text(text: str) -> str:
    found = _NO_TEXT.search(text)
    if found is not None:
        raise ValueError(
            f"has U+{ord(found.group()):04X} at character {found.start() + 1}; must be text without control characters "
            "(except newline and tab), characters that reverse the reading direction, and halves of surrogate pairs"
        )
    return text


Text = Annotated[str, AfterValidator(_check_text)]
"""Unicode text that can be stored, encoded and shown in a terminal. Records made before may hold any other."""
MetadataKey = Annotated[str, Field(min_length=1, max_length=MAX_METADATA_KEY_CHARACTERS), AfterValidator(_check_text)]
MetadataValue = Annotated[str, Field(max_length=MAX_METADATA_VALUE_CHARACTERS), AfterValidator(_check_text)]


def _check_pairs(value: object) -> object:
    if not isinstance(value, Mapping):
        raise ValueError("must be an object whose values are texts")
    if len(value) > MAX_METADATA_PAIRS:
        raise ValueError(f"{len(value)} pairs, at most {MAX_METADATA_PAIRS}")
    return value


Metadata = Annotated[dict[MetadataKey, MetadataValue], BeforeValidator(_check_pairs)]


class VideoRequest(BaseModel):
    """What a client may ask for. What it leaves out is the model's choice, see ``resolve``."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    prompt: Text
    model: Text | None = None
    seconds: Seconds | None = None
    """Length, a number or a text that is one; brought to the nearest that can be made."""
    num_frames: FrameCount | None = None
    """The length in frames, instead of ``seconds``; brought to the nearest that can be made."""
    fps: FrameRate | None = None
    """Frames a second. The model makes 24, and nothing else is taken."""
    size: str | None = None
    """``WIDTHxHEIGHT`` in pixels; a ``*`` or ``X`` between them is taken too."""
    width: Side | None = None
    """Pixels; with ``height``, instead of ``size``."""
    height: Side | None = None
    """Pixels; with ``width``, instead of ``size``."""
    input_reference: bytes | None = None
    """The file of a picture that the video begins with."""
    negative_prompt: Text | None = None
    prompt_suffix: Text | None = None
    """Added to the prompt; the model's own unless given."""
    seed: Seed | None = None
    """None: drawn. -1 becomes None."""
    num_inference_steps: Annotated[StageSteps, BeforeValidator(_parse_steps)] | None = None
    """Of unit 0 at each stage."""
    video_num_inference_steps: Annotated[StageSteps, BeforeValidator(_parse_steps)] | None = None
    """Of the other units at each stage."""
    guidance_scale: Guidance | None = None
    video_guidance_scale: Guidance | None = None
    linear_guidance_alpha: Guidance | None = None
    """Guidance falls by so much with each unit, down to ``linear_guidance_minimum``, instead of being
    ``video_guidance_scale``; see ``sampler.LinearGuidance``. It does when either of the two is given."""
    linear_guidance_minimum: Guidance | None = None
    user: Annotated[str, Field(max_length=MAX_USER_CHARACTERS), AfterValidator(_check_text)] | None = None
    """Whom the video is for, in the client's own words. Kept and given back, and not used."""
    metadata: Metadata | None = None
    """The client's own notes. Kept and given back, and not used."""

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

    @field_validator("fps")
    @classmethod
    def _is_made(cls, fps: float | None) -> float | None:
        if fps is not None and fps != FRAMES_PER_SECOND:
            raise ValueError(f"must be {FRAMES_PER_SECOND}, which is what the model makes")
        return fps

    @field_validator("seed")
    @classmethod
    def _to_be_drawn(cls, seed: int | None) -> int | None:
        return None if seed == -1 else seed


def parse_request(fields: Mapping[str, object]) -> VideoRequest:
    """The request that these fields make. Raises ``RequestError`` naming the first field that is wrong."""
    try:
        return VideoRequest.model_validate(dict(fields))
    except ValidationError as error:
        raise request_error(error, fields) from None


def request_error(error: ValidationError, fields: Mapping[str, object]) -> RequestError:
    """The first problem of a failed validation as a ``RequestError``, saying what came."""
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    param = location[0] if location else None
    if problem["type"] == "missing":
        return RequestError(f"{param}: is required", param=param)
    if problem["type"] == "extra_forbidden":
        known = ", ".join(VideoRequest.model_fields)
        return RequestError(f"{param}: unknown field; known are {known}", param=param)
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
    return where, (None if len(inner) > 1 else value.get(key))  # more: the key itself is wrong


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


class RequestLimits(BaseModel):
    """What a deployment takes at most, where the model itself sets no bound."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_prompt_characters: Annotated[int, Field(ge=1)] = 4000
    """Of the prompt, and of the negative prompt and the suffix each."""
    max_pixels: Annotated[int, Field(ge=64 * 64)] = 1024 * 1024
    """Width times height."""
    max_num_latent_frames: Annotated[int, Field(ge=1)] = 61
    max_num_inference_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] = 100
    """Of one stage."""
    max_picture_bytes: Annotated[int, Field(ge=1)] = 20 * 1024 * 1024
    max_picture_pixels: Annotated[int, Field(ge=1)] = 32 * 1024 * 1024


# --- specs ----------------------------------------------------------------------------------------------------------


class VideoSpec(BaseModel):
    """Everything that decides a video, and nothing else. Sizes in pixels."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    prompt: str
    prompt_suffix: str
    negative_prompt: str
    seconds: str
    """The length that was asked for, or else the one that it has."""
    width: int
    height: int
    num_latent_frames: int
    seed: int
    num_inference_steps: StageSteps
    video_num_inference_steps: StageSteps
    guidance_scale: float
    video_guidance_scale: float
    """Of no effect where guidance is linear."""
    linear_guidance_alpha: float | None = None
    """None: guidance is not linear."""
    linear_guidance_minimum: float | None = None
    """None exactly where ``linear_guidance_alpha`` is."""
    has_picture: bool = False
    """Unit 0 is made of ``input.png``."""

    @property
    def latent_shape(self) -> LatentShape:
        return LatentShape.of_pixels(height=self.height, width=self.width, num_latent_frames=self.num_latent_frames)

    @property
    def num_frames(self) -> int:
        return num_frames_of(self.num_latent_frames)

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def full_prompt(self) -> str:
        """The prompt with its suffix, as it is encoded."""
        return self.prompt + self.prompt_suffix

    def num_steps_of(self, unit: int) -> int:
        """Denoising steps of a unit over all stages; none where it is a given picture."""
        if unit == 0:
            return 0 if self.has_picture else sum(self.num_inference_steps)
        return sum(self.video_num_inference_steps)

    @property
    def num_steps(self) -> int:
        """Denoising steps of the whole video, which is at least 1 so that it may divide."""
        return max(sum(self.num_steps_of(unit) for unit in range(self.num_latent_frames)), 1)

    @property
    def settings(self) -> "VideoSettings":
        """The same for the library's own pipeline."""
        from pyramid_serve.pyramid_flow.pipeline import VideoSettings

        return VideoSettings(
            width=self.width,
            height=self.height,
            num_latent_frames=self.num_latent_frames,
            sampling=self.sampling,
            prompt_suffix=self.prompt_suffix,
            negative_prompt=self.negative_prompt,
        )

    @property
    def sampling(self) -> "SamplingSettings":
        from pyramid_serve.pyramid_flow.sampler import LinearGuidance, SamplingSettings

        linear_guidance = None
        if self.linear_guidance_alpha is not None and self.linear_guidance_minimum is not None:
            linear_guidance = LinearGuidance(self.linear_guidance_alpha, self.linear_guidance_minimum)
        return SamplingSettings(
            num_inference_steps=self.num_inference_steps,
            video_num_inference_steps=self.video_num_inference_steps,
            guidance_scale=self.guidance_scale,
            video_guidance_scale=self.video_guidance_scale,
            linear_guidance=linear_guidance,
        )


def resolve(
    request: VideoRequest, capabilities: "Capabilities", model: str, *, limits: RequestLimits | None = None
) -> VideoSpec:
    """What a request comes to with the model served under the name ``model``; its seed is drawn where none is given.

    What is not asked for is the model's own, cut to ``limits`` in length and steps. Raises ``RequestError`` for what
    the model was not trained for or ``limits`` refuse.
    """
    limits = limits or RequestLimits()
    if request.model is not None and request.model != model:
        raise unknown_model(request.model, model)
    _check_texts(request, limits)
    if request.input_reference is not None and len(request.input_reference) > limits.max_picture_bytes:
        raise RequestError(
            f"input_reference: {len(request.input_reference)} bytes, at most {limits.max_picture_bytes}",
            param="input_reference",
        )
    width, height = _resolve_size(request, capabilities, limits)
    num_latent_frames = _resolve_length(request, capabilities, limits)
    linear_guidance_alpha, linear_guidance_minimum = _resolve_linear_guidance(request)
    if request.input_reference is not None and num_latent_frames == 1:
        raise RequestError(
            "input_reference: a picture is the first frame, and this video has no other; ask for more seconds",
            param="input_reference",
        )
    has_picture = request.input_reference is not None
    default_video_guidance = (
        capabilities.image_video_guidance_scale if has_picture else capabilities.video_guidance_scale
    )
    return VideoSpec(
        model=model,
        prompt=request.prompt,
        prompt_suffix=_or(request.prompt_suffix, capabilities.prompt_suffix),
        negative_prompt=_or(request.negative_prompt, capabilities.negative_prompt),
        seconds=_text_of_seconds(request.seconds, num_latent_frames),
        width=width,
        height=height,
        num_latent_frames=num_latent_frames,
        seed=secrets.randbelow(_MAX_DRAWN_SEED) if request.seed is None else request.seed,
        num_inference_steps=_resolve_steps(
            "num_inference_steps", request.num_inference_steps, capabilities.num_inference_steps, limits
        ),
        video_num_inference_steps=_resolve_steps(
            "video_num_inference_steps",
            request.video_num_inference_steps,
            capabilities.video_num_inference_steps,
            limits,
        ),
        guidance_scale=_or(request.guidance_scale, capabilities.guidance_scale),
        video_guidance_scale=_or(request.video_guidance_scale, default_video_guidance),
        linear_guidance_alpha=linear_guidance_alpha,
        linear_guidance_minimum=linear_guidance_minimum,
        has_picture=has_picture,
    )


def unknown_model(asked: str, served: str) -> RequestError:
    """The error of a request for a model that is not the one served."""
    return RequestError(f"model={asked[:60]!r}: this server has {served!r}", param="model", code=MODEL_NOT_FOUND)


def _or(given: Value | None, default: Value) -> Value:
    return default if given is None else given


def _check_texts(request: VideoRequest, limits: RequestLimits) -> None:
    texts = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "prompt_suffix": request.prompt_suffix,
    }
    for name, text in texts.items():
        if text is not None and len(text) > limits.max_prompt_characters:
            raise RequestError(
                f"{name}: {len(text)} characters, at most {limits.max_prompt_characters}",
                param=name,
            )


def _resolve_size(request: VideoRequest, capabilities: "Capabilities", limits: RequestLimits) -> tuple[int, int]:
    width, height = _size_asked_for(request) or capabilities.default_size
    param, came = "size", f"size={width}x{height}"
    if request.size is None and request.width is not None:
        param, came = "width", f"width={width}, height={height}"
    try:
        capabilities.check_size(width, height)
    except ValueError as error:
        raise RequestError(f"{came}: {str(error).partition(': ')[2]}", param=param) from None
    if width * height > limits.max_pixels:
        raise RequestError(f"{came}: {width * height} pixels, at most {limits.max_pixels}", param=param)
    return width, height


def _size_asked_for(request: VideoRequest) -> tuple[int, int] | None:
    """(width, height) in pixels, from ``size`` or from ``width`` and ``height``."""
    width, height = request.width, request.height
    if (width is None) != (height is None):
        given, missing = ("width", "height") if height is None else ("height", "width")
        raise RequestError(f"{missing}: is required with {given}={_or(width, height)}", param=missing)
    size = None if request.size is None else tuple(map(int, request.size.split("x")))
    if width is None or height is None:
        return None if size is None else (size[0], size[1])
    if size is not None and size != (width, height):
        raise RequestError(
            f"width={width}, height={height}: contradicts size={request.size}; give one of the two", param="width"
        )
    return width, height


def _resolve_length(request: VideoRequest, capabilities: "Capabilities", limits: RequestLimits) -> int:
    longest = longest_of(capabilities, limits)
    asked = {}
    if request.seconds is not None:
        asked["seconds"] = nearest_num_latent_frames(request.seconds)
    if request.num_frames is not None:
        asked["num_frames"] = nearest_num_latent_frames(request.num_frames / FRAMES_PER_SECOND)
    if not asked:
        return default_length_of(capabilities, limits)
    if len(set(asked.values())) > 1:
        raise RequestError(
            f"num_frames={request.num_frames}: contradicts seconds={request.seconds:g}, which is "
            f"{num_frames_of(asked['seconds'])} frames at {FRAMES_PER_SECOND} fps; give one of the two",
            param="num_frames",
        )
    param, num_latent_frames = next(iter(asked.items()))
    if num_latent_frames > longest:
        came = f"num_frames={request.num_frames}:"
        if request.seconds is not None:
            num_frames = num_frames_of(num_latent_frames)
            came = f"seconds={request.seconds:g}: {num_frames} frames at {FRAMES_PER_SECOND} fps;"
        length = "a single picture" if longest == 1 else f"{seconds_of(longest):.3g} s"
        raise RequestError(f"{came} at most {num_frames_of(longest)} ({length}) are made here", param=param)
    return num_latent_frames


def _resolve_linear_guidance(request: VideoRequest) -> tuple[float | None, float | None]:
    """Alpha and minimum, or None for both where guidance is not linear."""
    given = {
        "linear_guidance_alpha": request.linear_guidance_alpha,
        "linear_guidance_minimum": request.linear_guidance_minimum,
    }
    names = [name for name, value in given.items() if value is not None]
    if not names:
        return None, None
    if request.video_guidance_scale is not None:
        raise RequestError(
            f"{names[0]}={given[names[0]]:g}: contradicts video_guidance_scale={request.video_guidance_scale:g}, "
            "which linear guidance replaces; give one of the two",
            param=names[0],
        )
    from pyramid_serve.pyramid_flow.sampler import LinearGuidance

    default = LinearGuidance()
    return _or(request.linear_guidance_alpha, default.alpha), _or(request.linear_guidance_minimum, default.minimum)


def default_length_of(capabilities: "Capabilities", limits: RequestLimits) -> int:
    """The units of a video whose length is not asked for."""
    return min(capabilities.default_num_latent_frames, longest_of(capabilities, limits))


def longest_of(capabilities: "Capabilities", limits: RequestLimits) -> int:
    """The most units that a video may have."""
    return min(capabilities.max_num_latent_frames or limits.max_num_latent_frames, limits.max_num_latent_frames)


def _resolve_steps(name: str, given: StageSteps | None, default: StageSteps, limits: RequestLimits) -> StageSteps:
    most = limits.max_num_inference_steps
    if given is not None and max(given) > most:
        raise RequestError(f"{name}={list(given)}: at most {most} each", param=name)
    return steps_within(default, limits) if given is None else given


def steps_within(steps: StageSteps, limits: RequestLimits) -> StageSteps:
    """A model's own steps, cut to what is made at most."""
    first, second, third = (min(number, limits.max_num_inference_steps) for number in steps)
    return first, second, third


def _text_of_seconds(seconds: float | None, num_latent_frames: int) -> str:
    return f"{seconds:g}" if seconds is not None else f"{seconds_of(num_latent_frames):.2f}".rstrip("0").rstrip(".")


# --- records --------------------------------------------------------------------------------------------------------


class Status(StrEnum):
    """Clients stop polling at a status that they do not know, so there is no other."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"


class Stage(StrEnum):
    """What the timeline tells apart. Not a stage of the pyramid."""

    ENCODE = "encode"
    PICTURE = "picture"
    DENOISE = "denoise"
    DECODE = "decode"
    SAVE = "save"


class TimelineEntry(BaseModel):
    """One piece of work: where and when (unix seconds). ``unit`` is None for what concerns the whole video."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: Stage
    unit: int | None
    start: float
    end: float
    replica: str


class Computed(BaseModel):
    """What a part of the pipeline computed in: a dtype such as ``bfloat16``, on a device such as ``cpu``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    part: str
    """``text_encoder``, ``denoiser`` or ``decoder``."""
    dtype: str
    device: str


class VideoError(BaseModel):
    """Why a video failed: ``cancelled``, ``too_many_attempts``, ``invalid_input``, ``non_finite``, ``server_error``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    code: str
    message: str


class VideoRecord(BaseModel):
    """All that is known of an accepted video; the content of ``video.json``. Times in unix seconds.

    A record is never changed in place: ``record.model_copy(update=...)``. Only the claims deployment writes it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    created_at: float
    spec: VideoSpec
    status: Status = Status.QUEUED
    error: VideoError | None = None
    revision: int = 0
    """Grows with every change, for those who wait for one."""
    num_steps_done: int = 0
    num_units_denoised: int = 0
    """Units whose latents are saved."""
    num_units_done: int = 0
    """Units whose frames are saved, and so can be watched."""
    attempts: int = 0
    """Times that an orchestrator took the video up; also tells a late writer from the owner."""
    num_failures: int = 0
    """Attempts that ended with an error since a unit was last finished."""
    num_losses: int = 0
    """Owners lost since a unit was last finished."""
    not_before: float = 0.0
    """Not to be taken up again earlier."""
    owner: str | None = None
    """Replica that works on it, as long as ``lease_expires_at`` is not past."""
    lease_expires_at: float | None = None
    started_at: float | None = None
    """When a denoiser first took it."""
    first_frame_at: float | None = None
    completed_at: float | None = None
    """When it ended, well or badly."""
    expires_at: float | None = None
    """When it may be swept away; set when it ends."""
    num_units_retried: int = 0
    prompt_truncated_at: int | None = None
    """The character of ``spec.full_prompt`` at which the text encoder stopped reading. None: it read all of it."""
    negative_prompt_truncated_at: int | None = None
    computed: tuple[Computed, ...] = ()
    """What each part of the pipeline computed in, as far as it has worked on the video."""
    timeline: tuple[TimelineEntry, ...] = ()
    idempotency_key: str | None = None
    user: str | None = None
    """As the client sent it, like ``metadata``."""
    metadata: dict[str, str] | None = None

    @property
    def is_over(self) -> bool:
        return self.status in (Status.COMPLETED, Status.FAILED)

    @property
    def progress(self) -> int:
        """Percent of the denoising steps; 100 only when the file is there."""
        if self.status is Status.COMPLETED:
            return 100
        return min(math.floor(100 * self.num_steps_done / self.spec.num_steps), 99)

    def public(self, *, queue_position: int | None = None, eta_seconds: float | None = None) -> dict[str, Any]:
        """The video object of the HTTP API: its 13 keys, then ours. Safe to show: no owner, no lease, no key."""
        spec = self.spec
        return {
            "id": self.id,
            "object": "video",
            "model": spec.model,
            "status": str(self.status),
            "progress": self.progress,
            "created_at": int(self.created_at),
            "completed_at": int(self.completed_at) if self.completed_at and self.status is Status.COMPLETED else None,
            "expires_at": None if self.expires_at is None else int(self.expires_at),
            "prompt": spec.prompt,
            "size": spec.size,
            "seconds": spec.seconds,
            "remixed_from_video_id": None,
            "error": None if self.error is None else self.error.model_dump(),
            "num_frames": spec.num_frames,
            "fps": FRAMES_PER_SECOND,
            "seed": spec.seed,
            "negative_prompt": spec.negative_prompt,
            "prompt_suffix": spec.prompt_suffix,
            "num_inference_steps": list(spec.num_inference_steps),
            "video_num_inference_steps": list(spec.video_num_inference_steps),
            "guidance_scale": spec.guidance_scale,
            "video_guidance_scale": spec.video_guidance_scale if spec.linear_guidance_alpha is None else None,
            "linear_guidance_alpha": spec.linear_guidance_alpha,
            "linear_guidance_minimum": spec.linear_guidance_minimum,
            "has_input_reference": spec.has_picture,
            "user": self.user,
            "metadata": self.metadata,
            "num_units": spec.num_latent_frames,
            "num_units_done": self.num_units_done,
            "prompt_truncated_at": self.prompt_truncated_at,
            "negative_prompt_truncated_at": self.negative_prompt_truncated_at,
            "computed": [computed.model_dump() for computed in self.computed],
            "attempts": self.attempts,
            "started_at": self.started_at,
            "first_frame_at": self.first_frame_at,
            "queue_position": queue_position,
            "eta_seconds": None if eta_seconds is None else round(eta_seconds, 1),
            "timeline": [entry.model_dump(mode="json") for entry in self.timeline],
        }

    def changed(self, **fields: Any) -> Self:
        """A copy with other values and the next revision."""
        return self.model_copy(update={**fields, "revision": self.revision + 1})


def new_record(
    spec: VideoSpec,
    *,
    idempotency_key: str | None = None,
    user: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> VideoRecord:
    """The record of a video that was accepted just now. ``user`` and ``metadata``: as in ``VideoRequest``."""
    created_at = time.time()
    return VideoRecord(
        id=new_video_id(created_at),
        created_at=created_at,
        spec=spec,
        idempotency_key=idempotency_key,
        user=user,
        metadata=None if metadata is None else dict(metadata),
    )
