"""What the OpenAPI document says about answers."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from deployments.http.guard import POLL_HEADER, VIDEO_ID_HEADER
from pyramid_serve.api import Computed, Status, TimelineEntry, VideoError

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


class ErrorFields(BaseModel):
    message: str = Field(description="What came and what is allowed.")
    type: str
    param: str | None = Field(description="The field that is wrong.")
    code: str | None


class Error(BaseModel):
    """Every answer that is not a success."""

    error: ErrorFields


class Video(BaseModel):
    """A video and how far it is. The first 13 keys are those of other video servers.

    The request fields of its model's own are there too, with the values that were used.
    """

    model_config = ConfigDict(extra="allow", json_schema_extra={"examples": [VIDEO_EXAMPLE]})

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
    remixed_from_video_id: str | None
    error: VideoError | None
    num_frames: int
    fps: int
    seed: int
    negative_prompt: str
    prompt_suffix: str
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
    """A model that this server makes videos with, and what it can do.

    The defaults of its own request fields are there too.
    """

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    family: str = Field(description="The kind of model.")
    sizes: list[str] | None = Field(description="Null: every multiple of size_multiple.")
    size_multiple: int = Field(description="Pixels.")
    default_size: str
    fps: int
    max_seconds: float
    max_num_frames: int
    default_seconds: float
    needs_input_reference: bool = Field(description="Whether every request must have a picture.")
    example_prompts: list[str]
    request_fields: dict[str, Any] = Field(
        description="The JSON schema of each request field that this model has beside those of every model."
    )


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ServedModelObject]


class PoolStatus(BaseModel):
    part: Literal["text_encoder", "denoiser", "decoder"]
    num_replicas: int = Field(description="Those that answered; none where one of them took too long.")
    busy: float | None = Field(description="Share of the time in which they computed, of late. Null: not known yet.")
    num_ongoing: int = Field(description="Units, or prompts, in work or waiting.")


class ModelStatus(BaseModel):
    id: str
    pools: list[PoolStatus]


class QueueStatus(BaseModel):
    num_queued: int
    num_in_progress: int


class ServerStatus(BaseModel):
    """What the server does now. It is read anew every two seconds at most."""

    object: Literal["status"]
    queue: QueueStatus
    models: list[ModelStatus]


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
    """The error answers of a route, by status."""
    return {
        status: {"model": Error, "description": _ERRORS[status]}
        | ({"headers": _RETRY_AFTER} if status in (429, 503) else {})
        for status in statuses
    }


def file_answer(*media_types: str) -> Schema:
    """A successful answer: a file of one of these media types."""
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
    """The successful answer of a request that waits for the file of its video."""
    answer = file_answer("video/mp4")
    return {**answer, "headers": {VIDEO_ID_HEADER: _header("The id of the video."), **answer["headers"]}}


def video_answer() -> Schema:
    """The headers of an answer that is a video object."""
    return {"headers": {POLL_HEADER: _header("Milliseconds to the next look, while the video is not over.", "integer")}}


def _header(description: str, kind: str = "string") -> Schema:
    return {"description": description, "schema": {"type": kind}}
