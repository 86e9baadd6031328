"""The sampler: how the latents of a video are made, a step at a time.

C = 4 channels, F frames, h w latent size, L text tokens, D their width.

``denoise`` is a generator: it yields the rows of its next step, is sent the predictions for them, and returns the
latents. So one loop can drive one video, or pack the steps of many. It can also go on after any step, from the state
there. Sources: arXiv 2312.13964; for FreeInit 2312.07537.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyramid_serve.pia.free_init import low_pass_filter, mix
from pyramid_serve.pia.motion import affinities
from pyramid_serve.pia.noise import NoiseSource
from pyramid_serve.pia.sampler_state import SamplerState
from pyramid_serve.pia.schedulers import restore, scheduler_state
from pyramid_serve.pia.settings import (
    FreeInit,
    MotionKind,
    SchedulerName,
    num_skipped_steps,
    row_cost,
    steps_of_iterations,
)
from pyramid_serve.precision import check_finite


@dataclass(frozen=True)
class SamplingSettings:
    """How a video is sampled. Guidance of at most 1 leaves the negative prompt out."""

    motion: MotionKind
    num_frames: int
    scheduler: SchedulerName
    num_inference_steps: int
    guidance_scale: float
    strength: float = 1.0
    free_init: FreeInit | None = None


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What a video is made from, all on one device. The picture is a normal distribution of latents, float32."""

    prompt_embeds: Tensor
    """(L, D)"""
    negative_prompt_embeds: Tensor
    """(L, D)"""
    picture_mean: Tensor
    """(C, h, w)"""
    picture_std: Tensor
    """(C, h, w)"""


@dataclass(frozen=True, eq=False)
class UNetRow:
    """One video with one prompt at one timestep, as the UNet takes it."""

    sample: Tensor
    """(9, F, h, w), float32: noisy latents, the frames' affinities to the picture, the picture's latents."""
    timestep: Tensor
    """()"""
    prompt_embeds: Tensor
    """(L, D)"""

    @property
    def num_tokens(self) -> int:
        return row_cost(self.sample[0].numel())


Steps = Generator[tuple[UNetRow, ...], Sequence[Tensor], Tensor]


def denoise(
    given: Conditioning,
    settings: SamplingSettings,
    *,
    scheduler: Any,
    noise: NoiseSource,
    state: SamplerState | None = None,
    on_step: Callable[[Callable[[], SamplerState]], None] | None = None,
) -> Steps:
    """Make a video's latents (C, F, h, w), float32, on the device of what is given.

    Yields one or two rows a step (negative, then positive; only the positive without guidance) and expects their
    predictions (C, F, h, w). scheduler: a new one, of this video alone; state: where to go on, None for the start;
    on_step: called after each step with a function that gives the state there. Raises ``NonFiniteError`` where latents
    hold NaN or infinity.
    """
    channels, height, width = given.picture_mean.shape
    device, shape = given.picture_mean.device, (channels, settings.num_frames, height, width)
    drawn = noise.picture((channels, height, width)).to(device)
    picture = (given.picture_mean + given.picture_std * drawn)[:, None].expand(shape)
    affinity = torch.tensor(affinities(settings.motion, settings.num_frames), device=device)
    condition = torch.cat([affinity[None, :, None, None].expand(1, *shape[1:]), picture])  # (5, F, h, w)

    latents, timesteps = _start(picture, settings, scheduler=scheduler, noise=noise)
    first_latents = latents
    for iteration, num_steps in enumerate(steps_of_iterations(settings.num_inference_steps, settings.free_init)):
        if state is not None and iteration < state.iteration:
            continue
        is_resumed = state is not None and iteration == state.iteration
        if settings.free_init is not None:
            if iteration > 0 and not is_resumed:
                fresh = noise.free_init(iteration, shape).to(device)
                latents = _noised_again(latents, first_latents, fresh, settings.free_init, scheduler)
            scheduler.set_timesteps(num_steps, device=device)
            timesteps = scheduler.timesteps
        num_done = 0
        if state is not None and is_resumed:
            latents, num_done = state.latents.to(device), state.step
            restore(scheduler, state.scheduler, device=device)
        for step, timestep in enumerate(timesteps[num_done:], num_done):
            sample = torch.cat([scheduler.scale_model_input(latents, timestep), condition])
            prediction = yield from _predict(sample, timestep, given, guidance_scale=settings.guidance_scale)
            source = {"generator": noise.step(iteration, step)} if settings.scheduler == "lcm" else {}
            latents = scheduler.step(prediction, timestep, latents, **source).prev_sample
            if on_step is not None:
                on_step(partial(_state_at, iteration, step + 1, latents, scheduler))
        check_finite(latents, "latents")
    return latents


def _predict(sample: Tensor, timestep: Tensor, given: Conditioning, *, guidance_scale: float) -> Steps:
    """The prediction (C, F, h, w) of one step, with guidance; yields as ``denoise`` does."""
    positive = UNetRow(sample, timestep, given.prompt_embeds)
    if guidance_scale <= 1:
        (prediction,) = yield (positive,)
        return prediction
    negative = UNetRow(sample, timestep, given.negative_prompt_embeds)
    unconditional, conditional = yield negative, positive
    return unconditional + guidance_scale * (conditional - unconditional)


def _state_at(iteration: int, step: int, latents: Tensor, scheduler: Any) -> SamplerState:
    return SamplerState(iteration, step, latents, scheduler_state(scheduler))


def _start(picture: Tensor, settings: SamplingSettings, *, scheduler: Any, noise: NoiseSource) -> tuple[Tensor, Tensor]:
    """The first latents (C, F, h, w) and the timesteps: from noise, or for a strength below 1 from the picture."""
    num_steps = settings.num_inference_steps
    scheduler.set_timesteps(num_steps, device=picture.device)
    if settings.strength >= 1:
        return noise.initial(tuple(picture.shape)).to(picture) * scheduler.init_noise_sigma, scheduler.timesteps
    first = num_skipped_steps(num_steps, settings.strength)
    timesteps = scheduler.timesteps[first:]
    if hasattr(scheduler, "set_begin_index"):  # others find the step by its timestep
        scheduler.set_begin_index(first)
    drawn = noise.strength(tuple(picture.shape)).to(picture)
    return scheduler.add_noise(picture, drawn, timesteps[:1]), timesteps


def _noised_again(latents: Tensor, first: Tensor, fresh: Tensor, settings: FreeInit, scheduler: Any) -> Tensor:
    """Latents to start an iteration of FreeInit from.

    Those of the iteration before, with the first noise on them as at the last timestep of training, and of that the low
    frequencies; the high ones are of fresh noise.
    """
    last = torch.tensor([scheduler.config.num_train_timesteps - 1], device=latents.device)
    noisy = scheduler.add_noise(latents, first, last)
    frames, height, width = latents.shape[-3:]
    return mix(noisy, fresh, low_pass_filter(settings, (frames, height, width)).to(latents.device))
