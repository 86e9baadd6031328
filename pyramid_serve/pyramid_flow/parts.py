"""The parts of a Pyramid Flow checkpoint, each loaded alone: the transformer of a variant, and the VAE.

The text encoders load themselves, see :class:`text_encoder.TextEncoder`. The ``_class_name`` in the
``config.json`` of a transformer's folder tells its architecture.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from pyramid_serve.checkpoints.sources import CheckpointError, Source, read_config, resolve
from pyramid_serve.checkpoints.weights import load_module
from pyramid_serve.precision import device_name, vae_dtype
from pyramid_serve.pyramid_flow import autoencoder, flux, mmdit
from pyramid_serve.pyramid_flow.attention import Attention
from pyramid_serve.pyramid_flow.compiled import compile_blocks, compile_vae, compiles_on
from pyramid_serve.pyramid_flow.fp8 import CAPABILITY as FP8_CAPABILITY
from pyramid_serve.pyramid_flow.fp8 import use_fp8
from pyramid_serve.pyramid_flow.fused import fuse_layers, set_product
from pyramid_serve.pyramid_flow.graphs import Graphs
from pyramid_serve.pyramid_flow.pack import ClipSequence
from pyramid_serve.pyramid_flow.settings import CompiledName
from pyramid_serve.pyramid_flow.variants import choose_variant, transformer_folder

VAE_PART = "causal_video_vae"


class Transformer(Protocol):
    """What both variants are: predictions (C, T, h, w), float32, for the current clip of each packed sequence."""

    batch_invariant: bool
    graphs: Graphs | None

    def __call__(self, sequences: Sequence[ClipSequence], *, attention: Attention) -> list[Tensor]: ...


@dataclass(frozen=True)
class LatentScale:
    """The affine maps between the VAE's latents and those of the transformer; frame 0 has a map of its own.

    Source: the published code's constants, see arXiv 2410.05954, appendix.
    """

    image_shift: float
    image_scale: float
    video_shift: float = -0.2343
    video_scale: float = 1 / 3.0986

    def to_vae(self, latents: Tensor, *, first_unit: int = 0) -> Tensor:
        """Latents (..., T, H, W) of units ``first_unit`` and on, as the VAE decodes them."""
        shift, scale = self._constants(latents, first_unit)
        return latents / scale + shift

    def from_vae(self, latents: Tensor, *, first_unit: int = 0) -> Tensor:
        """The inverse of ``to_vae``."""
        shift, scale = self._constants(latents, first_unit)
        return (latents - shift) * scale

    def _constants(self, latents: Tensor, first_unit: int) -> tuple[Tensor, Tensor]:
        is_image = torch.arange(first_unit, first_unit + latents.shape[-3], device=latents.device)[:, None, None] == 0
        shift = torch.where(is_image, self.image_shift, self.video_shift).to(latents.dtype)
        scale = torch.where(is_image, self.image_scale, self.video_scale).to(latents.dtype)
        return shift, scale


class Variant(NamedTuple):
    """How a transformer of one ``_class_name`` is built, and the scale of its latents."""

    build: Callable[[Mapping[str, Any]], nn.Module]
    latent_scale: LatentScale


VARIANTS: dict[str, Variant] = {
    "PyramidDiffusionMMDiT": Variant(mmdit.from_config, LatentScale(image_shift=0.1490, image_scale=1 / 1.8415)),
    "PyramidFluxTransformer": Variant(flux.from_config, LatentScale(image_shift=-0.04, image_scale=1 / 1.8726)),
}


def load_transformer(
    source: Source,
    variant: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    fused: bool = True,
) -> Transformer:
    """The transformer of a variant (see :func:`variants.choose_variant`). Raises ``CheckpointError``.

    fused: see :mod:`fused`; without, a layer's weights are its own, so that layers can be moved one by one.
    """
    folder = transformer_folder(source, variant)
    build = _variant_of(folder.name, read_config(folder)).build
    module = load_module(build, folder, dtype=dtype, device=device)
    if fused:
        fuse_layers(module)
    return cast(Transformer, module)


def set_up(
    transformer: Transformer,
    device: torch.device,
    *,
    compiled: CompiledName | None,
    batch_invariant: bool,
    graphs: bool = False,
    fp8: bool = False,
) -> None:
    """Prepare a transformer for how it is computed on its device.

    compiled: what :mod:`compiled` compiles; None: the blocks, on CUDA and unless ``batch_invariant``. batch_invariant:
    whether a video's bits may not depend on what else is in its packs, which on a CPU they never do. graphs: whether
    small packs are replayed as CUDA graphs, see :mod:`graphs`; for flex attention alone. fp8: whether the products of
    the blocks are computed in it, see :mod:`fp8`. Raises ``ValueError`` for what cannot be had, or not together.
    """
    module = cast(nn.Module, transformer)
    if graphs:
        if device.type != "cuda":
            raise ValueError(f"graphs=True: needs CUDA, not {device.type}")
        transformer.graphs = Graphs()
    if batch_invariant and compiled == "blocks":
        raise ValueError("compiled='blocks': cannot be had with batch_invariant, since compiled kernels may differ")
    if fp8:
        if batch_invariant:
            raise ValueError("fp8=True: cannot be had with batch_invariant, which has a product of its own")
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
            raise ValueError(f"fp8=True: needs a GPU that multiplies it, such as an H100, not {device_name(device)}")
        use_fp8(module)
    if batch_invariant and device.type != "cpu":
        if device.type != "cuda":
            raise ValueError(f"batch_invariant=True: needs CUDA or a CPU, not {device.type}")
        from pyramid_serve.pyramid_flow.fixed_tiles import fixed_tile_product  # it needs Triton

        set_product(module, fixed_tile_product)
        transformer.batch_invariant = True
    elif compiled == "blocks" or (compiled is None and compiles_on(device)):
        compile_blocks(module)


def set_up_vae(vae: autoencoder.CausalVideoVAE, device: torch.device, *, compiled: CompiledName | None) -> None:
    """Prepare a VAE for how it is computed on its device. compiled: as in ``set_up``; None: on CUDA."""
    if compiled == "blocks" or (compiled is None and compiles_on(device)):
        compile_vae(vae)


def load_vae(
    source: Source, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> autoencoder.CausalVideoVAE:
    """The VAE of a checkpoint, which all its variants share; for float16 it is in float32, see ``precision.vae_dtype``.

    Raises ``CheckpointError``.
    """
    folder = resolve(source, parts=[VAE_PART]) / VAE_PART
    return load_module(autoencoder.from_config, folder, dtype=vae_dtype(dtype), device=device)


def latent_scale_of(source: Source, variant: str | None = None) -> LatentScale:
    """The scale of a variant's latents; fetches no weights."""
    name = choose_variant(source, variant)
    return _variant_of(name, read_config(resolve(source) / name)).latent_scale


def _variant_of(name: str, config: Mapping[str, Any]) -> Variant:
    class_name = config.get("_class_name")
    if class_name not in VARIANTS:
        raise CheckpointError(f"{name}: _class_name={class_name!r}: must be one of {', '.join(VARIANTS)}")
    return VARIANTS[class_name]
