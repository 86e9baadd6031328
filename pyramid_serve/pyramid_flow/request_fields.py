"""The fields of a request that Pyramid Flow adds, and what becomes of them in a plan."""

import json
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from pyramid_serve.api.limits import MAX_STEPS
from pyramid_serve.api.requests import no_bool
from pyramid_serve.families import CommandLineOption
from pyramid_serve.pyramid_flow.settings import MAX_GUIDANCE, LinearGuidance, SamplingSettings
from pyramid_serve.pyramid_flow.shapes import NUM_STAGES

_STEPS_RULE = f"must be one whole number, or one for each of the {NUM_STAGES} stages"
_LINEAR = LinearGuidance()


def _parse_steps(value: object) -> object:
    """One number, or three; also as text, as multipart forms send them: ``20``, ``20,20,20`` or ``[20, 20, 20]``."""
    if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], list):
        value = value[0]
    if isinstance(value, str):
        text = value.strip()
        try:
            value = json.loads(text if text.startswith("[") else f"[{text}]")
        except (ValueError, RecursionError):
            raise ValueError(_STEPS_RULE) from None
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(value, bool) or not isinstance(value, int | list | tuple):
        raise ValueError(_STEPS_RULE)
    steps = (value,) * NUM_STAGES if isinstance(value, int) else tuple(value)
    if len(steps) != NUM_STAGES:
        raise ValueError(_STEPS_RULE)
    return steps


def _steps_schema(schema: dict[str, Any]) -> None:
    """In JSON, one number stands for all stages."""
    numbers = {key: schema.pop(key) for key in ("type", "minItems", "maxItems", "prefixItems") if key in schema}
    number = numbers.pop("prefixItems")[0]
    schema["oneOf"] = [number, {**numbers, "items": number}]


_StepCount = Annotated[int, Field(ge=1, le=MAX_STEPS), BeforeValidator(no_bool)]
StageSteps = tuple[_StepCount, _StepCount, _StepCount]
"""Denoising steps of each stage."""
_GivenSteps = Annotated[StageSteps, BeforeValidator(_parse_steps), Field(json_schema_extra=_steps_schema)]
_Guidance = Annotated[float, Field(ge=0, le=MAX_GUIDANCE, allow_inf_nan=False), BeforeValidator(no_bool)]


class RequestFields(BaseModel):
    """What a client may ask of Pyramid Flow beside what every model takes. None: the model's own."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    num_inference_steps: Annotated[
        _GivenSteps | None,
        CommandLineOption("--steps", "N", "of the first unit: N, or N,N,N"),
        Field(
            description=f"Of the first unit. Denoising steps: one number, or one for each of the {NUM_STAGES} stages."
        ),
    ] = None
    video_num_inference_steps: Annotated[
        _GivenSteps | None,
        CommandLineOption("--video-steps", "N", "of the others"),
        Field(
            description=f"Of the other units. Denoising steps: one number, or one for each of the {NUM_STAGES} stages."
        ),
    ] = None
    guidance_scale: Annotated[
        _Guidance | None,
        CommandLineOption("--guidance-scale", "G", "of the first unit"),
        Field(description="Of the first unit."),
    ] = None
    video_guidance_scale: Annotated[
        _Guidance | None,
        CommandLineOption("--video-guidance-scale", "G", "of the others"),
        Field(description="Of the other units."),
    ] = None
    linear_guidance_alpha: Annotated[
        _Guidance | None,
        CommandLineOption(
            "--linear-guidance-alpha",
            "A",
            "instead: guidance falls by A with each unit; 0.5 where only the minimum is given",
        ),
        Field(
            description="Guidance falls by so much with each unit, instead of being video_guidance_scale. "
            f"{_LINEAR.alpha:g} where only linear_guidance_minimum is given."
        ),
    ] = None
    """See ``settings.LinearGuidance``. Guidance is linear when this or ``linear_guidance_minimum`` is given."""
    linear_guidance_minimum: Annotated[
        _Guidance | None,
        CommandLineOption("--linear-guidance-minimum", "G", "where it stops falling; 2 where only alpha is given"),
        Field(
            description="Where linear guidance stops falling. "
            f"{_LINEAR.minimum:g} where only linear_guidance_alpha is given."
        ),
    ] = None


class ShownFields(BaseModel):
    """What ``Plan.settings`` holds for Pyramid Flow."""

    model_config = ConfigDict(frozen=True)

    num_inference_steps: StageSteps
    """Of unit 0 at each stage."""
    video_num_inference_steps: StageSteps
    """Of the other units at each stage."""
    guidance_scale: float
    video_guidance_scale: float | None = Field(description="Null where guidance is linear.")
    linear_guidance_alpha: float | None = Field(default=None, description="Null where guidance is not linear.")
    linear_guidance_minimum: float | None = None
    """None exactly where ``linear_guidance_alpha`` is."""

    @property
    def sampling(self) -> SamplingSettings:
        """The same for the sampler."""
        linear_guidance = None
        if self.linear_guidance_alpha is not None and self.linear_guidance_minimum is not None:
            linear_guidance = LinearGuidance(self.linear_guidance_alpha, self.linear_guidance_minimum)
        # It is not used where guidance is linear.
        video_guidance_scale = self.guidance_scale if self.video_guidance_scale is None else self.video_guidance_scale
        return SamplingSettings(
            num_inference_steps=self.num_inference_steps,
            video_num_inference_steps=self.video_num_inference_steps,
            guidance_scale=self.guidance_scale,
            video_guidance_scale=video_guidance_scale,
            linear_guidance=linear_guidance,
        )
