"""Layers that both transformers are built of.

S sequences in the pack, L tokens of a stream, N heads, D width, d head size.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pyramid_serve.pyramid_flow.attention import Attention
from pyramid_serve.pyramid_flow.pack import PackLayout, SequenceShape, layout_of

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
    """Rotate the interleaved pairs of ``x`` (L, N, d) by ``rope`` (L, 1, d/2, 2), in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope.unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def timestep_sinusoids(timesteps: Tensor) -> Tensor:
    """(S,) timesteps in 0..1000 -> (S, 256) float32, cosines first. Source: arXiv 1706.03762."""
    half = NUM_TIMESTEP_FREQUENCIES // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm with no weights, then ``scale`` and ``shift`` (L, D) each. Source: arXiv 2212.09748 (adaLN)."""
    x = F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
    return torch.addcmul(shift, x, 1 + scale)


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
        time = self.timestep_embedder(timestep_sinusoids(timesteps).to(pooled.dtype))
        return F.silu(time + self.text_embedder(pooled))


class Modulation(nn.Module):
    """Conditioning (S, D) -> ``count`` vectors (L, D), each token taking those of its sequence."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(width, count * width)

    def forward(self, conditioning: Tensor, sequence: Tensor) -> tuple[Tensor, ...]:
        vectors: Tensor = self.linear(conditioning)
        return tuple(part[sequence] for part in vectors.chunk(self.count, dim=-1))


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
        self, text: Tensor, image: Tensor, layout: PackLayout, rope: Tensor, attention: Attention
    ) -> tuple[Tensor | None, Tensor]:
        """Streams (num_text, D) and (num_image, D) -> what attention adds to each."""
        text_norm_q, text_norm_k = (self.get_submodule(f"{self.text_norm}_{x}") for x in "qk")
        q = layout.join(text_norm_q(self._heads(self.add_q_proj(text))), self.norm_q(self._heads(self.to_q(image))))
        k = layout.join(text_norm_k(self._heads(self.add_k_proj(text))), self.norm_k(self._heads(self.to_k(image))))
        v = layout.join(self._heads(self.add_v_proj(text)), self._heads(self.to_v(image)))
        out = attention(apply_rope(q, rope), apply_rope(k, rope), v, layout).flatten(1)
        text_out, image_out = layout.split(out)
        return (None if self.to_add_out is None else self.to_add_out(text_out)), self.to_out[0](image_out)

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "l (n d) -> l n d", d=self.head_size)


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
        self, text: Tensor, image: Tensor, conditioning: Tensor, layout: PackLayout, rope: Tensor, attention: Attention
    ) -> tuple[Tensor, Tensor]:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.norm1(conditioning, layout.image_sequence)
        text_vectors = self.norm1_context(conditioning, layout.text_sequence)
        text_scale, text_shift = (text_vectors[1], text_vectors[0]) if self.ff_context is not None else text_vectors

        text_out, image_out = self.attn(
            modulate(text, text_shift, text_scale), modulate(image, shift, scale), layout, rope, attention
        )
        image = image + gate * image_out
        image = image + mlp_gate * self.ff(modulate(image, mlp_shift, mlp_scale))
        if self.ff_context is not None:
            _, _, text_gate, mlp_shift, mlp_scale, mlp_gate = text_vectors
            text = text + text_gate * text_out
            text = text + mlp_gate * self.ff_context(modulate(text, mlp_shift, mlp_scale))
        return text, image


class FinalModulation(nn.Module):
    """Layer norm, scaled and shifted by the conditioning: (L, D) -> (L, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, conditioning: Tensor, sequence: Tensor) -> Tensor:
        scale, shift = self.linear(conditioning).chunk(2, dim=-1)
        return modulate(x, shift[sequence], scale[sequence])
