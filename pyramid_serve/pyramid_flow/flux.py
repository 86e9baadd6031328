"""The miniFLUX variant of Pyramid Flow: double blocks, then single blocks, RoPE over time, row and column.

S sequences in the pack, L tokens, D width, C latent channels, T frames, h w latent size of a clip.
Source: arXiv 2410.05954; the published ``diffusion_transformer_*`` folders of the miniFLUX checkpoint.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from pyramid_serve.checkpoints.configs import Count, Features, Layers, parse_config
from pyramid_serve.pyramid_flow.attention import Attention, block_attention
from pyramid_serve.pyramid_flow.layers import (
    FinalModulation,
    JointBlock,
    Modulation,
    TimeTextEmbed,
    apply_pack_rope,
    modulate,
    pack_rope,
    project_heads,
    vectors_of,
)
from pyramid_serve.pyramid_flow.pack import ClipSequence, PackLayout, pack, patchify, unpatchify
from pyramid_serve.pyramid_flow.rows import project, project_parts, split

QK_NORM_EPS = 1e-6


class FluxConfig(BaseModel):
    """The sizes in a published ``config.json``."""

    model_config = ConfigDict(frozen=True)

    num_double_blocks: Layers = Field(validation_alias="num_layers")
    num_single_blocks: Layers = Field(validation_alias="num_single_layers")
    num_heads: Count = Field(validation_alias="num_attention_heads")
    head_size: Features = Field(validation_alias="attention_head_dim")
    axes_dims: tuple[Features, ...] = Field(validation_alias="axes_dims_rope", max_length=16)
    patch_features: Features = Field(validation_alias="in_channels")
    text_features: Features = Field(validation_alias="joint_attention_dim")
    pooled_features: Features = Field(validation_alias="pooled_projection_dim")

    @property
    def width(self) -> int:
        return self.num_heads * self.head_size

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "FluxConfig":
        """From a published ``config.json``. Raises ``ValueError`` if it describes another model."""
        if config.get("patch_size", 1) != 1:  # the latents are split into patches before
            raise ValueError(f"patch_size={config['patch_size']!r:.60}: must be 1")
        parsed = parse_config(cls, config)
        if sum(parsed.axes_dims) != parsed.head_size or len(parsed.axes_dims) != 3:
            raise ValueError(f"axes_dims_rope={list(parsed.axes_dims)}: must be three that add to {parsed.head_size}")
        if any(size % 2 for size in parsed.axes_dims):
            raise ValueError(f"axes_dims_rope={list(parsed.axes_dims)}: must be even numbers")
        return parsed


def from_config(config: Mapping[str, Any]) -> "Flux":
    """The transformer that a published ``config.json`` describes, without its weights."""
    return Flux(FluxConfig.from_dict(config))


class Flux(nn.Module):
    """The denoiser of the miniFLUX variant, with the published parameter names."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.time_text_embed = TimeTextEmbed(config.pooled_features, width)
        self.context_embedder = nn.Linear(config.text_features, width)
        self.x_embedder = nn.Linear(config.patch_features, width)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(width, config.num_heads, head_size=config.head_size, eps=QK_NORM_EPS, text_norm="norm_added")
            for _ in range(config.num_double_blocks)
        )
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(width, config.num_heads, head_size=config.head_size) for _ in range(config.num_single_blocks)
        )
        self.norm_out = FinalModulation(width)
        self.proj_out = nn.Linear(width, config.patch_features)

    def forward(self, sequences: Sequence[ClipSequence], *, attention: Attention = block_attention) -> list[Tensor]:
        """Predictions for the current clip of each sequence, float32, shaped like it: (C, T, h, w)."""
        dtype = self.proj_out.weight.dtype
        shapes, layout, timesteps, pooled, text_features = pack(sequences, dtype)
        rope = pack_rope(shapes, self.config.axes_dims, timesteps.device)
        conditioning = self.time_text_embed(timesteps, pooled)  # (S, D)
        text = project_parts(self.context_embedder, split(text_features, layout.text_parts))
        patches = torch.cat([patchify(clip) for sequence in sequences for clip in sequence.clips]).to(dtype)
        image = project_parts(self.x_embedder, split(patches, layout.image_parts))

        for block in self.transformer_blocks:
            text, image = block(text, image, conditioning, layout, rope, attention)
        packed = split(layout.join(torch.cat(text), torch.cat(image)), layout.packed_parts)
        for block in self.single_transformer_blocks:
            packed = block(packed, conditioning, layout, rope, attention)
        current = split(torch.cat(packed)[layout.image[layout.current]], layout.current_parts)
        out = project_parts(self.proj_out, self.norm_out(current, conditioning, layout.current_parts))
        return unpatchify(torch.cat(out).float(), shapes)


class SingleAttention(nn.Module):
    """Queries, keys and values of text and image alike; the output projection is the block's."""

    def __init__(self, width: int, num_heads: int, *, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        inner = num_heads * head_size
        self.norm_q = nn.RMSNorm(head_size, eps=QK_NORM_EPS)
        self.norm_k = nn.RMSNorm(head_size, eps=QK_NORM_EPS)
        self.to_q = nn.Linear(width, inner)
        self.to_k = nn.Linear(width, inner)
        self.to_v = nn.Linear(width, inner)

    def forward(
        self, parts: Sequence[Tensor], layout: PackLayout, rope: Tensor, attention: Attention
    ) -> tuple[Tensor, ...]:
        q, k, v = project_heads(parts, self.to_q, self.to_k, self.to_v, head_size=self.head_size)
        q, k = (apply_pack_rope(x, rope, layout) for x in (self.norm_q(q), self.norm_k(k)))
        return split(attention(q, k, v, layout).flatten(1), layout.packed_parts)


class SingleBlock(nn.Module):
    """Attention and MLP side by side over the packed stream. Source: arXiv 2302.05442."""

    def __init__(self, width: int, num_heads: int, *, head_size: int) -> None:
        super().__init__()
        self.norm = Modulation(width, 3)
        self.proj_mlp = nn.Linear(width, 4 * width)
        self.proj_out = nn.Linear(5 * width, width)
        self.attn = SingleAttention(width, num_heads, head_size=head_size)

    def forward(
        self, packed: Sequence[Tensor], conditioning: Tensor, layout: PackLayout, rope: Tensor, attention: Attention
    ) -> list[Tensor]:
        """The parts (L, D) of the pack, before and after the block."""
        vectors = vectors_of(self.norm(conditioning), layout.packed_parts)
        modulated = [modulate(x, shift, scale) for x, (shift, scale, _) in zip(packed, vectors, strict=True)]
        attended = self.attn(modulated, layout, rope, attention)
        out = [self._with_mlp(*x) for x in zip(modulated, attended, strict=True)]
        return [torch.addcmul(x, gate, y) for x, y, (_, _, gate) in zip(packed, out, vectors, strict=True)]

    def _with_mlp(self, x: Tensor, attended: Tensor) -> Tensor:
        """What the block adds to a part, from its modulated tokens and their attention, (L, D) each."""
        mlp = project(self._mlp, x)
        return project(self.proj_out, torch.cat([attended, mlp], dim=-1))

    def _mlp(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj_mlp(x), approximate="tanh")
