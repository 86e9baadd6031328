"""What the OpenAPI document says of requests and answers. Requests are checked by ``api``, not by this."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from deployments.http_body import FORM_TYPE, JSON_TYPE
from pyramid_serve.api import MAX_GUIDANCE, MAX_SEED, MAX_STEPS, Computed, Status, TimelineEntry, VideoError

Schema = dict[str, Any]

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
    "has_input_reference": False,
    "num_units": 7,
    "num_units_done": 2,
    "prompt_truncated_at": None,
    "negative_prompt_truncated_at": None,
    "computed": {"denoiser": {"dtype": "float32", "device": "cpu"}},
    "attempts": 1,
    "started_at": 1764000000.4,
    "first_frame_at": 1764000001.2,
    "queue_position": None,
    "eta_seconds": 3.5,
    "timeline": [],
}

_STEPS = {
    "description": "Denoising steps: one number, or one for each of the 3 stages.",
    "oneOf": [
        {"type": "integer", "minimum": 1, "maximum": MAX_STEPS},
        {
            "type": "array",
            "items": {"type": "integer", "minimum": 1, "maximum": MAX_STEPS},
            "minItems": 3,
            "maxItems": 3,
        },
    ],
}
_GUIDANCE = {"type": "number", "minimum": 0, "maximum": MAX_GUIDANCE}
_PICTURE_URL = {
    "type": "object",
    "properties": {"image_url": {"type": "string", "pattern": "^data:image/[a-z+.-]+;base64,"}},
    "required": ["image_url"],
    "additionalProperties": False,
    "description": "A picture that the video begins with, as a base64 data URL. Nothing is fetched from elsewhere.",
}
_PICTURE_FILE = {
    "type": "string",
    "format": "binary",
    "description": "A picture that the video begins with: PNG, JPEG, WebP, GIF, BMP or TIFF.",
}


def _request_schema(input_reference: Schema) -> Schema:
    return {
        "type": "object",
        "required": ["prompt"],
        "additionalProperties": False,
        "properties": {
            "prompt": {"type": "string", "pattern": r"\S"},
            "model": {"type": "string", "description": "One of /v1/models."},
            "seconds": {
                "type": "string",
                "pattern": r"^[0-9]+(\.[0-9]+)?$",
                "description": "Length; brought to the nearest that the model makes.",
            },
            "size": {"type": "string", "pattern": "^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$", "description": "WIDTHxHEIGHT"},
            "input_reference": input_reference,
            "negative_prompt": {"type": "string"},
            "prompt_suffix": {"type": "string", "description": "Added to the prompt; the model's own unless given."},
            "seed": {"type": "integer", "minimum": 0, "maximum": MAX_SEED},
            "num_inference_steps": {**_STEPS, "title": "Of the first unit"},
            "video_num_inference_steps": {**_STEPS, "title": "Of the other units"},
            "guidance_scale": {**_GUIDANCE, "description": "Of the first unit."},
            "video_guidance_scale": {**_GUIDANCE, "description": "Of the other units."},
        },
    }


CREATE_BODY: Schema = {
    "required": True,
    "content": {
        JSON_TYPE: {
            "schema": _request_schema(_PICTURE_URL),
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
        FORM_TYPE: {"schema": _request_schema(_PICTURE_FILE)},
    },
}


class ErrorFields(BaseModel):
    message: str = Field(description="What came and what is allowed.")
    type: str
    param: str | None = Field(description="The field that is wrong.")
    code: str | None


class Error(BaseModel):
    """Every answer that is no success."""

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
    video_guidance_scale: float
    has_input_reference: bool
    num_units: int
    num_units_done: int = Field(description="Units whose frames are there and can be watched.")
    prompt_truncated_at: int | None = Field(
        description="The character of prompt and prompt_suffix together at which the text encoder stopped reading."
    )
    negative_prompt_truncated_at: int | None
    computed: dict[str, Computed] = Field(description="The dtype and device of each part of the pipeline.")
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
    404: "No such video.",
    408: "The body did not come in time.",
    409: "The video is not finished.",
    413: "The body, a field or the picture is too large.",
    415: "The body is neither JSON nor a form.",
    416: "The file has no such range.",
    429: "Too many videos wait.",
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
    return {"content": {media_type: {"schema": {"type": "string", "format": "binary"}} for media_type in media_types}}
