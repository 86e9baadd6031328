"""The miniFLUX variant of Pyramid Flow: double blocks, then single blocks, RoPE over time, row and column.

S sequences in the pack, L tokens, D width, C latent channels, T frames, h w latent size of a clip.
Source: arXiv 2410.05954; the published ``diffusion_transformer_*`` folders of the miniFLUX checkpoint.
"""

from collections.abc import Generator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from pyramid_serve.checkpoints.configs import Count, Features, Layers, parse_config
from pyramid_serve.pyramid_flow.attention import Attention, block_attention
from pyramid_serve.pyramid_flow.fused import HeadNorms, Linear, SharedInput
from pyramid_serve.pyramid_flow.graphs import Graphs
from pyramid_serve.pyramid_flow.layers import (
    JointBlock,
    Modulation,
    Modulations,
    PackContext,
    TimeTextEmbed,
    apply_rope,
    final_modulation,
    gelu,
    modulate,
    pack_rope,
)
from pyramid_serve.pyramid_flow.pack import ClipSequence, Rows, conditioning_of, pack, patchify, unpatchify
from pyramid_serve.pyramid_flow.rows import Prediction, in_turn, tile_on

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
        self.batch_invariant = False
        """Whether packs are laid out so that no sequence's result depends on the others, see :mod:`rows`."""
        self.graphs: Graphs | None = None
        """Of small packs, on CUDA, where they are asked for."""
        width = config.width
        self.time_text_embed = TimeTextEmbed(config.pooled_features, width)
        self.context_embedder = Linear(config.text_features, width)
        self.x_embedder = Linear(config.patch_features, width)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(width, config.num_heads, head_size=config.head_size, eps=QK_NORM_EPS, text_norm="norm_added")
            for _ in range(config.num_double_blocks)
        )
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(width, config.num_heads, head_size=config.head_size) for _ in range(config.num_single_blocks)
        )
        self.norm_out = Modulation(width, 2, scales=(0,))
        self.proj_out = Linear(width, config.patch_features)
        self._modulations = Modulations(self.transformer_blocks, self.single_transformer_blocks, self.norm_out)

    def forward(self, sequences: Sequence[ClipSequence], *, attention: Attention = block_attention) -> list[Tensor]:
        """Predictions for the current clip of each sequence, float32, shaped like it: (C, T, h, w)."""
        conditioning = self.time_text_embed(*conditioning_of(sequences, self.proj_out.weight.dtype))  # (S, D)
        return in_turn(partial(self._predict, attention), sequences, self._modulations(conditioning))

    def _predict(
        self, attention: Attention, sequences: Sequence[ClipSequence], vectors: Sequence[Tensor]
    ) -> Prediction:
        device = vectors[0].device
        tile = tile_on(device, batch_invariant=self.batch_invariant)
        own = pack(sequences, vectors[0].dtype, patchify, tile=tile)
        rope = pack_rope(own.shapes, self.config.axes_dims, device, tile)
        layers = partial(self._layers, PackContext(own.layout, rope, attention))
        inputs = (own.prompt_embeds, own.patches, *vectors)
        out = (yield from layers(*inputs)) if self.graphs is None else self.graphs.of_pack(own, layers, inputs)
        return unpatchify(out.float(), own.shapes, tile)

    def _layers(
        self, context: PackContext, prompt_embeds: Tensor, patches: Tensor, *vectors: Tensor
    ) -> Generator[None, None, Tensor]:
        """The patches (L, 4 C) of all current clips. Yields after each layer."""
        layout = context.layout
        text: Tensor = self.context_embedder(prompt_embeds)
        image: Tensor = self.x_embedder(patches)
        num_joint = 2 * len(self.transformer_blocks)
        of_joint, of_single = vectors[:num_joint], vectors[num_joint:-1]
        for block, own, of_text in zip(self.transformer_blocks, of_joint[::2], of_joint[1::2], strict=True):
            text, image = block(text, image, own, of_text, context)
            yield
        packed = torch.cat([text, image])
        for block, own in zip(self.single_transformer_blocks, of_single, strict=True):
            packed = block(packed, own, context)
            yield
        current = packed[layout.num_text :][layout.current]
        out: Tensor = self.proj_out(final_modulation(current, vectors[-1], layout.current_rows))
        return out


class SingleAttention(nn.Module):
    """Projections and norms of text and image alike; the output projection is the block's."""

    def __init__(self, width: int, num_heads: int, *, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        inner = num_heads * head_size
        self.norm_q = nn.RMSNorm(head_size, eps=QK_NORM_EPS)
        self.norm_k = nn.RMSNorm(head_size, eps=QK_NORM_EPS)
        self.to_q = Linear(width, inner)
        self.to_k = Linear(width, inner)
        self.to_v = Linear(width, inner)


class SingleBlock(nn.Module):
    """Attention and MLP side by side over the packed stream. Source: arXiv 2302.05442."""

    def __init__(self, width: int, num_heads: int, *, head_size: int) -> None:
        super().__init__()
        self.norm = Modulation(width, 3, scales=(1,))
        self.proj_mlp = Linear(width, 4 * width)
        self.proj_out = Linear(5 * width, width)
        self.attn = SingleAttention(width, num_heads, head_size=head_size)
        self._norms = HeadNorms(self.attn.norm_q, self.attn.norm_k)
        self._qkv_and_mlp = SharedInput([self.attn.to_q, self.attn.to_k, self.attn.to_v, self.proj_mlp])

    def forward(self, packed: Tensor, vectors: Tensor, context: PackContext) -> Tensor:
        """The pack (L, D), before and after the block. vectors: what modulates it, (S, 3, D)."""
        rows = context.layout.rows
        q, k, v, mlp = self.before_attention(packed, vectors, rows, context.rope)
        return self.after_attention(packed, context.attention(q, k, v, context.layout).flatten(1), mlp, vectors, rows)

    def before_attention(
        self, packed: Tensor, vectors: Tensor, rows: Rows, rope: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values (L, N, d), and the MLP's hidden features (L, 4 D)."""
        shift, gain, _ = vectors.unbind(1)
        products = self._qkv_and_mlp(modulate(packed, shift, gain, rows))
        mlp_size = self.proj_mlp.out_features
        qkv, mlp = products.split([products.shape[1] - mlp_size, mlp_size], dim=1)
        heads = qkv.unflatten(-1, (3, -1, self.attn.head_size))
        q, k = apply_rope(self._norms(heads[:, :2]), rope[:, None]).unbind(1)
        return q, k, heads[:, 2], mlp

    def after_attention(self, packed: Tensor, attended: Tensor, mlp: Tensor, vectors: Tensor, rows: Rows) -> Tensor:
        """The pack with what attention (L, N d) and the MLP add."""
        out = self.proj_out(torch.cat([attended, gelu(mlp)], dim=1))
        return torch.addcmul(packed, vectors[:, 2][rows], out)
