"""Tiny transformers and random sequences for tests; no checkpoint needed."""

from collections.abc import Sequence

import torch

from pyramid_serve.pyramid_flow import flux, mmdit
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
