"""The three parts of a PIA model as ``families`` defines them, each loaded alone.

C = 4 channels, F frames, h w latent size, H W in pixels.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from pyramid_serve.families import Decoded, Encoded, PartSource, UnitInput, UnitState
from pyramid_serve.media.tensors import fit_picture
from pyramid_serve.pia.capabilities import LATENT_CHANNELS, capabilities, scheduler_config
from pyramid_serve.pia.codec import decode_frames, encode_picture
from pyramid_serve.pia.compiled import as_compiled, set_up
from pyramid_serve.pia.model_files import model_files
from pyramid_serve.pia.noise import SeededNoise
from pyramid_serve.pia.parts import load_unet, load_vae
from pyramid_serve.pia.planning import settings_of
from pyramid_serve.pia.sampler import Conditioning, SamplingSettings, Steps, UNetRow, denoise
from pyramid_serve.pia.sampler_state import SamplerState
from pyramid_serve.pia.schedulers import check_schedulers, new_scheduler
from pyramid_serve.pia.settings import num_timesteps, steps_of_iterations
from pyramid_serve.pia.text_encoder import TextEncoder
from pyramid_serve.pia.unet import predict
from pyramid_serve.precision import vae_dtype

_EMBEDS = "prompt_embeds"
_MEAN = "picture_mean"
_STD = "picture_std"
_NUM_TEXT_TOKENS = 77


class TextEncoding:
    """``families.TextPart``: the text encoder of the base model."""

    def __init__(self, source: PartSource) -> None:
        self.dtype = source.dtype
        files = model_files(source.source)
        self._encoder = TextEncoder(files.base, dtype=source.dtype, device=source.device, loras=files.loras)

    def encode(self, prompts: Sequence[str]) -> list[Encoded]:
        with torch.inference_mode():
            return [
                Encoded({_EMBEDS: self._encoder.encode(prompt).cpu()}, truncated_at=self._encoder.truncated_at(prompt))
                for prompt in prompts
            ]


class Denoising:
    """``families.DenoisePart``: the UNet. Rows of equal size and number of frames share a forward."""

    def __init__(self, source: PartSource) -> None:
        self.dtype = source.dtype
        self._source = source
        files = model_files(source.source)
        self._scheduler_config = scheduler_config(files)
        check_schedulers(self._scheduler_config)
        self._unet = load_unet(files, dtype=source.dtype, device=source.device)
        options = source.options
        self._is_compiled = set_up(
            self._unet, source.device, compiled=options.compiled, channels_last=options.channels_last
        )
        self._one_by_one = source.device.type == "cpu" or options.batch_invariant

    def steps(self, given: UnitInput) -> Steps:
        """The steps of a video. Its tensors are moved to the device before the first, its latents back after the last.

        This is a generator, so all of that happens on the thread that drives it, which is the engine's.
        """
        if given.picture is None:
            raise ValueError("picture: is missing, and a video is made from one")
        settings, device = settings_of(given.plan), self._source.device
        conditioning = Conditioning(
            given.prompt[_EMBEDS][settings.clip_skip].to(device),
            given.negative_prompt[_EMBEDS][0].to(device),
            given.picture[_MEAN].to(device),
            given.picture[_STD].to(device),
        )
        sampling = SamplingSettings(
            motion=settings.motion_kind,
            num_frames=given.plan.num_frames,
            scheduler=settings.scheduler,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            strength=settings.strength,
            free_init=settings.free_init,
        )
        latents = yield from denoise(
            conditioning,
            sampling,
            scheduler=new_scheduler(settings.scheduler, self._scheduler_config),
            noise=SeededNoise(given.plan.seed),
            state=None if given.state is None else SamplerState.of_tensors(given.state.tensors),
            on_step=None if given.on_step is None else partial(_tell, given.on_step, sampling),
        )
        return latents.cpu()

    def forward(self, requests: Sequence[UNetRow]) -> list[Tensor]:
        with torch.inference_mode(), as_compiled() if self._is_compiled else nullcontext():
            return self._predict(requests)

    def _predict(self, requests: Sequence[UNetRow]) -> list[Tensor]:
        predictions = predict(self._unet, requests, one_by_one=self._one_by_one)
        if self._source.device.type == "cuda":
            # Without it the thread runs ahead of the device, and a step's time, errors and cancelling come late.
            torch.cuda.synchronize(self._source.device)
        return predictions

    def packs_with(self, request: UNetRow) -> Hashable:
        return request.sample.shape

    def warm_up(self, size: tuple[int, int] | None) -> None:
        """One forward of a row at a size, and of two where guidance takes two at once.

        Elsewhere than on a CPU those of the size that all others share compiled blocks with come first.
        """
        side = capabilities(self._source.source, self._source.variant).side_multiple
        sizes = [size or (side, side)]
        if self._source.device.type != "cpu":
            # At the UNet's lowest level 5 by 3 latents: torch.compile takes lengths for one and the same that are equal
            # at first, such as both sides or 16 frames and 16 latents, and a side of 1 for itself.
            sizes = [(5 * side, 3 * side), *([] if size is None else [size])]
        with torch.inference_mode():
            for width, height in sizes:
                row = self._row_of_zeros(width, height)
                self._predict([row])
                if not self._one_by_one:
                    self._predict([row, row])

    def _row_of_zeros(self, width: int, height: int) -> UNetRow:
        able, config = capabilities(self._source.source, self._source.variant), self._unet.config
        shape = (able.default_num_frames, height // able.latent_factor, width // able.latent_factor)
        return UNetRow(
            torch.zeros(config.in_channels, *shape, device=self._source.device),
            torch.tensor(0.0, device=self._source.device),
            torch.zeros(_NUM_TEXT_TOKENS, config.cross_attention_dim, device=self._source.device),
        )


def _tell(
    on_step: Callable[[Callable[[], UnitState]], None], sampling: SamplingSettings, take: Callable[[], SamplerState]
) -> None:
    on_step(lambda: _unit_state(take(), sampling))


def _unit_state(state: SamplerState, sampling: SamplingSettings) -> UnitState:
    asked = steps_of_iterations(sampling.num_inference_steps, sampling.free_init)[: state.iteration]
    num_before = sum(num_timesteps(sampling.scheduler, each) for each in asked)
    return UnitState(num_before + state.step, state.as_tensors())


@dataclass(frozen=True, eq=False)
class DecodeStep:
    """The latents (C, F, h, w) of a video."""

    latents: Tensor

    @property
    def num_tokens(self) -> int:
        """Latent pixels."""
        return self.latents[0].numel()


class Decoding:
    """``families.DecodePart``: the VAE. Every frame is decoded by itself."""

    def __init__(self, source: PartSource) -> None:
        self.dtype = vae_dtype(source.dtype)
        self._source = source
        self._vae = load_vae(model_files(source.source), dtype=source.dtype, device=source.device)

    def encode_picture(self, picture: Image.Image, *, height: int, width: int) -> dict[str, Tensor]:
        """The mean and deviation of the picture's latents. The denoiser draws among them, by the video's seed."""
        pixels = fit_picture(picture, height=height, width=width).to(self._source.device)
        with torch.inference_mode():
            mean, std = encode_picture(self._vae, pixels)
        return {_MEAN: mean.cpu(), _STD: std.cpu()}

    def request(self, latents: Tensor, memory: None) -> DecodeStep:
        if latents.ndim != 4 or latents.shape[0] != LATENT_CHANNELS:
            raise ValueError(f"latents: shape {tuple(latents.shape)}, must be ({LATENT_CHANNELS}, F, h, w)")
        return DecodeStep(latents.to(self._source.device))

    def forward(self, requests: Sequence[DecodeStep]) -> list[Decoded[None]]:
        with torch.inference_mode():
            return [Decoded(decode_frames(self._vae, step.latents).cpu(), None) for step in requests]

    def packs_with(self, request: DecodeStep) -> Hashable:
        return request  # nothing is computed together, and a video in a pack would wait for the others

    def warm_up(self, size: tuple[int, int] | None) -> int:
        able = capabilities(self._source.source, self._source.variant)
        width, height = size or (able.side_multiple, able.side_multiple)
        latents = torch.zeros(LATENT_CHANNELS, 1, height // able.latent_factor, width // able.latent_factor)
        self.forward([self.request(latents, None)])
        return 0
