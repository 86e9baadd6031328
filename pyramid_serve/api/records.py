"""Records: what is known of an accepted video. ``video.json`` in the video's folder holds one."""

import math
import time
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field

from pyramid_serve.api.ids import new_video_id
from pyramid_serve.api.plans import KEEP_UNKNOWN, Plan

VERSION = 2
"""Of the layout of records. Version 1, which had no number, is read by ``families.record_fields``."""


PUBLIC_NAMES = frozenset((
    "id", "object", "model", "status", "progress", "created_at", "completed_at", "expires_at", "prompt", "size",
    "seconds", "remixed_from_video_id", "error", "num_frames", "fps", "seed", "negative_prompt",
    "prompt_suffix", "has_input_reference", "user", "metadata", "num_units", "num_units_done",
    "prompt_truncated_at", "negative_prompt_truncated_at", "computed", "attempts", "started_at",
    "first_frame_at", "queue_position", "eta_seconds", "timeline",
))  # fmt: skip
"""The keys of every video object, which no field of a family may have."""


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

    model_config = KEEP_UNKNOWN

    stage: Annotated[Stage | str, Field(union_mode="left_to_right")]
    """A ``Stage``, or the word of a later release."""
    unit: int | None
    start: float
    end: float
    replica: str


class Computed(BaseModel):
    """What a part of the pipeline computed in: a dtype such as ``bfloat16``, on a device such as ``cpu``."""

    model_config = KEEP_UNKNOWN

    part: str
    """``text_encoder``, ``denoiser`` or ``decoder``."""
    dtype: str
    device: str


class VideoError(BaseModel):
    """Why a video failed.

    code: ``cancelled``, ``too_many_attempts``, ``invalid_input``, ``non_finite``, ``model_not_found`` or
    ``server_error``.
    """

    model_config = KEEP_UNKNOWN

    code: str
    message: str


class VideoRecord(BaseModel):
    """All that is known of an accepted video; the content of ``video.json``. Times in unix seconds.

    A record is never changed in place: ``record.model_copy(update=...)``. Only the claims deployment writes it.
    """

    model_config = KEEP_UNKNOWN

    version: int = VERSION
    id: str
    created_at: float
    plan: Plan
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
    """The character of ``plan.full_prompt`` at which the text encoder stopped reading. None: it read all of it."""
    negative_prompt_truncated_at: int | None = None
    computed: tuple[Computed, ...] = ()
    """What each part of the pipeline computed in, as far as it has worked on the video."""
    timeline: tuple[TimelineEntry, ...] = ()
    idempotency_key: str | None = None
    remixed_from: str | None = None
    """The id of the video whose settings this one has."""
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
        return min(math.floor(100 * self.num_steps_done / self.plan.num_steps), 99)

    def public(self, *, queue_position: int | None = None, eta_seconds: float | None = None) -> dict[str, Any]:
        """The video object of the HTTP API: its 13 keys, then ours. Safe to show: no owner, no lease, no key."""
        plan = self.plan
        return {
            "id": self.id,
            "object": "video",
            "model": plan.model,
            "status": str(self.status),
            "progress": self.progress,
            "created_at": int(self.created_at),
            "completed_at": int(self.completed_at) if self.completed_at and self.status is Status.COMPLETED else None,
            "expires_at": None if self.expires_at is None else int(self.expires_at),
            "prompt": plan.prompt,
            "size": plan.size,
            "seconds": plan.seconds,
            "remixed_from_video_id": self.remixed_from,
            "error": None if self.error is None else self.error.model_dump(),
            "num_frames": plan.num_frames,
            "fps": plan.fps,
            "seed": plan.seed,
            "negative_prompt": plan.negative_prompt,
            "prompt_suffix": plan.prompt_suffix,
            **{name: value for name, value in plan.settings.items() if name not in PUBLIC_NAMES},
            "has_input_reference": plan.has_picture,
            "user": self.user,
            "metadata": self.metadata,
            "num_units": plan.num_units,
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
    plan: Plan,
    *,
    idempotency_key: str | None = None,
    remixed_from: str | None = None,
    user: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> VideoRecord:
    """The record of a video that was accepted just now. ``user`` and ``metadata``: as in ``VideoRequest``."""
    created_at = time.time()
    return VideoRecord(
        id=new_video_id(created_at),
        created_at=created_at,
        plan=plan,
        idempotency_key=idempotency_key,
        remixed_from=remixed_from,
        user=user,
        metadata=None if metadata is None else dict(metadata),
    )
