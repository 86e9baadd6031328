"""The three parts of a Pyramid Flow model as ``families`` defines them, each loaded alone.

C = 16 channels, U finished units, H W latent size of a video.
"""

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from pyramid_serve.checkpoints.sources import read_config
from pyramid_serve.families import Decoded, Encoded, PartSource, UnitInput
from pyramid_serve.media.tensors import fit_picture
from pyramid_serve.precision import vae_dtype
from pyramid_serve.pyramid_flow.attention import attention_by_name, fastest_on
from pyramid_serve.pyramid_flow.autoencoder import DecoderMemory, Tiling
from pyramid_serve.pyramid_flow.capabilities import capabilities
from pyramid_serve.pyramid_flow.codec import decode_unit, encode_picture
from pyramid_serve.pyramid_flow.noise import SeededNoise
from pyramid_serve.pyramid_flow.pack import ClipSequence, PromptEmbeds
from pyramid_serve.pyramid_flow.parts import latent_scale_of, load_transformer, load_vae, set_up, set_up_vae
from pyramid_serve.pyramid_flow.planning import latent_shape_of, settings_of
from pyramid_serve.pyramid_flow.sampler import UnitSteps, denoise_unit, run_units
from pyramid_serve.pyramid_flow.settings import SamplingSettings
from pyramid_serve.pyramid_flow.shapes import LATENT_CHANNELS, NUM_STAGES, SIZE_MULTIPLE, SPATIAL_FACTOR, LatentShape
from pyramid_serve.pyramid_flow.text_encoder import TextEncoder
from pyramid_serve.pyramid_flow.variants import transformer_folder

logger = logging.getLogger(__name__)

_EMBEDS = "prompt_embeds"
_POOLED = "pooled_prompt_embeds"
_LATENTS = "latents"


class TextEncoding:
    """``families.TextPart``: the text encoders of a checkpoint."""

    def __init__(self, source: PartSource) -> None:
        self.dtype = source.dtype
        self._encoder = TextEncoder.from_pretrained(source.source, dtype=source.dtype, device=source.device)

    def encode(self, prompts: Sequence[str]) -> list[Encoded]:
        with torch.inference_mode():
            return [_encoded(embeds) for embeds in self._encoder.encode(prompts)]


def _encoded(embeds: PromptEmbeds) -> Encoded:
    on_cpu = embeds.to("cpu")
    return Encoded(
        {_EMBEDS: on_cpu.prompt_embeds, _POOLED: on_cpu.pooled_prompt_embeds}, truncated_at=embeds.truncated_at
    )


class Denoising:
    """``families.DenoisePart``: the transformer. Units of any videos, sizes, stages and timesteps share a forward."""

    def __init__(self, source: PartSource) -> None:
        self.dtype = source.dtype
        self._source = source
        self._attention = attention_by_name(source.options.attention or fastest_on(source.device))
        self._transformer = load_transformer(source.source, source.variant, dtype=source.dtype, device=source.device)
        set_up(
            self._transformer,
            source.device,
            compiled=source.options.compiled,
            batch_invariant=source.options.batch_invariant,
            graphs=source.options.graphs,
            fp8=source.options.fp8,
        )

    def steps(self, given: UnitInput) -> UnitSteps:
        """The steps of a unit. Its tensors are moved to the device before the first, its latents back after the last.

        This is a generator, so all of that happens on the thread that drives it, which is the engine's.
        """
        shape, device = latent_shape_of(given.plan), self._source.device
        size = shape.size_at(NUM_STAGES - 1)
        nothing = torch.zeros(LATENT_CHANNELS, 0, *size)
        latents = yield from denoise_unit(
            _embeds(given.prompt, device),
            _embeds(given.negative_prompt, device),
            torch.cat([nothing, *given.history], dim=1).to(device),
            settings=settings_of(given.plan).sampling,
            noise=SeededNoise(given.plan.seed, shape),
        )
        return latents.cpu()

    def forward(self, requests: Sequence[ClipSequence]) -> list[Tensor]:
        with torch.inference_mode():
            predictions = self._transformer(requests, attention=self._attention)
        if self._source.device.type == "cuda":
            # Without it the thread runs ahead of the device, and a step's time, errors and cancelling come late.
            torch.cuda.synchronize(self._source.device)
        return predictions

    def packs_with(self, request: ClipSequence) -> Hashable:
        return None  # any sequence shares a forward with any other

    def warm_up(self, size: tuple[int, int] | None) -> None:
        """Make one unit of a video. On CUDA, packs of several sequences come first, whose kernels are those of all."""
        if self._source.device.type == "cuda":
            logger.info("compiling for packs of any sequences")
            run_units(self.forward, [self._warm_up_steps(size), self._warm_up_steps(size)])
            logger.info("compiling for packs of one sequence")
            run_units(self.forward, [self._warm_up_steps(size, guidance_scale=0.0)])
        run_units(self.forward, [self._warm_up_steps(size)])

    def _warm_up_steps(self, size: tuple[int, int] | None, *, guidance_scale: float = 7.0) -> UnitSteps:
        """Unit 2 of a video, one step a stage: every kind of clip that there is."""
        width, height = size or (SIZE_MULTIPLE, SIZE_MULTIPLE)
        shape, device = LatentShape.of_pixels(height=height, width=width, num_latent_frames=3), self._source.device
        config = read_config(transformer_folder(self._source.source, self._source.variant))
        # 11 tokens: a number that torch.compile finds equal to a size of the model is compiled as that size alone.
        prompt = PromptEmbeds(
            torch.zeros(11, config["joint_attention_dim"]), torch.zeros(config["pooled_projection_dim"])
        ).to(device, self.dtype)
        return denoise_unit(
            prompt,
            prompt,
            torch.zeros(LATENT_CHANNELS, 2, *shape.size_at(NUM_STAGES - 1), device=device),
            settings=SamplingSettings((1, 1, 1), (1, 1, 1), guidance_scale=guidance_scale),
            noise=SeededNoise(0, shape),
        )


def _embeds(tensors: Mapping[str, Tensor], device: torch.device) -> PromptEmbeds:
    return PromptEmbeds(tensors[_EMBEDS], tensors[_POOLED]).to(device)


_ODD_SIZE = (56, 40)
"""Pixels. torch.compile takes lengths for one and the same that are equal at first, and compiles again where they are
not; no two lengths of the decoder are equal at this size."""


@dataclass(frozen=True, eq=False)
class DecodeStep:
    """One latent frame (C, 1, H, W) to decode after what ``memory`` holds; None at the start of a video."""

    latents: Tensor
    memory: DecoderMemory | None

    @property
    def num_tokens(self) -> int:
        """Latent pixels."""
        return self.latents.shape[-2] * self.latents.shape[-1]


class Decoding:
    """``families.DecodePart``: the VAE. Units of one size share a forward, first units apart from later ones."""

    def __init__(self, source: PartSource) -> None:
        self.dtype = vae_dtype(source.dtype)
        self._source = source
        self._vae = load_vae(source.source, dtype=source.dtype, device=source.device)
        set_up_vae(self._vae, source.device, compiled=source.options.compiled)
        self._scale = latent_scale_of(source.source, source.variant)
        tiling = source.options.tiling
        self._tiling = None if tiling is None else Tiling(tiling)

    def encode_picture(self, picture: Image.Image, *, height: int, width: int) -> dict[str, Tensor]:
        pixels = fit_picture(picture, height=height, width=width).to(self._source.device)
        with torch.inference_mode():
            return {_LATENTS: encode_picture(self._vae, self._scale, pixels, tiling=self._tiling).cpu()}

    def request(self, latents: Tensor, memory: DecoderMemory | None) -> DecodeStep:
        channels, num_units = latents.shape[:2] if latents.ndim == 4 else (0, 0)
        if (channels, num_units) != (LATENT_CHANNELS, 1):
            raise ValueError(f"latents: shape {tuple(latents.shape)}, must be ({LATENT_CHANNELS}, 1, H, W)")
        return DecodeStep(latents.to(self._source.device), memory)

    def forward(self, requests: Sequence[DecodeStep]) -> list[Decoded[DecoderMemory]]:
        latents = torch.stack([step.latents for step in requests])
        memories = [step.memory for step in requests if step.memory is not None]
        with torch.inference_mode():
            frames, after = decode_unit(
                self._vae,
                self._scale,
                latents,
                DecoderMemory.stack(memories) if memories else None,
                tiling=self._tiling,
            )
        return [Decoded(video, own) for video, own in zip(frames.cpu(), after.unstack(), strict=True)]

    def packs_with(self, request: DecodeStep) -> Hashable:
        return request.latents.shape, request.memory is None

    def warm_up(self, size: tuple[int, int] | None) -> int:
        width, height = size or _ODD_SIZE
        latents = torch.zeros(LATENT_CHANNELS, 1, height // SPATIAL_FACTOR, width // SPATIAL_FACTOR)
        (first,) = self.forward([self.request(latents, None)])
        self.forward([self.request(latents, first.memory)])
        default_width, default_height = capabilities(self._source.source, self._source.variant).default_size
        return first.memory.num_bytes * (default_width * default_height) // (width * height)
