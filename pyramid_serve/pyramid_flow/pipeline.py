"""Pyramid Flow in one process: prompts and pictures in, latents and frames out, unit by unit.

B videos, T latent frames (units), F pixel frames, H W in pixels, h w = H / 8, W / 8.
"""

import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast, get_args

import accelerate
import torch
from PIL import Image
from torch import Tensor, nn

from pyramid_serve import checkpoints
from pyramid_serve.api import MAX_SEED, parse_request
from pyramid_serve.checkpoints import Capabilities, Source, choose_variant
from pyramid_serve.checks import whole_number
from pyramid_serve.media.pictures import PictureSource, covering_size, read_picture
from pyramid_serve.media.tensors import fit_picture
from pyramid_serve.precision import (
    DTypeName,
    NonFiniteError,
    Precision,
    available_device,
    check_finite,
    device_name,
    first_non_finite_layer,
)
from pyramid_serve.pyramid_flow.attention import AttentionName, attention_by_name, fastest_on
from pyramid_serve.pyramid_flow.autoencoder import CausalVideoVAE, DecoderMemory, Tiling
from pyramid_serve.pyramid_flow.noise import NoiseSource, SeededNoise
from pyramid_serve.pyramid_flow.pack import ClipSequence, PromptEmbeds
from pyramid_serve.pyramid_flow.parts import LatentScale, Transformer, latent_scale_of, load_transformer, load_vae
from pyramid_serve.pyramid_flow.sampler import Predict, SamplingSettings, append_unit, denoise_unit, run_units
from pyramid_serve.pyramid_flow.shapes import LATENT_CHANNELS, NUM_STAGES, LatentShape
from pyramid_serve.pyramid_flow.text_encoder import TextEncoder
from pyramid_serve.truncation import truncation_note

logger = logging.getLogger(__name__)

Offload = Literal["none", "model", "layers"]
"""none: all parts stay on the device; model: a part at a time; layers: a layer at a time, slow and smallest."""


class Progress(NamedTuple):
    """How far a call has come: ``step`` of ``num_steps`` in ``unit`` of ``num_units``; steps count over all stages."""

    unit: int
    num_units: int
    step: int
    num_steps: int


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True)
class VideoSettings:
    """All that the videos of one call have in common. Sizes in pixels; see :meth:`PyramidFlow.settings`.

    Raises ``ValueError`` for values that no model could use, naming the field.
    """

    width: int
    height: int
    num_latent_frames: int
    sampling: SamplingSettings
    prompt_suffix: str
    negative_prompt: str

    def __post_init__(self) -> None:
        for name in ("width", "height", "num_latent_frames"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least=1))
        if not isinstance(self.sampling, SamplingSettings):
            raise ValueError(f"sampling={self.sampling!r:.60}: must be SamplingSettings")
        _check_texts({"prompt_suffix": self.prompt_suffix, "negative_prompt": self.negative_prompt})
        _ = self.latent_shape  # refuses a size that has no latents

    @property
    def latent_shape(self) -> LatentShape:
        return LatentShape.of_pixels(height=self.height, width=self.width, num_latent_frames=self.num_latent_frames)


def settings_for(
    capabilities: Capabilities,
    *,
    has_image: bool = False,
    width: int | None = None,
    height: int | None = None,
    num_latent_frames: int | None = None,
    prompt_suffix: str | None = None,
    negative_prompt: str | None = None,
    sampling: SamplingSettings | None = None,
) -> VideoSettings:
    """Settings with the model's own defaults where nothing is given, checked against what it can do.

    Raises ``ValueError`` naming the field, what came and what is allowed.
    """
    if (width is None) != (height is None):
        raise ValueError("size: give both width and height, or neither")
    default_width, default_height = capabilities.default_size
    if width is None or height is None:
        width, height = default_width, default_height
    num_latent_frames = capabilities.default_num_latent_frames if num_latent_frames is None else num_latent_frames
    capabilities.check_size(width, height)
    capabilities.check_num_latent_frames(num_latent_frames)
    return VideoSettings(
        width=width,
        height=height,
        num_latent_frames=num_latent_frames,
        sampling=default_sampling(capabilities, has_image=has_image) if sampling is None else sampling,
        prompt_suffix=capabilities.prompt_suffix if prompt_suffix is None else prompt_suffix,
        negative_prompt=capabilities.negative_prompt if negative_prompt is None else negative_prompt,
    )


def default_sampling(capabilities: Capabilities, *, has_image: bool = False) -> SamplingSettings:
    """The steps and guidances that suit a model best, which for the other units depend on a picture being given."""
    return SamplingSettings(
        num_inference_steps=capabilities.num_inference_steps,
        video_num_inference_steps=capabilities.video_num_inference_steps,
        guidance_scale=capabilities.guidance_scale,
        video_guidance_scale=capabilities.image_video_guidance_scale
        if has_image
        else capabilities.video_guidance_scale,
    )


@dataclass(frozen=True)
class VideoInput:
    """What one video of a call is made from.

    seed: 0 to 2**64 - 1; None and -1 are replaced by one that is drawn, so that ``video.seed`` tells it; image: a
    picture to begin with, as a file, an image or an array (see :data:`media.pictures.PictureSource`), which is
    read at once (:func:`media.pictures.read_picture`) and later resized and cropped to the video's size;
    latents: (16, k, h, w) of units already made, to go on from, with the same ``image`` as before where there was one
    (their first is the picture, and the model's own guidance depends on there being one); noise: drawn from ``seed``
    unless given.

    Raises ``ValueError`` naming the field for a prompt that is blank or no text, and for what is no seed, picture or
    tensor.
    """

    prompt: str
    seed: int | None = 0
    image: PictureSource | None = None
    latents: Tensor | None = None
    noise: NoiseSource | None = None

    def __post_init__(self) -> None:
        _check_texts({"prompt": self.prompt})
        object.__setattr__(self, "seed", _seed_of(self.seed))
        if self.image is not None:
            object.__setattr__(self, "image", read_picture(self.image, name="image"))
        if self.latents is not None and (not _is_dense_floats(self.latents) or self.latents.ndim != 4):
            came = type(self.latents).__name__
            if isinstance(self.latents, Tensor):
                came = f"{self.latents.dtype} {tuple(self.latents.shape)} on {self.latents.device}"
            raise ValueError(
                f"latents: must be a tensor of floating-point numbers, not {came}; (16, k, h, w) and dense"
            )

    @property
    def num_given_units(self) -> int:
        """Units that need not be made. With ``latents`` of no unit yet, a picture still is the first."""
        num_made = 0 if self.latents is None else self.latents.shape[1]
        return max(num_made, int(self.image is not None))

    def noise_source(self, shape: LatentShape) -> NoiseSource:
        if self.noise is not None:
            return self.noise
        assert self.seed is not None  # drawn where it was
        return SeededNoise(self.seed, shape)

    def check(self, shape: LatentShape) -> None:
        """``ValueError`` unless this can begin a video of this shape.

        The picture must not be too narrow for it, and ``latents`` must be the beginning of one, all of them finite.
        """
        if isinstance(self.image, Image.Image):
            height, width = shape.pixel_size
            covering_size(self.image, height=height, width=width, name="image")
        if self.latents is None:
            return
        expected = (LATENT_CHANNELS, *shape.size_at(NUM_STAGES - 1))
        channels, num_units, *size = self.latents.shape if self.latents.ndim == 4 else (0, 0)
        if (channels, *size) != expected or num_units > shape.num_latent_frames:
            raise ValueError(
                f"latents: shape {tuple(self.latents.shape)}, must be {expected[0]} channels, at most "
                f"{shape.num_latent_frames} frames of {expected[1]} x {expected[2]}"
            )
        for unit, latents in enumerate(self.latents.unbind(1)):
            check_finite(latents, f"latents: unit {unit}")


Videos = str | VideoInput | Sequence[str | VideoInput]
"""What a call makes: one video or several, each a ``VideoInput`` or only its prompt."""


def _is_dense_floats(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.layout == torch.strided
        and not value.is_meta
        and not value.is_quantized
    )


def _inputs_of(videos: Videos) -> list[VideoInput]:
    """The videos of a call. ``ValueError`` for what is none, naming its place."""
    if isinstance(videos, str | VideoInput):
        return [_input_of(videos)]
    if not isinstance(videos, Sequence) or isinstance(videos, bytes | bytearray | memoryview):
        raise ValueError(
            f"videos={videos!r:.60}: must be a prompt, a VideoInput, or a sequence of them, not {type(videos).__name__}"
        )
    if not videos:
        raise ValueError("videos: give at least one")
    inputs = []
    for index, video in enumerate(videos):
        try:
            inputs.append(_input_of(video))
        except ValueError as error:
            raise ValueError(f"videos[{index}]: {error}") from None
    return inputs


def _input_of(video: str | VideoInput) -> VideoInput:
    return video if isinstance(video, VideoInput) else VideoInput(video)


def _seed_of(seed: object) -> int:
    """A seed as it was given, or one that is drawn."""
    try:
        given = -1 if seed is None else whole_number("seed", seed, least=-1, most=MAX_SEED)
    except ValueError:
        allowed = f"a whole number from 0 to {MAX_SEED}, or -1 or None to draw one"
        raise ValueError(f"seed={seed!r:.60}: must be {allowed}") from None
    return secrets.randbelow(MAX_SEED + 1) if given == -1 else given


def _check_texts(texts: Mapping[str, object]) -> None:
    """``ValueError`` unless these are texts such as a server would take, too."""
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{name}={text!r:.60}: must be text, not {type(text).__name__}")
    parse_request({"prompt": "any", **texts})


def encode_picture(vae: CausalVideoVAE, scale: LatentScale, picture: Tensor, *, tiling: Tiling | None = None) -> Tensor:
    """A picture (3, H, W) in [-1, 1] as unit 0: latents (16, 1, h, w), float32, the mean of their distribution."""
    mean = vae.encode(picture[None, :, None], tiling=tiling).mean[0]
    check_finite(mean, "unit 0: latents of the picture")
    return scale.from_vae(mean)


def to_uint8(pixels: Tensor) -> Tensor:
    """Frames (F, H, W, 3) of pixels (3, F, H, W) in [-1, 1]: ``clamp(127.5 x + 127.5, 0, 255)``, truncated."""
    return (pixels.float() * 127.5 + 127.5).clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def decode_unit(
    vae: CausalVideoVAE,
    scale: LatentScale,
    latents: Tensor,
    memory: DecoderMemory | None,
    *,
    tiling: Tiling | None = None,
) -> tuple[Tensor, DecoderMemory]:
    """The next unit (B, 16, 1, h, w) of B videos as 8-bit frames (B, 1 or 8, H, W, 3), and the memory for the next.

    Raises ``NonFiniteError`` where latents or frames hold NaN or infinity, which 8 bits would show as black or white;
    the message names the first layer of the decoder at which that happened.
    """
    check_finite(latents, "latents")
    scaled = scale.to_vae(latents, first_unit=0 if memory is None else 1)
    frames, new_memory = vae.decode_unit(scaled, memory, tiling=tiling)
    try:
        check_finite(frames, "frames")
    except NonFiniteError as error:
        layer = first_non_finite_layer(vae, lambda: vae.decode_unit(scaled, memory, tiling=tiling))
        raise NonFiniteError(f"{error}, first at {layer}" if layer else str(error)) from None
    return torch.stack([to_uint8(video) for video in frames]), new_memory


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
        offload: Offload = "none",
    ) -> "PyramidFlow":
        """Load a checkpoint from a local folder, an fsspec URL or a Hub id.

        variant: e.g. "768p"; dtype: what suits the device unless given, see :mod:`pyramid_serve.precision`; attention:
        "flex" on CUDA and "blocks" elsewhere unless given, see :mod:`attention`. Raises ``CheckpointError`` (a
        ``ValueError``).
        """
        if offload not in get_args(Offload):
            raise ValueError(f"offload={offload!r:.60}: must be one of {', '.join(get_args(Offload))}")
        device = available_device(device)  # with its index, which accelerate compares
        variant = choose_variant(source, variant)
        capabilities = checkpoints.capabilities(source, variant)
        precision = capabilities.precision_on(device, dtype)
        logger.info("%s in %s on %s: %s", source, precision.name, device_name(device), precision.reason)
        dtype = precision.dtype
        home = device if offload == "none" else torch.device("cpu")
        return cls(
            text_encoder=TextEncoder.from_pretrained(source, dtype=dtype, device=home),
            transformer=load_transformer(source, variant, dtype=dtype, device=home),
            vae=load_vae(source, dtype=dtype, device=home),
            latent_scale=latent_scale_of(source, variant),
            capabilities=capabilities,
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
        """What :meth:`stream` takes: :func:`settings_for` this model."""
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
        inputs = _inputs_of(videos)
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

        Raises ``ValueError`` for what is no such tensor, and ``NonFiniteError`` where values are NaN or infinite.
        """
        if not _is_dense_floats(latents) or latents.ndim != 5:
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
        """Embeddings of each prompt with the suffix, and of the negative prompt, in one batch.

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
