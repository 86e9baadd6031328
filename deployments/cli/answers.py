"""The answers of a server, checked before the commands read them: a server may answer anything."""

import json
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pyramid_serve.api import Stage

Video = dict[str, Any]
"""A video object as the server sent it, with the keys and types of ``VideoObject``."""

_MAX_DEPTH = 50
_LAST_SECOND = 253_402_214_400
"""The last day of the year 9999, which is the last that ``datetime`` supports."""

_READ = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=())

Seconds = Annotated[int | float, Field(ge=0, le=_LAST_SECOND)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Name = Annotated[str, Field(max_length=1000)]


class ErrorObject(BaseModel):
    """Why a video failed."""

    model_config = _READ

    code: Name
    message: str


class Entry(BaseModel):
    """An entry of the timeline."""

    model_config = _READ

    stage: Annotated[Annotated[Stage, Field(strict=False)] | Name, Field(union_mode="left_to_right")]
    unit: Count | None
    start: Seconds
    end: Seconds
    replica: Name


class VideoObject(BaseModel):
    """The fields of a video object that the commands use."""

    model_config = _READ

    id: Annotated[Name, Field(min_length=1)]
    model: Name
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: Annotated[int, Field(ge=0, le=100)]
    created_at: Seconds
    expires_at: Seconds | None
    prompt: str
    size: Name
    error: ErrorObject | None
    num_frames: Count
    fps: int | float
    seed: int
    num_units: Annotated[int, Field(ge=1, le=10**6)]
    num_units_done: Count
    queue_position: Count | None
    eta_seconds: Seconds | None
    prompt_suffix: str = ""
    prompt_truncated_at: Count | None = None
    timeline: Annotated[list[Entry], Field(max_length=5000)]


class VideoPage(BaseModel):
    """A page of the list of videos."""

    model_config = _READ

    data: list[VideoObject]
    has_more: bool


class DeletedVideo(BaseModel):
    """The answer to a request that deletes a video."""

    model_config = _READ

    deleted: Literal[True]


class RefusalReason(BaseModel):
    """The error in the answer to a request that is refused."""

    model_config = _READ

    message: str


class Refusal(BaseModel):
    """The answer to a request that is refused."""

    model_config = _READ

    error: RefusalReason


def parse_answer(text: bytes) -> dict[str, Any] | None:
    """A JSON object with finite numbers and at most 50 levels; None for anything else."""
    try:
        parsed = json.loads(text, parse_constant=_refuse_number, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    level = [parsed]
    for _ in range(_MAX_DEPTH):
        containers = [each for each in level if isinstance(each, dict | list)]
        level = [item for each in containers for item in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return parsed if isinstance(parsed, dict) else None
    return None


def _refuse_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("a number beyond all bounds")
    return number
