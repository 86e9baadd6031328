"""The fields of a request that PIA adds, and what becomes of them in a plan."""

import json
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from pyramid_serve.api.limits import MAX_STEPS
from pyramid_serve.api.requests import no_bool
from pyramid_serve.families import CommandLineOption
from pyramid_serve.pia.settings import (
    MAX_CLIP_SKIP,
    MAX_GUIDANCE,
    MAX_MOTION_SCALE,
    FreeInit,
    Mode,
    Motion,
    MotionKind,
    SchedulerName,
)


def _parse_object(value: object) -> object:
    """An object; also as JSON text, as multipart forms and the command line send it."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError("must be a JSON object") from None


class RequestFields(BaseModel):
    """What a client may ask of PIA beside what every model takes. None: the model's own."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    mode: Annotated[
        Mode | None,
        CommandLineOption("--mode", "NAME", "animate the picture, loop back to it, or give it the model's style"),
        Field(description="animate the picture, loop back to it, or give it the style of the model."),
    ] = None
    motion: Annotated[
        Motion | None,
        CommandLineOption("--motion", "NAME", "how much moves"),
        Field(description="How much moves."),
    ] = None
    motion_scale: Annotated[
        Annotated[int, Field(ge=0, le=MAX_MOTION_SCALE), BeforeValidator(no_bool)] | None,
        CommandLineOption("--motion-scale", "N", "mode and motion as one number from 0 to 8, as diffusers has them"),
        Field(description="Instead of mode and motion: both as one number, as diffusers has them."),
    ] = None
    num_inference_steps: Annotated[
        Annotated[int, Field(ge=1, le=MAX_STEPS), BeforeValidator(no_bool)] | None,
        CommandLineOption("--steps", "N", "denoising steps"),
        Field(description="Denoising steps; of each iteration with free_init."),
    ] = None
    guidance_scale: Annotated[
        Annotated[float, Field(ge=0, le=MAX_GUIDANCE, allow_inf_nan=False), BeforeValidator(no_bool)] | None,
        CommandLineOption("--guidance-scale", "G", "how closely the prompt is followed; off up to 1"),
        Field(description="How closely the prompt is followed. Up to 1 the negative prompt is left out."),
    ] = None
    strength: Annotated[
        Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), BeforeValidator(no_bool)] | None,
        CommandLineOption("--strength", "S", "how far to depart from the picture, above 0 to 1"),
        Field(description="How far to depart from the picture. Below 1 the first steps are left out."),
    ] = None
    scheduler: Annotated[
        SchedulerName | None,
        CommandLineOption("--scheduler", "NAME", "what takes the steps"),
        Field(description="What takes the steps. lcm is for models distilled for it."),
    ] = None
    free_init: Annotated[
        Annotated[FreeInit, BeforeValidator(_parse_object)] | None,
        CommandLineOption(
            "--free-init",
            "JSON",
            "make it several times, each steadier; alone or with settings, such as '{\"num_iters\": 2}'",
            without_value="{}",
        ),
        Field(description="Make the video several times, each from better noise: steadier, and so much slower."),
    ] = None
    clip_skip: Annotated[
        Annotated[int, Field(ge=0, le=MAX_CLIP_SKIP), BeforeValidator(no_bool)] | None,
        CommandLineOption("--clip-skip", "N", "layers left out at the end of the text encoder"),
        Field(description="Layers left out at the end of the text encoder, for the prompt but not the negative one."),
    ] = None


class ShownFields(BaseModel):
    """What ``Plan.settings`` holds for PIA."""

    model_config = ConfigDict(frozen=True)

    mode: Mode
    motion: Motion
    num_inference_steps: int
    guidance_scale: float
    strength: float
    scheduler: SchedulerName
    free_init: FreeInit | None = Field(default=None, description="Null where the video is made once.")
    clip_skip: int

    @property
    def motion_kind(self) -> MotionKind:
        return MotionKind(self.mode, self.motion)
