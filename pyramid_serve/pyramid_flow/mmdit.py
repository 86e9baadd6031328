"""The SD3 variant of Pyramid Flow: joint blocks, a fixed sine table for space, RoPE for time.

S sequences in the pack, L tokens, D width, C latent channels, T frames, h w latent size of a clip.
Source: arXiv 2410.05954 and 2403.03206; the published ``diffusion_transformer_*`` folders of the SD3 checkpoint.
"""

from collections.abc import Generator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from pyramid_serve.checkpoints.configs import Count, Features, Layers, parse_config
from pyramid_serve.pyramid_flow.attention import Attention, block_attention
from pyramid_serve.pyramid_flow.fused import Linear, PatchProjection
from pyramid_serve.pyramid_flow.graphs import Graphs
from pyramid_serve.pyramid_flow.layers import (
    JointBlock,
    Modulation,
    Modulations,
    PackContext,
    TimeTextEmbed,
    final_modulation,
    pack_rope,
)
from pyramid_serve.pyramid_flow.pack import ClipSequence, SequenceShape, conditioning_of, pack, padded, unpatchify
from pyramid_serve.pyramid_flow.rows import Prediction, in_turn, tile_on
from pyramid_serve.pyramid_flow.shapes import PATCH_SIZE

QK_NORM_EPS = 1e-5


class MMDiTConfig(BaseModel):
    """The sizes in a published ``config.json``."""

    model_config = ConfigDict(frozen=True)

    num_layers: Layers
    num_heads: Count = Field(validation_alias="num_attention_heads")
    head_size: Features = Field(validation_alias="attention_head_dim")
    in_channels: Features
    text_features: Features = Field(validation_alias="joint_attention_dim")
    pooled_features: Features = Field(validation_alias="pooled_projection_dim")
    pos_embed_max_size: Count

    @property
    def width(self) -> int:
        return self.num_heads * self.head_size

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "MMDiTConfig":
        """From a published ``config.json``. Raises ``ValueError`` if it describes another model."""
        parsed = parse_config(cls, config)
        built = {
            "patch_size": PATCH_SIZE,
            "qk_norm": "rms_norm",
            "pos_embed_type": "sincos",
            "caption_projection_dim": parsed.width,
        }
        for name, value in built.items():
            if config.get(name, value) != value:
                raise ValueError(f"{name}={config[name]!r:.60}: must be {value!r}")
        if parsed.head_size % 2:
            raise ValueError(f"attention_head_dim={parsed.head_size}: must be an even number")
        return parsed


def from_config(config: Mapping[str, Any]) -> "MMDiT":
    """The transformer that a published ``config.json`` describes, without its weights."""
    return MMDiT(MMDiTConfig.from_dict(config))


class MMDiT(nn.Module):
    """The denoiser of the SD3 variant, with the published parameter names."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.batch_invariant = False
        """Whether packs are laid out so that no sequence's result depends on the others, see :mod:`rows`."""
        self.graphs: Graphs | None = None
        """Of small packs, on CUDA, where they are asked for."""
        self.pos_embed = PatchEmbed(config)
        self.time_text_embed = TimeTextEmbed(config.pooled_features, config.width)
        self.context_embedder = Linear(config.text_features, config.width)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(
                config.width,
                config.num_heads,
                head_size=config.head_size,
                eps=QK_NORM_EPS,
                text_norm="norm_add",
                is_last=i + 1 == config.num_layers,
            )
            for i in range(config.num_layers)
        )
        self.norm_out = Modulation(config.width, 2, scales=(0,))
        self.proj_out = Linear(config.width, PATCH_SIZE**2 * config.in_channels)
        self._modulations = Modulations(self.transformer_blocks, self.norm_out)

    def forward(self, sequences: Sequence[ClipSequence], *, attention: Attention = block_attention) -> list[Tensor]:
        """Predictions for the current clip of each sequence, float32, shaped like it: (C, T, h, w)."""
        conditioning = self.time_text_embed(*conditioning_of(sequences, self.proj_out.weight.dtype))  # (S, D)
        return in_turn(partial(self._predict, attention), sequences, self._modulations(conditioning))

    def _predict(
        self, attention: Attention, sequences: Sequence[ClipSequence], vectors: Sequence[Tensor]
    ) -> Prediction:
        device = vectors[0].device
        tile = tile_on(device, batch_invariant=self.batch_invariant)
        own = pack(sequences, vectors[0].dtype, _patchify, tile=tile)
        rope = pack_rope(own.shapes, (self.config.head_size,), device, tile)
        layers = partial(self._layers, own.shapes, tile, PackContext(own.layout, rope, attention))
        inputs = (own.prompt_embeds, own.patches, *vectors)
        out = (yield from layers(*inputs)) if self.graphs is None else self.graphs.of_pack(own, layers, inputs)
        return unpatchify(out.float(), own.shapes, tile)

    def _layers(
        self,
        shapes: Sequence[SequenceShape],
        tile: int,
        context: PackContext,
        prompt_embeds: Tensor,
        patches: Tensor,
        *vectors: Tensor,
    ) -> Generator[None, None, Tensor]:
        """The patches (L, 4 C) of all current clips. Yields after each layer."""
        layout = context.layout
        text: Tensor = self.context_embedder(prompt_embeds)
        image: Tensor = self.pos_embed(patches, shapes, tile)
        for block, own, of_text in zip(self.transformer_blocks, vectors[:-1:2], vectors[1:-1:2], strict=True):
            text, image = block(text, image, own, of_text, context)
            yield
        out: Tensor = self.proj_out(final_modulation(image[layout.current], vectors[-1], layout.current_rows))
        return out


def _patchify(clip: Tensor) -> Tensor:
    """(C, T, h, w) -> (T * h/2 * w/2, 4 C): tokens frame by frame, row by row, each (c p q)."""
    return rearrange(clip, "c t (h p) (w q) -> (t h w) (c p q)", p=PATCH_SIZE, q=PATCH_SIZE)


class PatchEmbed(nn.Module):
    """Patches of an image stream (L, 4 C) -> its tokens (L, D), with their place in the current clip's grid added."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.max_size = config.pos_embed_max_size
        self.proj = PatchProjection(config.in_channels, config.width, PATCH_SIZE, stride=PATCH_SIZE)
        self.register_buffer("pos_embed", torch.zeros(1, self.max_size**2, config.width))
        self.pos_embed: Tensor

    def forward(self, patches: Tensor, shapes: Sequence[SequenceShape], tile: int) -> Tensor:
        tokens: Tensor = self.proj(patches)
        return tokens + torch.cat([padded(self._places(shape.grids), tile) for shape in shapes]).to(tokens.dtype)

    def _places(self, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """(L, D) of the clips of a sequence, whose (frames, rows, columns) are given."""
        table, places = self._central_cut(*grids[-1][1:]), []
        for t, *size in grids:
            resized = table if tuple(size) == table.shape[2:] else F.interpolate(table, size=size, mode="bilinear")
            places.append(rearrange(resized, "1 d h w -> (h w) d").repeat(t, 1))
        return torch.cat(places)

    def _central_cut(self, rows: int, columns: int) -> Tensor:
        """(1, D, rows, columns) from the centre of the table."""
        if max(rows, columns) > self.max_size:
            raise ValueError(f"size: {rows} x {columns} patches, at most {self.max_size} x {self.max_size}")
        top, left = (self.max_size - rows) // 2, (self.max_size - columns) // 2
        table = rearrange(self.pos_embed, "1 (h w) d -> 1 d h w", h=self.max_size)
        return table[:, :, top : top + rows, left : left + columns]
