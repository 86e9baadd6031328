"""The sampler: how the latents of one unit are made, a step at a time.

C channels, U finished latent frames, H W latent size.

``denoise_unit`` is a generator: it yields the sequences of its next step, is sent the predictions for them, and
returns the unit's latents. So one loop can drive one unit, or pack the steps of many. Source: arXiv 2410.05954.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyramid_serve.checks import real_number, whole_number
from pyramid_serve.precision import check_finite
from pyramid_serve.pyramid_flow.history import history_clips
from pyramid_serve.pyramid_flow.noise import NoiseSource, halve_noise
from pyramid_serve.pyramid_flow.pack import ClipSequence, PromptEmbeds
from pyramid_serve.pyramid_flow.schedule import enter_stage, stage
from pyramid_serve.pyramid_flow.shapes import NUM_STAGES

Steps = tuple[int, int, int]
UnitSteps = Generator[tuple[ClipSequence, ...], Sequence[Tensor], Tensor]
Predict = Callable[[Sequence[ClipSequence]], list[Tensor]]

MAX_STEPS = 1000
MAX_GUIDANCE = 100.0


@dataclass(frozen=True)
class LinearGuidance:
    """Guidance that falls with the unit: ``max(guidance_scale - alpha * unit, minimum)``."""

    alpha: float = 0.5
    minimum: float = 2.0

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("minimum", self.minimum)):
            number = real_number(f"linear_guidance.{name}", value, least=0, most=MAX_GUIDANCE)
            object.__setattr__(self, name, number)


@dataclass(frozen=True)
class SamplingSettings:
    """Steps of each stage and strength of guidance, for unit 0 and for the others (``video_``).

    A ``guidance_scale`` of 0 switches guidance off for all units, as in the published code: the prompt alone counts.
    """

    num_inference_steps: Steps = (20, 20, 20)
    video_num_inference_steps: Steps = (10, 10, 10)
    guidance_scale: float = 7.0
    video_guidance_scale: float = 5.0
    linear_guidance: LinearGuidance | None = None

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "video_num_inference_steps"):
            object.__setattr__(self, name, _checked_steps(name, getattr(self, name)))
        for name in ("guidance_scale", "video_guidance_scale"):
            scale = real_number(name, getattr(self, name), least=0, most=MAX_GUIDANCE)
            object.__setattr__(self, name, scale)
        if self.linear_guidance is not None and not isinstance(self.linear_guidance, LinearGuidance):
            raise ValueError(f"linear_guidance={self.linear_guidance!r:.60}: must be a LinearGuidance or None")

    def steps_of(self, unit: int) -> Steps:
        return self.num_inference_steps if unit == 0 else self.video_num_inference_steps

    def num_steps_of(self, unit: int) -> int:
        """Denoising steps of a unit, over all its stages."""
        return sum(self.steps_of(unit))

    def guidance_of(self, unit: int) -> float:
        """Guidance of a unit; at 1 the negative prompt has no part in the result."""
        if self.guidance_scale == 0:
            return 1.0
        if self.linear_guidance is not None:
            return max(self.guidance_scale - self.linear_guidance.alpha * unit, self.linear_guidance.minimum)
        return self.guidance_scale if unit == 0 else self.video_guidance_scale


def _checked_steps(name: str, steps: object) -> Steps:
    given = steps if isinstance(steps, list | tuple) else ()
    try:
        first, second, third = (whole_number(name, number, least=1, most=MAX_STEPS) for number in given)
    except ValueError:
        raise ValueError(
            f"{name}={steps!r:.60}: must be {NUM_STAGES} whole numbers from 1 to {MAX_STEPS}, one for each stage"
        ) from None
    return first, second, third


def denoise_unit(
    prompt: PromptEmbeds,
    negative_prompt: PromptEmbeds,
    history: Tensor,
    *,
    settings: SamplingSettings,
    noise: NoiseSource,
) -> UnitSteps:
    """Make the unit that follows ``history`` (C, U, H, W), float32; unit U of the video.

    Yields one or two sequences a step (negative, then positive; only the positive where guidance is 1, which leaves the
    negative out of the result), expects their predictions, and returns the latents (C, 1, H, W). Raises
    ``NonFiniteError`` where the history, or the latents at the end of a stage, are not all finite.
    """
    unit = history.shape[1]
    check_finite(history, f"unit {unit}: latents of the units before it")
    guidance = settings.guidance_of(unit)
    latents = noise.initial(unit).to(history)
    for _ in range(NUM_STAGES - 1):
        latents = halve_noise(latents)
    for index, num_steps in enumerate(settings.steps_of(unit)):
        if index > 0:
            latents = enter_stage(latents, noise.block(unit, index).to(history), index)
        clips = history_clips(history, index)
        sigmas = stage(index).sigmas(num_steps)
        for timestep, sigma, next_sigma in zip(stage(index).timesteps(num_steps), sigmas, sigmas[1:], strict=False):
            positive = ClipSequence(prompt, (*clips, latents), timestep)
            if guidance == 1.0:
                (prediction,) = yield (positive,)
            else:
                negative = ClipSequence(negative_prompt, (*clips, latents), timestep)
                unconditional, conditional = yield negative, positive
                prediction = unconditional + guidance * (conditional - unconditional)
            latents = latents + (next_sigma - sigma) * prediction
        check_finite(latents, f"unit {unit}: latents after stage {index}")
    return latents


def run_units(predict: Predict, units: Sequence[UnitSteps]) -> list[Tensor]:
    """The latents (C, 1, H, W) of each unit, driven to the end side by side with one forward a step."""
    latents: list[Tensor | None] = [None] * len(units)
    waiting = {i: next(unit) for i, unit in enumerate(units)}
    while waiting:
        predictions = iter(predict([sequence for sequences in waiting.values() for sequence in sequences]))
        advanced = {}
        for i, sequences in waiting.items():
            try:
                advanced[i] = units[i].send([next(predictions) for _ in sequences])
            except StopIteration as finished:
                latents[i] = finished.value
        waiting = advanced
    return [x for x in latents if x is not None]


def append_unit(history: Tensor, latents: Tensor) -> Tensor:
    """The history (C, U, H, W) with one more frame (C, 1, H, W) at its end."""
    return torch.cat([history, latents], dim=1)
