"""Layers that both transformers are built of.

S sequences in the pack, L tokens of a stream, N heads, D width, d head size.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pyramid_serve.pyramid_flow.attention import Attention
from pyramid_serve.pyramid_flow.pack import PackLayout, SequenceShape, layout_of
from pyramid_serve.pyramid_flow.rows import Part, in_tiles, project, project_parts, split

ROPE_THETA = 10000.0
NUM_TIMESTEP_FREQUENCIES = 256
LAYER_NORM_EPS = 1e-6


def rope_table(positions: Tensor, axes_dims: tuple[int, ...]) -> Tensor:
    """Rotations (L, 1, d/2, 2), cosine and sine, of tokens at ``positions`` (L, axes); axis i turns axes_dims[i] dims.

    Source: arXiv 2104.09864, with several axes side by side.
    """
    angles = []
    for axis, dim in enumerate(axes_dims):
        frequencies = ROPE_THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
        angles.append(positions[:, axis, None].double() * frequencies)
    angle = torch.cat(angles, dim=1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float()[:, None]


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is cached may be used with gradients later
def pack_rope(shapes: tuple[SequenceShape, ...], axes_dims: tuple[int, ...], device: torch.device) -> Tensor:
    """The :func:`rope_table` of a pack, from the first ``len(axes_dims)`` axes of its tokens' positions.

    It is computed on the CPU, since some devices have no float64, and cached like the layout.
    """
    positions = layout_of(shapes, device).positions[:, : len(axes_dims)]
    return rope_table(positions, axes_dims).to(device)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the interleaved pairs of ``x`` (L, N, d) by ``rope`` (L, 1, d/2, 2), in float32.

    A pair is rotated by a product of complex numbers, which takes a tenth of the time of the four real products.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(rope)).flatten(-2).to(x.dtype)


def apply_pack_rope(x: Tensor, rope: Tensor, layout: PackLayout) -> Tensor:
    """``apply_rope`` over a pack, part by part, since vectorised loops multiply the last few numbers differently."""
    parts = zip(split(x, layout.packed_parts), split(rope, layout.packed_parts), strict=True)
    return torch.cat([apply_rope(*part) for part in parts])


def timestep_sinusoids(timesteps: Tensor) -> Tensor:
    """(S,) timesteps in 0..1000 -> (S, 256) float32, cosines first. Source: arXiv 1706.03762."""
    half = NUM_TIMESTEP_FREQUENCIES // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm with no weights, then ``scale`` and ``shift``, (1, D) or (L, D). Source: arXiv 2212.09748 (adaLN)."""
    if scale.shape[0] == 1:
        return F.layer_norm(x, x.shape[-1:], 1 + scale[0], shift[0], eps=LAYER_NORM_EPS)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS), 1 + scale)


class MLPEmbedder(nn.Module):
    """(S, in) -> (S, D)."""

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


class TimeTextEmbed(nn.Module):
    """Timesteps (S,) and pooled text (S, P) -> conditioning (S, D), with SiLU applied, since every user needs it."""

    def __init__(self, pooled_features: int, width: int) -> None:
        super().__init__()
        self.timestep_embedder = MLPEmbedder(NUM_TIMESTEP_FREQUENCIES, width)
        self.text_embedder = MLPEmbedder(pooled_features, width)

    def forward(self, timesteps: Tensor, pooled: Tensor) -> Tensor:
        return in_tiles(self._embed, timesteps, pooled)

    def _embed(self, timesteps: Tensor, pooled: Tensor) -> Tensor:
        time = self.timestep_embedder(timestep_sinusoids(timesteps).to(pooled.dtype))
        return F.silu(time + self.text_embedder(pooled))


class Modulation(nn.Module):
    """Conditioning (S, D) -> ``count`` vectors of each sequence, (S, count, D)."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(width, count * width)

    def forward(self, conditioning: Tensor) -> Tensor:
        vectors: Tensor = in_tiles(self.linear, conditioning).unflatten(-1, (self.count, -1))
        return vectors


def vectors_of(vectors: Tensor, parts: Sequence[Part]) -> list[tuple[Tensor, ...]]:
    """Vectors of sequences (S, count, D) for each part: ``count`` of (1, D) or (L, D)."""
    return [vectors[part.sequence].unbind(1) for part in parts]


class GELU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """(L, D) -> (L, D) through 4 D."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GELU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class JointAttention(nn.Module):
    """Attention of text and image together, each with projections and norms of its own.

    ``text_norm`` is the checkpoint's name for the text's query and key norms, which differs between the variants.
    """

    def __init__(
        self, width: int, num_heads: int, *, head_size: int, eps: float, text_norm: str, has_text_output: bool
    ) -> None:
        super().__init__()
        self.head_size = head_size
        self.text_norm = text_norm
        inner = num_heads * head_size
        self.norm_q = nn.RMSNorm(head_size, eps=eps)
        self.norm_k = nn.RMSNorm(head_size, eps=eps)
        self.to_q = nn.Linear(width, inner)
        self.to_k = nn.Linear(width, inner)
        self.to_v = nn.Linear(width, inner)
        self.add_k_proj = nn.Linear(width, inner)
        self.add_v_proj = nn.Linear(width, inner)
        self.add_q_proj = nn.Linear(width, inner)
        self.add_module(f"{text_norm}_q", nn.RMSNorm(head_size, eps=eps))
        self.add_module(f"{text_norm}_k", nn.RMSNorm(head_size, eps=eps))
        self.to_out = nn.ModuleList([nn.Linear(inner, width)])
        self.to_add_out = nn.Linear(inner, width) if has_text_output else None

    def forward(
        self,
        text: Sequence[Tensor],
        image: Sequence[Tensor],
        layout: PackLayout,
        rope: Tensor,
        attention: Attention,
    ) -> tuple[list[Tensor] | None, list[Tensor]]:
        """The parts (L, D) of both streams -> what attention adds to each part."""
        text_norm_q, text_norm_k = (self.get_submodule(f"{self.text_norm}_{x}") for x in "qk")
        text_q, text_k, text_v = project_heads(
            text, self.add_q_proj, self.add_k_proj, self.add_v_proj, head_size=self.head_size
        )
        q, k, v = project_heads(image, self.to_q, self.to_k, self.to_v, head_size=self.head_size)
        q = apply_pack_rope(layout.join(text_norm_q(text_q), self.norm_q(q)), rope, layout)
        k = apply_pack_rope(layout.join(text_norm_k(text_k), self.norm_k(k)), rope, layout)
        out = attention(q, k, layout.join(text_v, v), layout)
        text_out, image_out = layout.split(out.flatten(1))
        return (
            None if self.to_add_out is None else project_parts(self.to_add_out, split(text_out, layout.text_parts)),
            project_parts(self.to_out[0], split(image_out, layout.image_parts)),
        )


def project_heads(parts: Sequence[Tensor], *linears: nn.Module, head_size: int) -> tuple[Tensor, ...]:
    """Each projection of a stream's parts (L, D), as one tensor (L, N, d)."""
    projected = (torch.cat(project_parts(linear, parts)) for linear in linears)
    return tuple(rearrange(x, "l (n d) -> l n d", d=head_size) for x in projected)


class JointBlock(nn.Module):
    """Text and image streams, joined in attention only. Source: arXiv 2403.03206 (MM-DiT).

    In a block that ``is_last`` the text only supplies keys and values, and is returned unchanged.
    """

    def __init__(
        self, width: int, num_heads: int, *, head_size: int, eps: float, text_norm: str, is_last: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = Modulation(width, 6)
        self.norm1_context = Modulation(width, 2 if is_last else 6)
        self.attn = JointAttention(
            width, num_heads, head_size=head_size, eps=eps, text_norm=text_norm, has_text_output=not is_last
        )
        self.ff = FeedForward(width)
        self.ff_context = None if is_last else FeedForward(width)

    def forward(
        self,
        text: Sequence[Tensor],
        image: Sequence[Tensor],
        conditioning: Tensor,
        layout: PackLayout,
        rope: Tensor,
        attention: Attention,
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The parts (L, D) of both streams, before and after the block."""
        vectors = vectors_of(self.norm1(conditioning), layout.image_parts)
        text_vectors = vectors_of(self.norm1_context(conditioning), layout.text_parts)
        if self.ff_context is None:  # scale before shift
            text_modulated = [modulate(x, v[1], v[0]) for x, v in zip(text, text_vectors, strict=True)]
        else:
            text_modulated = [modulate(x, v[0], v[1]) for x, v in zip(text, text_vectors, strict=True)]
        image_modulated = [modulate(x, v[0], v[1]) for x, v in zip(image, vectors, strict=True)]
        text_out, image_out = self.attn(text_modulated, image_modulated, layout, rope, attention)
        image = [after_attention(*x, self.ff) for x in zip(image, image_out, vectors, strict=True)]
        if self.ff_context is not None:
            text = [after_attention(*x, self.ff_context) for x in zip(text, text_out, text_vectors, strict=True)]
        return text, image


def after_attention(x: Tensor, attended: Tensor, vectors: Sequence[Tensor], ff: FeedForward) -> Tensor:
    """A part (L, D) with what attention adds to it, and then the MLP around a residual."""
    _, _, gate, mlp_shift, mlp_scale, mlp_gate = vectors
    x = torch.addcmul(x, gate, attended)
    return torch.addcmul(x, mlp_gate, project(ff, modulate(x, mlp_shift, mlp_scale)))


class FinalModulation(nn.Module):
    """Layer norm, scaled and shifted by the conditioning: the parts (L, D) of a stream -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, parts: Sequence[Tensor], conditioning: Tensor, layout: Sequence[Part]) -> list[Tensor]:
        vectors = vectors_of(in_tiles(self.linear, conditioning).unflatten(-1, (2, -1)), layout)
        return [modulate(x, shift, scale) for x, (scale, shift) in zip(parts, vectors, strict=True)]
