"""What the OpenAPI document says of requests and answers. Requests are checked by ``api``, not by this."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from deployments.http.body import FORM_TYPE, JSON_TYPE
from deployments.http.guard import POLL_HEADER, VIDEO_ID_HEADER
from deployments.videos.videos import ServedModel
from pyramid_serve.api import (
    MAX_GUIDANCE,
    MAX_METADATA_KEY_CHARACTERS,
    MAX_METADATA_PAIRS,
    MAX_METADATA_VALUE_CHARACTERS,
    MAX_SEED,
    MAX_SIDE,
    MAX_USER_CHARACTERS,
    Computed,
    Status,
    TimelineEntry,
    VideoError,
    longest_of,
)
from pyramid_serve.pyramid_flow.sampler import LinearGuidance
from pyramid_serve.pyramid_flow.shapes import FRAMES_PER_SECOND, NUM_STAGES, SIZE_MULTIPLE, num_frames_of, seconds_of

Schema = dict[str, Any]

MAX_KEY_CHARACTERS = 255
"""Of an Idempotency-Key."""

VIDEO_EXAMPLE: Schema = {
    "id": "video_019a1b2c3d4e0f1e2d3c4b5a69788796",
    "object": "video",
    "model": "shapes",
    "status": "in_progress",
    "progress": 40,
    "created_at": 1764000000,
    "completed_at": None,
    "expires_at": None,
    "prompt": "a red ball rolls to the left",
    "size": "128x64",
    "seconds": "2",
    "remixed_from_video_id": None,
    "error": None,
    "num_frames": 49,
    "fps": 24,
    "seed": 7,
    "negative_prompt": "",
    "prompt_suffix": "",
    "num_inference_steps": [4, 4, 4],
    "video_num_inference_steps": [2, 2, 2],
    "guidance_scale": 7.0,
    "video_guidance_scale": 5.0,
    "linear_guidance_alpha": None,
    "linear_guidance_minimum": None,
    "has_input_reference": False,
    "user": None,
    "metadata": {"scene": "12"},
    "num_units": 7,
    "num_units_done": 2,
    "prompt_truncated_at": None,
    "negative_prompt_truncated_at": None,
    "computed": [{"part": "denoiser", "dtype": "float32", "device": "cpu"}],
    "attempts": 1,
    "started_at": 1764000000.4,
    "first_frame_at": 1764000001.2,
    "queue_position": None,
    "eta_seconds": 3.5,
    "timeline": [],
}

IDEMPOTENCY_KEY: Schema = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": MAX_KEY_CHARACTERS},
    "description": "The same key again gives the same video, and 400 where the request is another.",
}

_GUIDANCE = {"type": "number", "minimum": 0, "maximum": MAX_GUIDANCE}
_TEXT_RULE = "No control characters but newline and tab."
_PICTURE_FILE = {
    "type": "string",
    "format": "binary",
    "description": "A picture that the video begins with: PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF or HEIC.",
}
_PICTURE_URL = {
    "type": "object",
    "properties": {"image_url": {"type": "string", "pattern": "^data:image/[a-z+.-]+;base64,"}},
    "required": ["image_url"],
    "additionalProperties": False,
    "description": "A picture that the video begins with, as a base64 data URL. Nothing is fetched from elsewhere.",
}


def create_body(model: ServedModel) -> Schema:
    """The body of a request for a video with this model, as the OpenAPI document has it."""
    return {
        "required": True,
        "content": {
            JSON_TYPE: {
                "schema": _request_schema(model, _PICTURE_URL),
                "examples": {
                    "prompt": {"summary": "A prompt alone", "value": {"prompt": "a red ball rolls to the left"}},
                    "settings": {
                        "summary": "Everything that decides the video",
                        "value": {
                            "prompt": "a red ball rolls to the left",
                            "seconds": "2",
                            "seed": 7,
                            "num_inference_steps": [4, 4, 4],
                            "video_num_inference_steps": 2,
                            "guidance_scale": 7.0,
                            "video_guidance_scale": 5.0,
                        },
                    },
                },
            },
            FORM_TYPE: {"schema": _request_schema(model, _PICTURE_FILE)},
        },
    }


def _request_schema(model: ServedModel, input_reference: Schema) -> Schema:
    return {
        "type": "object",
        "required": ["prompt"],
        "additionalProperties": False,
        "properties": {
            "prompt": {**_text_schema(model, _TEXT_RULE), "minLength": 1, "pattern": r"\S"},
            "model": {"type": "string", "enum": [model.name]},
            **_length_schemas(model),
            **_size_schemas(model),
            "input_reference": input_reference,
            "negative_prompt": _text_schema(model, f"What the video is not to show. {_TEXT_RULE}"),
            "prompt_suffix": _text_schema(model, "Added to the prompt; the model's own unless given."),
            "seed": {
                "type": "integer",
                "minimum": -1,
                "maximum": MAX_SEED,
                "description": "The same seed gives the same video; drawn and told unless given, and for -1.",
            },
            "num_inference_steps": _steps_schema(model, "Of the first unit."),
            "video_num_inference_steps": _steps_schema(model, "Of the other units."),
            "guidance_scale": {**_GUIDANCE, "description": "Of the first unit."},
            "video_guidance_scale": {**_GUIDANCE, "description": "Of the other units."},
            **_linear_guidance_schemas(),
            "user": {
                "type": "string",
                "maxLength": MAX_USER_CHARACTERS,
                "description": "Whom the video is for. Kept and given back.",
            },
            "metadata": {
                "type": "object",
                "maxProperties": MAX_METADATA_PAIRS,
                "propertyNames": {"minLength": 1, "maxLength": MAX_METADATA_KEY_CHARACTERS},
                "additionalProperties": {"type": "string", "maxLength": MAX_METADATA_VALUE_CHARACTERS},
                "description": "Notes of the client. Kept and given back. In a form: fields like metadata[key], or one "
                "field with a JSON object.",
            },
        },
    }


def _text_schema(model: ServedModel, description: str) -> Schema:
    return {"type": "string", "maxLength": model.limits.max_prompt_characters, "description": description}


def _length_schemas(model: ServedModel) -> dict[str, Schema]:
    longest = longest_of(model.capabilities, model.limits)
    num_frames, seconds = num_frames_of(longest), round(seconds_of(longest), 3)
    return {
        "seconds": {
            "description": f"Length, at most {seconds:g}; brought to the nearest that the model makes.",
            "anyOf": [
                {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?$"},
                {"type": "number", "exclusiveMinimum": 0, "maximum": seconds},
            ],
        },
        "num_frames": {
            "description": "The length in frames, instead of seconds; brought to the nearest that the model makes.",
            "type": "integer",
            "minimum": 1,
            "maximum": num_frames,
        },
        "fps": {
            "description": "Frames a second; the model makes no other number.",
            "type": "integer",
            "enum": [FRAMES_PER_SECOND],
        },
    }


def _size_schemas(model: ServedModel) -> dict[str, Schema]:
    sizes = model.capabilities.sizes
    size: Schema = {"type": "string", "description": "WIDTHxHEIGHT in pixels."}
    width: Schema = {"type": "integer", "description": "Pixels; with height, instead of size."}
    height: Schema = {"type": "integer", "description": "Pixels; with width, instead of size."}
    if sizes is None:
        size["pattern"] = "^[1-9][0-9]{0,4}[xX*][1-9][0-9]{0,4}$"
        size["description"] += f" Width times height is at most {model.limits.max_pixels}."
        for side in (width, height):
            side["minimum"] = side["multipleOf"] = SIZE_MULTIPLE
            side["maximum"] = model.capabilities.max_side or MAX_SIDE
    else:
        size["enum"] = [f"{width}x{height}" for width, height in sizes]
        width["enum"] = sorted({width for width, _ in sizes})
        height["enum"] = sorted({height for _, height in sizes})
    return {"size": size, "width": width, "height": height}


def _steps_schema(model: ServedModel, which: str) -> Schema:
    number = {"type": "integer", "minimum": 1, "maximum": model.limits.max_num_inference_steps}
    return {
        "description": f"{which} Denoising steps: one number, or one for each of the {NUM_STAGES} stages.",
        "oneOf": [number, {"type": "array", "items": number, "minItems": NUM_STAGES, "maxItems": NUM_STAGES}],
    }


def _linear_guidance_schemas() -> dict[str, Schema]:
    default = LinearGuidance()
    return {
        "linear_guidance_alpha": {
            **_GUIDANCE,
            "description": "Guidance falls by so much with each unit, instead of being video_guidance_scale. "
            f"{default.alpha:g} where only linear_guidance_minimum is given.",
        },
        "linear_guidance_minimum": {
            **_GUIDANCE,
            "description": "Where linear guidance stops falling. "
            f"{default.minimum:g} where only linear_guidance_alpha is given.",
        },
    }


class ErrorFields(BaseModel):
    message: str = Field(description="What came and what is allowed.")
    type: str
    param: str | None = Field(description="The field that is wrong.")
    code: str | None


class Error(BaseModel):
    """Every answer that is not a success."""

    error: ErrorFields


class Video(BaseModel):
    """A video and how far it is. The first 13 keys are those of other video servers."""

    model_config = ConfigDict(json_schema_extra={"examples": [VIDEO_EXAMPLE]})

    id: str
    object: Literal["video"]
    model: str
    status: Status
    progress: int = Field(ge=0, le=100)
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str
    size: str
    seconds: str
    remixed_from_video_id: None
    error: VideoError | None
    num_frames: int
    fps: int
    seed: int
    negative_prompt: str
    prompt_suffix: str
    num_inference_steps: list[int]
    video_num_inference_steps: list[int]
    guidance_scale: float
    video_guidance_scale: float | None = Field(description="Null where guidance is linear.")
    linear_guidance_alpha: float | None = Field(description="Null where guidance is not linear.")
    linear_guidance_minimum: float | None
    has_input_reference: bool
    user: str | None
    metadata: dict[str, str] | None
    num_units: int
    num_units_done: int = Field(description="Units whose frames are there and can be watched.")
    prompt_truncated_at: int | None = Field(
        description="The character of prompt and prompt_suffix together at which the text encoder stopped reading."
    )
    negative_prompt_truncated_at: int | None
    computed: list[Computed] = Field(description="The dtype and device of each part of the pipeline.")
    attempts: int
    started_at: float | None
    first_frame_at: float | None
    queue_position: int | None = Field(description="Videos ahead of it, while it is queued. Not told in lists.")
    eta_seconds: float | None = Field(description="Seconds to its end, where it can be told.")
    timeline: list[TimelineEntry]


class VideoList(BaseModel):
    object: Literal["list"]
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(BaseModel):
    id: str
    object: Literal["video.deleted"]
    deleted: Literal[True]


class ServedModelObject(BaseModel):
    """A model that this server makes videos with, and what it can do."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    sizes: list[str] | None = Field(description="Null: every multiple of 64.")
    default_size: str
    max_seconds: float
    max_num_frames: int
    default_seconds: float
    num_inference_steps: list[int]
    video_num_inference_steps: list[int]
    guidance_scale: float
    video_guidance_scale: float


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ServedModelObject]


class Health(BaseModel):
    status: Literal["ok"]


_ERRORS = {
    400: "A wrong value; param names it.",
    401: "No key, or a wrong one.",
    403: "A web page of another origin, which CORS does not allow.",
    404: "No such video or model.",
    408: "The body did not come in time.",
    409: "The video is not finished.",
    413: "The body, a field or the picture is too large.",
    415: "The body is neither JSON nor a form.",
    416: "The file has no such range.",
    422: "The video was cancelled, or no video can be made of the picture.",
    429: "Too many videos wait.",
    500: "The video failed, or something else did.",
    503: "Not now; try again.",
}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}


def error_answers(*statuses: int) -> dict[int | str, Schema]:
    """The errors of a route, by status."""
    return {
        status: {"model": Error, "description": _ERRORS[status]}
        | ({"headers": _RETRY_AFTER} if status in (429, 503) else {})
        for status in statuses
    }


def file_answer(*media_types: str) -> Schema:
    """An answer that is a file of one of these types."""
    return {
        "content": {media_type: {"schema": {"type": "string", "format": "binary"}} for media_type in media_types},
        "headers": {
            "Accept-Ranges": _header("bytes where ranges can be had."),
            "Content-Disposition": _header("A name for the file."),
            "Content-Range": _header("The range that this is, with status 206."),
            "ETag": _header("For If-None-Match and If-Range."),
        },
    }


def synchronous_answer() -> Schema:
    """The file of a video that was waited for."""
    answer = file_answer("video/mp4")
    return {**answer, "headers": {VIDEO_ID_HEADER: _header("The id of the video."), **answer["headers"]}}


def video_answer() -> Schema:
    """What is said of the answer that is a video, beside its model."""
    return {"headers": {POLL_HEADER: _header("Milliseconds to the next look, while the video is not over.", "integer")}}


def _header(description: str, kind: str = "string") -> Schema:
    return {"description": description, "schema": {"type": kind}}
