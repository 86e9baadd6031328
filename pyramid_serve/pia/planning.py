"""From a request to a plan: one unit, all of whose frames are denoised together from a given picture."""

import math
from typing import Any, TypeVar

from pyramid_serve.api.errors import RequestError
from pyramid_serve.api.limits import RequestLimits
from pyramid_serve.api.offers import Offer, field_schemas_of
from pyramid_serve.api.plans import Plan, UnitRun
from pyramid_serve.api.requests import VideoRequest, drawn_seed
from pyramid_serve.errors import InputError
from pyramid_serve.families import StepRun
from pyramid_serve.media.pictures import picture_size
from pyramid_serve.pia.capabilities import FRAMES_PER_SECOND, LATENT_CHANNELS, MIN_FRAMES, Capabilities
from pyramid_serve.pia.request_fields import RequestFields, ShownFields
from pyramid_serve.pia.settings import (
    MAX_LCM_STEPS,
    MotionKind,
    SchedulerName,
    num_skipped_steps,
    num_steps,
    row_cost,
    steps_of_iterations,
)

NAME = "pia"
"""What records call the family."""

Value = TypeVar("Value")

_LAST_TIMESTEP_MISSING = ("euler", "dpm++")
"""Schedulers that find a noise level by its timestep: with leading steps they have none for the last of training."""


def offer(capabilities: Capabilities, limits: RequestLimits) -> Offer:
    """What a model makes within these limits."""
    own = capabilities.settings
    edge = _long_edge(capabilities, limits)
    schemas = field_schemas_of(RequestFields)
    schemas["num_inference_steps"]["maximum"] = min(
        limits.max_num_inference_steps, capabilities.max_num_inference_steps
    )
    schemas["clip_skip"]["maximum"] = capabilities.max_clip_skip
    return Offer(
        default_size=(edge, edge),
        fps=FRAMES_PER_SECOND,
        default_num_frames=capabilities.default_num_frames,
        max_num_frames=capabilities.max_num_frames,
        side_multiple=capabilities.side_multiple,
        needs_picture=True,
        example_prompts=own.example_prompts,
        defaults={
            "mode": "animate",
            "motion": own.motion,
            "num_inference_steps": min(own.num_inference_steps, limits.max_num_inference_steps),
            "guidance_scale": own.guidance_scale,
            "strength": 1.0,
            "scheduler": own.scheduler,
            "clip_skip": 0,
        },
        field_schemas=schemas,
    )


def plan(
    request: VideoRequest, fields: RequestFields, *, model: str, capabilities: Capabilities, limits: RequestLimits
) -> Plan:
    """The plan of a request; its seed is drawn where none is given.

    Values that are left out are the model's own, cut to ``limits``; the size is that of the picture, brought to sides
    that the model makes. Raises ``RequestError`` for what the model cannot make or ``limits`` refuse.
    """
    if request.input_reference is None:
        raise RequestError("input_reference: is required: this model brings a picture to life", param="input_reference")
    own = capabilities.settings
    num_frames = _num_frames(request, capabilities)
    kind = _motion(fields, capabilities)
    scheduler = _or(fields.scheduler, own.scheduler)
    settings = ShownFields(
        mode=kind.mode,
        motion=kind.motion,
        num_inference_steps=_steps(fields, scheduler, capabilities, limits),
        guidance_scale=_or(fields.guidance_scale, own.guidance_scale),
        strength=_or(fields.strength, 1.0),
        scheduler=scheduler,
        free_init=fields.free_init,
        clip_skip=_or(fields.clip_skip, 0),
    )
    _check_together(settings, capabilities)
    width, height = _size(request, capabilities, limits)
    latent_height, latent_width = height // capabilities.latent_factor, width // capabilities.latent_factor
    unit = UnitRun(
        count=1,
        num_frames=num_frames,
        num_steps=num_steps(
            settings.scheduler,
            settings.num_inference_steps,
            strength=settings.strength,
            free_init=settings.free_init,
        ),
        latent_shape=(LATENT_CHANNELS, num_frames, latent_height, latent_width),
    )
    seconds = request.seconds if request.seconds is not None else num_frames / FRAMES_PER_SECOND
    return Plan(
        family=NAME,
        model=model,
        prompt=request.prompt,
        prompt_suffix=_or(request.prompt_suffix, own.prompt_suffix),
        negative_prompt=_or(request.negative_prompt, own.negative_prompt),
        seconds=f"{seconds:g}",
        width=width,
        height=height,
        fps=FRAMES_PER_SECOND,
        seed=drawn_seed() if request.seed is None else request.seed,
        has_picture=True,
        units=(unit,),
        settings=settings.model_dump(mode="json"),
    )


def settings_of(plan: Plan) -> ShownFields:
    """The family's own values of a plan. Raises ``ValueError`` for a plan of another family."""
    if plan.family != NAME:
        raise ValueError(f"family={plan.family!r}: must be {NAME!r}")
    return ShownFields.model_validate(plan.settings)


def step_runs(plan: Plan, unit: int) -> list[StepRun]:
    """The steps of a video, each of which the UNet computes for both prompts or, without guidance, for one."""
    num_rows = 1 if settings_of(plan).guidance_scale <= 1 else 2
    run = plan.unit(unit)
    _, frames, height, width = run.latent_shape
    return [StepRun(run.num_steps, (row_cost(frames * height * width),) * num_rows)]


def _or(given: Value | None, default: Value) -> Value:
    return default if given is None else given


def _motion(fields: RequestFields, capabilities: Capabilities) -> MotionKind:
    given: dict[str, Any] = {"mode": fields.mode, "motion": fields.motion}
    if fields.motion_scale is not None:
        for name, value in given.items():
            if value is not None:
                raise RequestError(
                    f"motion_scale={fields.motion_scale}: contradicts {name}={value}, of which it is another name; "
                    "give one of the two",
                    param="motion_scale",
                )
        kind, param = MotionKind.of_scale(fields.motion_scale), "motion_scale"
    else:
        kind = MotionKind(_or(fields.mode, "animate"), _or(fields.motion, capabilities.settings.motion))
        param = "mode"
    if kind.mode == "style" and not capabilities.settings.personalised:
        came = fields.motion_scale if param == "motion_scale" else kind.mode
        raise RequestError(
            f"{param}={came}: needs a model with a style of its own; if this is one, its pyramid_serve.json has to say "
            "personalised: true",
            param=param,
        )
    return kind


def _steps(fields: RequestFields, scheduler: SchedulerName, capabilities: Capabilities, limits: RequestLimits) -> int:
    most, given = limits.max_num_inference_steps, fields.num_inference_steps
    if given is not None and given > most:
        raise RequestError(f"num_inference_steps={given}: at most {most}", param="num_inference_steps")
    if given is not None:
        return given
    most = min(most, capabilities.max_num_inference_steps, MAX_LCM_STEPS if scheduler == "lcm" else most)
    return min(capabilities.settings.num_inference_steps, most)


def _check_together(settings: ShownFields, capabilities: Capabilities) -> None:
    """``RequestError`` for values that are allowed alone and not together."""
    steps, strength, scheduler = settings.num_inference_steps, settings.strength, settings.scheduler
    if settings.clip_skip > capabilities.max_clip_skip:
        raise RequestError(f"clip_skip={settings.clip_skip}: at most {capabilities.max_clip_skip}", param="clip_skip")
    if scheduler == "lcm" and steps > MAX_LCM_STEPS:
        raise RequestError(
            f"num_inference_steps={steps}: at most {MAX_LCM_STEPS} with scheduler=lcm", param="num_inference_steps"
        )
    if steps > capabilities.max_num_inference_steps:
        raise RequestError(
            f"num_inference_steps={steps}: at most {capabilities.max_num_inference_steps}, since this model has noise "
            f"levels for {capabilities.max_num_inference_steps + 1} timesteps",
            param="num_inference_steps",
        )
    if num_skipped_steps(steps, strength) == steps:
        least = math.ceil(1000 / steps) / 1000
        raise RequestError(
            f"strength={strength:g}: leaves none of num_inference_steps={steps}; must be at least {least:g}",
            param="strength",
        )
    if settings.free_init is None:
        return
    if strength < 1:
        raise RequestError(
            f"strength={strength:g}: cannot be combined with free_init, which begins from noise at each iteration",
            param="strength",
        )
    if scheduler in _LAST_TIMESTEP_MISSING and capabilities.timestep_spacing == "leading":
        raise RequestError(
            f"scheduler={scheduler}: cannot be combined with free_init, since this model has timestep_spacing=leading, "
            "which leaves the last timestep out; take ddim, pndm or lcm",
            param="scheduler",
        )
    if scheduler == "euler" and 1 in steps_of_iterations(steps, settings.free_init)[:-1]:
        raise RequestError(
            "scheduler=euler: cannot be combined with a free_init that makes the video in one step before it makes it "
            "again; give more num_inference_steps, or take ddim",
            param="scheduler",
        )


def _num_frames(request: VideoRequest, capabilities: Capabilities) -> int:
    most = capabilities.max_num_frames
    of_seconds = None
    if request.seconds is not None:
        of_seconds = max(round(request.seconds * FRAMES_PER_SECOND), MIN_FRAMES)
        if of_seconds > most:
            raise RequestError(
                f"seconds={request.seconds:g}: {of_seconds} frames at {FRAMES_PER_SECOND} fps; at most {most} "
                f"({most / FRAMES_PER_SECOND:g} s) are made here",
                param="seconds",
            )
    if request.num_frames is None:
        return _or(of_seconds, capabilities.default_num_frames)
    if of_seconds is not None and of_seconds != request.num_frames:
        raise RequestError(
            f"num_frames={request.num_frames}: contradicts seconds={request.seconds:g}, which is {of_seconds} frames "
            f"at {FRAMES_PER_SECOND} fps; give one of the two",
            param="num_frames",
        )
    if not MIN_FRAMES <= request.num_frames <= most:
        raise RequestError(f"num_frames={request.num_frames}: must be from {MIN_FRAMES} to {most}", param="num_frames")
    return request.num_frames


def _size(request: VideoRequest, capabilities: Capabilities, limits: RequestLimits) -> tuple[int, int]:
    """(width, height) in pixels."""
    multiple = capabilities.side_multiple
    asked = request.size_asked_for
    if asked is None:
        return _size_of_picture(request, multiple, edge=_long_edge(capabilities, limits))
    width, height = asked
    param, came = "size", f"size={width}x{height}"
    if request.size is None:
        param, came = "width", f"width={width}, height={height}"
    if width % multiple or height % multiple:
        raise RequestError(f"{came}: width and height must be positive multiples of {multiple}", param=param)
    if width * height > limits.max_pixels:
        raise RequestError(f"{came}: {width * height} pixels, at most {limits.max_pixels}", param=param)
    return width, height


def _size_of_picture(request: VideoRequest, multiple: int, *, edge: int) -> tuple[int, int]:
    """The picture's size, its longer side brought to ``edge`` and the other to the nearest ``multiple``."""
    assert request.input_reference is not None  # it is required
    try:
        sides = picture_size(request.input_reference, name="input_reference")
    except InputError as error:
        raise RequestError(str(error), param="input_reference") from None
    width, height = (max(round(side * edge / max(sides) / multiple), 1) * multiple for side in sides)
    return width, height


def _long_edge(capabilities: Capabilities, limits: RequestLimits) -> int:
    """The longer side where no size is asked for: a multiple whose square is within the limits."""
    multiple = capabilities.side_multiple
    most = max(int(limits.max_pixels**0.5) // multiple, 1) * multiple
    return min(capabilities.long_edge, most)
