"""From a request to a plan: units of one and then eight frames, each denoised through three stages."""

from collections.abc import Sequence
from typing import Any, TypeVar

from pyramid_serve.api.errors import RequestError
from pyramid_serve.api.limits import RequestLimits
from pyramid_serve.api.offers import Offer, field_schemas_of
from pyramid_serve.api.plans import Plan, UnitRun
from pyramid_serve.api.requests import VideoRequest, drawn_seed
from pyramid_serve.families import StepRun
from pyramid_serve.pyramid_flow.capabilities import Capabilities
from pyramid_serve.pyramid_flow.request_fields import RequestFields, ShownFields, StageSteps
from pyramid_serve.pyramid_flow.settings import LinearGuidance
from pyramid_serve.pyramid_flow.shapes import (
    FRAMES_PER_SECOND,
    LATENT_CHANNELS,
    NUM_STAGES,
    SIZE_MULTIPLE,
    LatentShape,
    nearest_num_latent_frames,
    num_frames_of,
    seconds_of,
)

NAME = "pyramid_flow"
"""What records call the family."""

Value = TypeVar("Value")


def offer(capabilities: Capabilities, limits: RequestLimits) -> Offer:
    """What a model makes within these limits."""
    return Offer(
        default_size=capabilities.default_size,
        fps=FRAMES_PER_SECOND,
        default_num_frames=num_frames_of(_default_length(capabilities, limits)),
        max_num_frames=num_frames_of(_longest(capabilities, limits)),
        sizes=capabilities.sizes,
        side_multiple=SIZE_MULTIPLE,
        max_side=capabilities.max_side,
        example_prompts=capabilities.example_prompts,
        defaults={
            "num_inference_steps": list(_steps_within(capabilities.num_inference_steps, limits)),
            "video_num_inference_steps": list(_steps_within(capabilities.video_num_inference_steps, limits)),
            "guidance_scale": capabilities.guidance_scale,
            "video_guidance_scale": capabilities.video_guidance_scale,
        },
        field_schemas=_field_schemas(limits),
    )


def _field_schemas(limits: RequestLimits) -> dict[str, Any]:
    schemas = field_schemas_of(RequestFields)
    for name in ("num_inference_steps", "video_num_inference_steps"):
        number, numbers = schemas[name]["oneOf"]
        for schema in (number, numbers["items"]):
            schema["maximum"] = limits.max_num_inference_steps
    return schemas


def plan(
    request: VideoRequest, fields: RequestFields, *, model: str, capabilities: Capabilities, limits: RequestLimits
) -> Plan:
    """The plan of a request; its seed is drawn where none is given.

    Values that are left out are the model's own, its length and steps cut to ``limits``. Raises ``RequestError`` for
    what the model was not trained for or ``limits`` refuse.
    """
    width, height = _size(request, capabilities, limits)
    num_units = _length(request, capabilities, limits)
    linear_guidance = _linear_guidance(fields)
    has_picture = request.input_reference is not None
    if has_picture and num_units == 1:
        raise RequestError(
            "input_reference: a picture is the first frame, and this video has no other; ask for more seconds",
            param="input_reference",
        )
    video_guidance = capabilities.image_video_guidance_scale if has_picture else capabilities.video_guidance_scale
    settings = ShownFields(
        num_inference_steps=_steps(
            "num_inference_steps", fields.num_inference_steps, capabilities.num_inference_steps, limits
        ),
        video_num_inference_steps=_steps(
            "video_num_inference_steps",
            fields.video_num_inference_steps,
            capabilities.video_num_inference_steps,
            limits,
        ),
        guidance_scale=_or(fields.guidance_scale, capabilities.guidance_scale),
        video_guidance_scale=_or(fields.video_guidance_scale, video_guidance) if linear_guidance is None else None,
        linear_guidance_alpha=None if linear_guidance is None else linear_guidance.alpha,
        linear_guidance_minimum=None if linear_guidance is None else linear_guidance.minimum,
    )
    return Plan(
        family=NAME,
        model=model,
        prompt=request.prompt,
        prompt_suffix=_or(request.prompt_suffix, capabilities.prompt_suffix),
        negative_prompt=_or(request.negative_prompt, capabilities.negative_prompt),
        seconds=_text_of_seconds(request.seconds, num_units),
        width=width,
        height=height,
        fps=FRAMES_PER_SECOND,
        seed=drawn_seed() if request.seed is None else request.seed,
        has_picture=has_picture,
        units=units_of(width, height, num_units, settings, has_picture=has_picture),
        settings=settings.model_dump(mode="json"),
    )


def units_of(
    width: int, height: int, num_units: int, settings: ShownFields, *, has_picture: bool
) -> tuple[UnitRun, ...]:
    """The units of a video. Unit 0 is one frame, and is not denoised where it is a given picture."""
    shape = LatentShape.of_pixels(height=height, width=width, num_latent_frames=num_units)
    latent_shape = (LATENT_CHANNELS, 1, *shape.size_at(NUM_STAGES - 1))
    first = UnitRun(
        count=1,
        num_frames=num_frames_of(1),
        num_steps=0 if has_picture else sum(settings.num_inference_steps),
        latent_shape=latent_shape,
        is_picture=has_picture,
    )
    if num_units == 1:
        return (first,)
    others = UnitRun(
        count=num_units - 1,
        num_frames=num_frames_of(2) - num_frames_of(1),
        num_steps=sum(settings.video_num_inference_steps),
        latent_shape=latent_shape,
    )
    return first, others


def latent_shape_of(plan: Plan) -> LatentShape:
    """The latents of a whole video."""
    return LatentShape.of_pixels(height=plan.height, width=plan.width, num_latent_frames=plan.num_units)


def step_runs(plan: Plan, unit: int, *, num_text_tokens: int) -> list[StepRun]:
    """The steps of a unit, stage by stage, as ``sampler.denoise_unit`` makes them. None for a given picture."""
    if plan.unit(unit).is_picture:
        return []
    sampling, shape = settings_of(plan).sampling, latent_shape_of(plan)
    num_sequences = 1 if sampling.guidance_of(unit) == 1.0 else 2
    return [
        StepRun(num_steps, (num_text_tokens + shape.num_sequence_tokens(unit, stage),) * num_sequences)
        for stage, num_steps in enumerate(sampling.steps_of(unit))
    ]


def settings_of(plan: Plan) -> ShownFields:
    """The family's own values of a plan. Raises ``ValueError`` for a plan of another family."""
    if plan.family != NAME:
        raise ValueError(f"family={plan.family!r}: must be {NAME!r}")
    return ShownFields.model_validate(plan.settings)


def _or(given: Value | None, default: Value) -> Value:
    return default if given is None else given


def _size(request: VideoRequest, capabilities: Capabilities, limits: RequestLimits) -> tuple[int, int]:
    width, height = request.size_asked_for or capabilities.default_size
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


def _length(request: VideoRequest, capabilities: Capabilities, limits: RequestLimits) -> int:
    """The number of units."""
    longest = _longest(capabilities, limits)
    asked = {}
    if request.seconds is not None:
        asked["seconds"] = nearest_num_latent_frames(request.seconds)
    if request.num_frames is not None:
        asked["num_frames"] = nearest_num_latent_frames(request.num_frames / FRAMES_PER_SECOND)
    if not asked:
        return _default_length(capabilities, limits)
    if len(set(asked.values())) > 1:
        raise RequestError(
            f"num_frames={request.num_frames}: contradicts seconds={request.seconds:g}, which is "
            f"{num_frames_of(asked['seconds'])} frames at {FRAMES_PER_SECOND} fps; give one of the two",
            param="num_frames",
        )
    param, num_units = next(iter(asked.items()))
    if num_units > longest:
        came = f"num_frames={request.num_frames}:"
        if request.seconds is not None:
            came = f"seconds={request.seconds:g}: {num_frames_of(num_units)} frames at {FRAMES_PER_SECOND} fps;"
        length = "a single picture" if longest == 1 else f"{seconds_of(longest):.3g} s"
        raise RequestError(f"{came} at most {num_frames_of(longest)} ({length}) are made here", param=param)
    return num_units


def _default_length(capabilities: Capabilities, limits: RequestLimits) -> int:
    """The units of a video whose length is not asked for."""
    return min(capabilities.default_num_latent_frames, _longest(capabilities, limits))


def _longest(capabilities: Capabilities, limits: RequestLimits) -> int:
    """The most units that a video may have."""
    return min(capabilities.max_num_latent_frames or limits.max_num_units, limits.max_num_units)


def _linear_guidance(fields: RequestFields) -> LinearGuidance | None:
    """How guidance falls; None where it is not linear."""
    given = {
        "linear_guidance_alpha": fields.linear_guidance_alpha,
        "linear_guidance_minimum": fields.linear_guidance_minimum,
    }
    names = [name for name, value in given.items() if value is not None]
    if not names:
        return None
    if fields.video_guidance_scale is not None:
        raise RequestError(
            f"{names[0]}={given[names[0]]:g}: contradicts video_guidance_scale={fields.video_guidance_scale:g}, "
            "which linear guidance replaces; give one of the two",
            param=names[0],
        )
    default = LinearGuidance()
    return LinearGuidance(
        _or(fields.linear_guidance_alpha, default.alpha), _or(fields.linear_guidance_minimum, default.minimum)
    )


def _steps(name: str, given: StageSteps | None, default: StageSteps, limits: RequestLimits) -> StageSteps:
    most = limits.max_num_inference_steps
    if given is not None and max(given) > most:
        raise RequestError(f"{name}={list(given)}: at most {most} each", param=name)
    return _steps_within(default, limits) if given is None else given


def _steps_within(steps: Sequence[int], limits: RequestLimits) -> StageSteps:
    """A model's own steps, cut to the limit."""
    first, second, third = (min(number, limits.max_num_inference_steps) for number in steps)
    return first, second, third


def _text_of_seconds(seconds: float | None, num_units: int) -> str:
    return f"{seconds:g}" if seconds is not None else f"{seconds_of(num_units):.2f}".rstrip("0").rstrip(".")
