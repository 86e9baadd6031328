"""Pyramid Flow in one process: prompts and pictures in, latents and frames out, unit by unit.

B videos, T latent frames (units), F pixel frames, H W in pixels, h w = H / 8, W / 8.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, cast, get_args

import accelerate
import torch
from PIL import Image
from torch import Tensor, nn

from pyramid_serve.checkpoints.sources import Source
from pyramid_serve.dtypes import DTypeName
from pyramid_serve.errors import NonFiniteError
from pyramid_serve.media.tensors import fit_picture
from pyramid_serve.precision import Precision, available_device, choose_dtype, device_name
from pyramid_serve.pyramid_flow.attention import attention_by_name, fastest_on
from pyramid_serve.pyramid_flow.autoencoder import CausalVideoVAE, DecoderMemory, Tiling
from pyramid_serve.pyramid_flow.capabilities import Capabilities, capabilities
from pyramid_serve.pyramid_flow.codec import decode_unit, encode_picture
from pyramid_serve.pyramid_flow.pack import ClipSequence, PromptEmbeds
from pyramid_serve.pyramid_flow.parts import (
    LatentScale,
    Transformer,
    latent_scale_of,
    load_transformer,
    load_vae,
    set_up,
    set_up_vae,
)
from pyramid_serve.pyramid_flow.sampler import Predict, append_unit, denoise_unit, run_units
from pyramid_serve.pyramid_flow.settings import AttentionName, CompiledName, SamplingSettings
from pyramid_serve.pyramid_flow.shapes import LATENT_CHANNELS, NUM_STAGES
from pyramid_serve.pyramid_flow.text_encoder import TextEncoder
from pyramid_serve.pyramid_flow.variants import choose_variant
from pyramid_serve.pyramid_flow.video_input import VideoInput, Videos, inputs_of, is_dense_floats
from pyramid_serve.pyramid_flow.video_settings import VideoSettings, default_sampling, settings_for
from pyramid_serve.truncation import truncation_note

__all__ = [
    "Offload",
    "Progress",
    "ProgressCallback",
    "PyramidFlow",
    "VideoInput",
    "VideoSettings",
    "Videos",
    "default_sampling",
    "settings_for",
]

logger = logging.getLogger(__name__)

Offload = Literal["none", "model", "layers"]
"""none: all parts stay on the device; model: a part at a time; layers: a layer at a time, slow, in the least memory."""


class Progress(NamedTuple):
    """How far a call has come: ``step`` of ``num_steps`` in ``unit`` of ``num_units``; steps count over all stages."""

    unit: int
    num_units: int
    step: int
    num_steps: int


ProgressCallback = Callable[[Progress], None]


class PyramidFlow:
    """The three parts of a checkpoint on one device, and the plain loop over them."""

    def __init__(
        self,
        *,
        text_encoder: TextEncoder,
        transformer: Transformer,
        vae: CausalVideoVAE,
        latent_scale: LatentScale,
        capabilities: Capabilities,
        precision: Precision,
        device: torch.device,
        attention: AttentionName,
        offload: Offload,
    ) -> None:
        self.text_encoder = text_encoder
        self.transformer = transformer
        self.vae = vae
        self.latent_scale = latent_scale
        self.capabilities = capabilities
        self.precision = precision
        self.device = device
        self._attention = attention_by_name(attention)
        self.offload = offload
        self._release = _offload_parts(self, offload)

    @classmethod
    def from_pretrained(
        cls,
        source: Source,
        *,
        variant: str | None = None,
        dtype: DTypeName | torch.dtype | None = None,
        device: torch.device | str = "cpu",
        attention: AttentionName | None = None,
        compiled: CompiledName | None = None,
        batch_invariant: bool = False,
        offload: Offload = "none",
    ) -> "PyramidFlow":
        """Load a checkpoint from a local folder, an fsspec URL or a Hub id.

        variant: e.g. "768p"; dtype: what suits the device unless given, see :mod:`pyramid_serve.precision`; attention:
        "flex" on CUDA and "blocks" elsewhere unless given, see :mod:`attention`; compiled, batch_invariant: see
        :func:`parts.set_up`; compiled is for the VAE too. With ``offload`` nothing is compiled. Raises
        ``CheckpointError`` (a ``ValueError``).
        """
        if offload not in get_args(Offload):
            raise ValueError(f"offload={offload!r:.60}: must be one of {', '.join(get_args(Offload))}")
        if compiled == "blocks" and offload != "none":
            raise ValueError(f"compiled='blocks': cannot be had with offload={offload!r}, which moves the weights")
        device = available_device(device)  # with its index, which accelerate compares
        variant = choose_variant(source, variant)
        able = capabilities(source, variant)
        precision = choose_dtype(device, asked=dtype, preferred=able.dtype)
        logger.info("%s in %s on %s: %s", source, precision.name, device_name(device), precision.reason)
        home = device if offload == "none" else torch.device("cpu")
        transformer = load_transformer(source, variant, dtype=precision.dtype, device=home, fused=offload == "none")
        may_compile = compiled if offload == "none" else "none"
        set_up(transformer, device, compiled=may_compile, batch_invariant=batch_invariant)
        vae = load_vae(source, dtype=precision.dtype, device=home)
        set_up_vae(vae, device, compiled="none" if batch_invariant else may_compile)
        return cls(
            text_encoder=TextEncoder.from_pretrained(source, dtype=precision.dtype, device=home),
            transformer=transformer,
            vae=vae,
            latent_scale=latent_scale_of(source, variant),
            capabilities=able,
            precision=precision,
            device=device,
            attention=attention or fastest_on(device),
            offload=offload,
        )

    def settings(
        self,
        *,
        has_image: bool = False,
        width: int | None = None,
        height: int | None = None,
        num_latent_frames: int | None = None,
        prompt_suffix: str | None = None,
        negative_prompt: str | None = None,
        sampling: SamplingSettings | None = None,
    ) -> VideoSettings:
        """The settings that :meth:`stream` takes; see :func:`settings_for`, which this calls for this model."""
        return settings_for(
            self.capabilities,
            has_image=has_image,
            width=width,
            height=height,
            num_latent_frames=num_latent_frames,
            prompt_suffix=prompt_suffix,
            negative_prompt=negative_prompt,
            sampling=sampling,
        )

    def generate(
        self,
        videos: Videos,
        settings: VideoSettings | None = None,
        *,
        tiling: Tiling | None = None,
        progress: ProgressCallback | None = None,
    ) -> Tensor:
        """Whole videos, made side by side: 8-bit frames (B, F, H, W, 3). Arguments as for :meth:`stream`."""
        latents = self.generate_latents(videos, settings, tiling=tiling, progress=progress)
        return torch.cat(list(self.decode(latents, tiling=tiling)), dim=1)

    def stream(
        self,
        videos: Videos,
        settings: VideoSettings | None = None,
        *,
        tiling: Tiling | None = None,
        progress: ProgressCallback | None = None,
    ) -> Iterator[Tensor]:
        """Frames of each unit as it is made: (B, 1, H, W, 3) 8-bit, then (B, 8, H, W, 3) T - 1 times.

        videos: one or several, each a prompt or a :class:`VideoInput`; settings: from :meth:`settings`, the model's own
        unless given; tiling: of the VAE; progress: called after every step. Raises ``ValueError`` for what does not
        fit, before any work.
        """
        units = self.stream_latents(videos, settings, tiling=tiling, progress=progress)
        return self._decode(self._taking_turns(units), tiling)

    def generate_latents(
        self,
        videos: Videos,
        settings: VideoSettings | None = None,
        *,
        tiling: Tiling | None = None,
        progress: ProgressCallback | None = None,
    ) -> Tensor:
        """Latents (B, 16, T, h, w), float32, in the transformer's scale. Arguments as for :meth:`stream`."""
        units = self.stream_latents(videos, settings, tiling=tiling, progress=progress)
        latents = torch.cat(list(units), dim=2)
        self._release("transformer")
        return latents

    def stream_latents(
        self,
        videos: Videos,
        settings: VideoSettings | None = None,
        *,
        tiling: Tiling | None = None,
        progress: ProgressCallback | None = None,
    ) -> Iterator[Tensor]:
        """Each unit's latents (B, 16, 1, h, w) in turn, those given first. Arguments as for :meth:`stream`."""
        inputs = inputs_of(videos)
        if settings is None:
            if len({video.image is None for video in inputs}) > 1:
                raise ValueError("videos: some begin with a picture, some do not: say which settings are meant")
            settings = self.settings(has_image=inputs[0].image is not None)
        if not isinstance(settings, VideoSettings):
            raise ValueError(f"settings={settings!r:.60}: must be what PyramidFlow.settings() gives")
        if tiling is not None and not isinstance(tiling, Tiling):
            raise ValueError(f"tiling={tiling!r:.60}: must be a Tiling")
        self.capabilities.check_size(settings.width, settings.height)
        self.capabilities.check_num_latent_frames(settings.num_latent_frames)
        for video in inputs:
            video.check(settings.latent_shape)
        if len({video.num_given_units for video in inputs}) > 1:
            raise ValueError("videos: all of a call must begin at the same unit (with a picture, or without)")
        return self._denoise(inputs, settings, tiling, progress)

    def decode(self, latents: Tensor, *, tiling: Tiling | None = None) -> Iterator[Tensor]:
        """Frames of each unit, as :meth:`stream` yields them, from finished latents (B, 16, T, h, w), floating point.

        Raises ``ValueError`` for anything else, and ``NonFiniteError`` where values are NaN or infinite.
        """
        if not is_dense_floats(latents) or latents.ndim != 5:
            came = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise ValueError(f"latents: must be a dense floating-point tensor (B, 16, T, h, w), not {came}")
        return self._decode_whole(latents, tiling)

    def _decode_whole(self, latents: Tensor, tiling: Tiling | None) -> Iterator[Tensor]:
        try:
            yield from self._decode(latents.split(1, dim=2), tiling)
        finally:
            self._release("vae")

    def encode_prompts(
        self, prompts: Sequence[str], *, prompt_suffix: str, negative_prompt: str
    ) -> tuple[list[PromptEmbeds], PromptEmbeds]:
        """Embeddings of each prompt with the suffix, and of the negative prompt.

        A prompt longer than the text encoder reads is cut, which is logged as a warning and told by ``truncated_at``.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts={prompts!r:.60}: must be a sequence of prompts")
        texts = [*(prompt + prompt_suffix for prompt in prompts), negative_prompt]
        with torch.inference_mode():
            *positive, negative = self.text_encoder.encode(texts)
        for text, embeds in zip(texts, (*positive, negative), strict=True):
            if embeds.truncated_at is not None:
                logger.warning("%s", truncation_note(text, embeds.truncated_at))
        self._release("text_encoder")
        return positive, negative

    def _denoise(
        self,
        videos: Sequence[VideoInput],
        settings: VideoSettings,
        tiling: Tiling | None,
        progress: ProgressCallback | None,
    ) -> Iterator[Tensor]:
        num_units = settings.num_latent_frames
        positive, negative = self.encode_prompts(
            [video.prompt for video in videos],
            prompt_suffix=settings.prompt_suffix,
            negative_prompt=settings.negative_prompt,
        )
        histories = [self._begin(video, settings, tiling) for video in videos]
        self._release("vae")
        for unit in range(histories[0].shape[1]):
            yield torch.stack([history[:, unit : unit + 1] for history in histories])

        for unit in range(histories[0].shape[1], num_units):
            steps = [
                denoise_unit(
                    prompt,
                    negative,
                    history,
                    settings=settings.sampling,
                    noise=video.noise_source(settings.latent_shape),
                )
                for video, prompt, history in zip(videos, positive, histories, strict=True)
            ]
            at_start = Progress(unit, num_units, step=0, num_steps=settings.sampling.num_steps_of(unit))
            latents = run_units(self._predictor(at_start, progress), steps)
            histories = [append_unit(history, one) for history, one in zip(histories, latents, strict=True)]
            yield torch.stack(latents)

    def _decode(self, units: Iterable[Tensor], tiling: Tiling | None) -> Iterator[Tensor]:
        memory: DecoderMemory | None = None
        for unit, latents in enumerate(units):
            try:
                with torch.inference_mode():
                    frames, memory = decode_unit(
                        self.vae, self.latent_scale, latents.to(self.device), memory, tiling=tiling
                    )
            except NonFiniteError as error:
                raise NonFiniteError(f"unit {unit}: {error}") from None
            yield frames.cpu()

    def _taking_turns(self, units: Iterator[Tensor]) -> Iterator[Tensor]:
        """The units, with the transformer off the device while one is decoded, and the VAE while one is made."""
        try:
            for latents in units:
                self._release("transformer")
                yield latents
                self._release("vae")
        finally:
            self._release("transformer")
            self._release("vae")

    def _begin(self, video: VideoInput, settings: VideoSettings, tiling: Tiling | None) -> Tensor:
        """The history (16, k, h, w) that a video starts with: what was made before, a picture, or nothing."""
        if video.latents is not None and video.latents.shape[1]:
            return video.latents.to(self.device, torch.float32)
        if video.image is None:
            size = settings.latent_shape.size_at(NUM_STAGES - 1)
            return torch.zeros(LATENT_CHANNELS, 0, *size, device=self.device)
        assert isinstance(video.image, Image.Image)  # read when the input was made
        picture = fit_picture(video.image, height=settings.height, width=settings.width).to(self.device)
        with torch.inference_mode():
            return encode_picture(self.vae, self.latent_scale, picture, tiling=tiling)

    def _predictor(self, at: Progress, progress: ProgressCallback | None) -> Predict:
        """The transformer as the sampler calls it, once a step, telling ``progress`` after each."""

        def predict(sequences: Sequence[ClipSequence]) -> list[Tensor]:
            nonlocal at
            with torch.inference_mode():
                predictions = self.transformer(sequences, attention=self._attention)
            at = at._replace(step=at.step + 1)
            if progress is not None:
                progress(at)
            return predictions

        return predict


def _offload_parts(pipeline: PyramidFlow, offload: Offload) -> Callable[[str], None]:
    """Set a pipeline's parts up for a small device; the result sends a part ("vae", ...) back to the CPU after use."""
    if offload == "none":
        return lambda part: None
    transformer, vae = cast(nn.Module, pipeline.transformer), pipeline.vae
    parts: dict[str, tuple[nn.Module, ...]] = {
        "text_encoder": pipeline.text_encoder.modules,
        "transformer": (transformer,),
        "vae": (vae.encoder, vae.decoder, vae.quant_conv, vae.post_quant_conv),
    }
    pipeline.text_encoder.device = pipeline.device
    if offload == "layers":
        for modules in parts.values():
            for module in modules:
                accelerate.cpu_offload(module, execution_device=pipeline.device)
        return lambda part: None
    hooks = {
        part: [accelerate.cpu_offload_with_hook(module, pipeline.device)[1] for module in modules]
        for part, modules in parts.items()
    }

    def release(part: str) -> None:
        for hook in hooks[part]:
            hook.offload()

    return release
