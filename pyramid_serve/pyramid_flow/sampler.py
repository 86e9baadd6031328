"""The sampler: how the latents of one unit are made, a step at a time.

C channels, U finished latent frames, H W latent size.

``denoise_unit`` is a generator: it yields the sequences of its next step, is sent the predictions for them, and
returns the unit's latents. So one loop can drive one unit, or pack the steps of many. Source: arXiv 2410.05954.
"""

from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor

from pyramid_serve.precision import check_finite
from pyramid_serve.pyramid_flow.history import history_clips
from pyramid_serve.pyramid_flow.noise import NoiseSource, halve_noise
from pyramid_serve.pyramid_flow.pack import ClipSequence, PromptEmbeds
from pyramid_serve.pyramid_flow.schedule import enter_stage, stage
from pyramid_serve.pyramid_flow.settings import SamplingSettings
from pyramid_serve.pyramid_flow.shapes import NUM_STAGES

UnitSteps = Generator[tuple[ClipSequence, ...], Sequence[Tensor], Tensor]
Predict = Callable[[Sequence[ClipSequence]], list[Tensor]]


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
