"""Tiny transformers and random sequences for tests; no checkpoint needed."""

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import nn

from pyramid_serve.pyramid_flow import flux, mmdit
from pyramid_serve.pyramid_flow.fused import fuse_layers
from pyramid_serve.pyramid_flow.history import history_clips
from pyramid_serve.pyramid_flow.pack import ClipSequence, PromptEmbeds

MMDIT_CONFIG = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 16,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 16,
    "patch_size": 2,
}
FLUX_CONFIG = {
    "num_layers": 1,
    "num_single_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": [4, 6, 6],
    "in_channels": 64,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
}


def tiny_transformers() -> list[torch.nn.Module]:
    models: list[torch.nn.Module] = [mmdit.from_config(MMDIT_CONFIG), flux.from_config(FLUX_CONFIG)]
    return [model.eval().requires_grad_(False) for model in models]


def random_prompt(num_tokens: int = 6) -> PromptEmbeds:
    return PromptEmbeds(torch.randn(num_tokens, 24), torch.randn(20))


def random_sequence(*, unit: int, stage: int, timestep: float, num_tokens: int = 6) -> ClipSequence:
    clips = history_clips(torch.randn(16, unit, 16, 24), stage)
    scale = 2 ** (2 - stage)
    return ClipSequence(random_prompt(num_tokens), (*clips, torch.randn(16, 1, 16 // scale, 24 // scale)), timestep)


def largest_difference(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


@st.composite
def any_sequence(draw: st.DrawFn) -> ClipSequence:
    """A sequence of a random unit, stage, size, text length and timestep."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    unit, stage = draw(st.integers(0, 6)), draw(st.integers(0, 2))
    height, width = (8 * draw(st.integers(1, 3)) for _ in range(2))
    num_text_tokens = draw(st.integers(1, 20) | st.just(128))
    scale = 2 ** (2 - stage)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    clips = history_clips(random(16, unit, height, width), stage)
    prompt = PromptEmbeds(random(num_text_tokens, 24), random(20))
    return ClipSequence(prompt, (*clips, random(16, 1, height // scale, width // scale)), draw(st.floats(0, 1000)))


def lively_transformer(
    build: type[mmdit.MMDiT] | type[flux.Flux], dtype: torch.dtype, *, num_blocks: int | None = None
) -> nn.Module:
    """A tiny transformer in which everything acts on the result: weights as large as those of a trained model."""
    config = {mmdit.MMDiT: mmdit.MMDiTConfig, flux.Flux: flux.FluxConfig}[build]
    sizes = dict(MMDIT_CONFIG if build is mmdit.MMDiT else FLUX_CONFIG)
    if num_blocks is not None:
        sizes |= {"num_layers": num_blocks} | ({"num_single_layers": num_blocks} if build is flux.Flux else {})
    model = build(config.from_dict(sizes))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    model.to(dtype).eval().requires_grad_(False)
    fuse_layers(model)
    return model
