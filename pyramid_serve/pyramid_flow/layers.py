"""Layers that both transformers are built of.

S sequences in the pack, L tokens of a stream, N heads, D width, d head size.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyramid_serve.pyramid_flow.attention import Attention
from pyramid_serve.pyramid_flow.fused import HeadNorms, Linear, SharedInput
from pyramid_serve.pyramid_flow.pack import PackLayout, Rows, SequenceShape, layout_of
from pyramid_serve.pyramid_flow.rows import in_tiles

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


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is cached may be used with gradients later
def pack_rope(shapes: tuple[SequenceShape, ...], axes_dims: tuple[int, ...], device: torch.device, tile: int) -> Tensor:
    """The :func:`rope_table` of a pack, from the first ``len(axes_dims)`` axes of its tokens' positions.

    It is computed on the CPU, since some devices have no float64, and cached like the layout.
    """
    positions = layout_of(shapes, device, tile).positions[:, : len(axes_dims)]
    return rope_table(positions, axes_dims).to(device)


class PackContext(NamedTuple):
    """How the tokens of a pack see each other."""

    layout: PackLayout
    rope: Tensor
    """Their rotations, see :func:`rope_table`."""
    attention: Attention


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the interleaved pairs of ``x`` (L, ..., d) by ``rope`` (L, ..., d/2, 2), in float32.

    A pair is rotated by a product of complex numbers, which takes a tenth of the time of the four real products. The
    compiler fuses real ones alone.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        (real, imaginary), (cosine, sine) = pairs.unbind(-1), rope.unbind(-1)
        rotated = torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], dim=-1)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    return rotated.flatten(-2).to(x.dtype)


def timestep_sinusoids(timesteps: Tensor) -> Tensor:
    """(S,) timesteps in 0..1000 -> (S, 256) float32, cosines first. Source: arXiv 1706.03762."""
    half = NUM_TIMESTEP_FREQUENCIES // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulate(x: Tensor, shift: Tensor, gain: Tensor, rows: Rows) -> Tensor:
    """Layer norm of (L, D) with no weights, then ``gain`` and ``shift`` of sequences (S, D).

    Source: arXiv 2212.09748 (adaLN), whose scale is ``gain - 1``.
    """
    if isinstance(rows, slice):
        return F.layer_norm(x, x.shape[-1:], gain[0], shift[0], eps=LAYER_NORM_EPS)
    return torch.addcmul(shift[rows], F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS), gain[rows])


def gelu(x: Tensor) -> Tensor:
    """GELU by its approximation with tanh. Source: arXiv 1606.08415.

    In float32 on a CPU it is written with the sigmoid of twice the number, which takes half of the time of tanh.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    cubic = torch.addcmul(x, x * x, x, value=0.044715)
    return x * torch.sigmoid(cubic * (8 / math.pi) ** 0.5)


class MLPEmbedder(nn.Module):
    """(S, in) -> (S, D)."""

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__()
        self.linear_1 = Linear(in_features, width)
        self.linear_2 = Linear(width, width)

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
    """The weights of ``count`` vectors that conditioning (S, D) gives to a layer, see :class:`Modulations`.

    scales: which of the vectors scale a layer norm.
    """

    def __init__(self, width: int, count: int, *, scales: Sequence[int]) -> None:
        super().__init__()
        self.count = count
        self.scales = tuple(scales)
        self.linear = Linear(width, count * width)


class Modulations(nn.Module):
    """All modulations of some layers as one product: conditioning (S, D) -> (S, count, D) for each of them.

    They come layer by layer, in the order of their definition. One is added to vectors that scale a layer norm.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        modulations = [m for layer in layers for m in layer.modules() if isinstance(m, Modulation)]
        self._counts = [modulation.count for modulation in modulations]
        self._scales = tuple(i in m.scales for m in modulations for i in range(m.count))
        self._product = SharedInput([modulation.linear for modulation in modulations])

    def forward(self, conditioning: Tensor) -> tuple[Tensor, ...]:
        vectors = in_tiles(self._product, conditioning).unflatten(-1, (sum(self._counts), -1))
        added = _ones_where(self._scales, vectors.dtype, vectors.device)
        parts: tuple[Tensor, ...] = (vectors + added).split(self._counts, dim=1)
        return parts


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _ones_where(chosen: tuple[bool, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(count, 1) of ones and zeros."""
    return torch.tensor(chosen, dtype=dtype, device=device)[:, None]


class GELU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return gelu(self.proj(x))


class FeedForward(nn.Module):
    """(L, D) -> (L, D) through 4 D."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GELU(width, 4 * width), nn.Identity(), Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class JointAttention(nn.Module):
    """The projections and norms of attention of text and image together, each with its own.

    ``text_norm`` is the checkpoint's name for the text's query and key norms, which differs between the variants.
    """

    def __init__(
        self, width: int, num_heads: int, *, head_size: int, eps: float, text_norm: str, has_text_output: bool
    ) -> None:
        super().__init__()
        self.head_size = head_size
        inner = num_heads * head_size
        self.norm_q = nn.RMSNorm(head_size, eps=eps)
        self.norm_k = nn.RMSNorm(head_size, eps=eps)
        self.to_q = Linear(width, inner)
        self.to_k = Linear(width, inner)
        self.to_v = Linear(width, inner)
        self.add_k_proj = Linear(width, inner)
        self.add_v_proj = Linear(width, inner)
        self.add_q_proj = Linear(width, inner)
        text_norm_q, text_norm_k = (nn.RMSNorm(head_size, eps=eps) for _ in range(2))
        self.add_module(f"{text_norm}_q", text_norm_q)
        self.add_module(f"{text_norm}_k", text_norm_k)
        self.to_out = nn.ModuleList([Linear(inner, width)])
        self.to_add_out = Linear(inner, width) if has_text_output else None
        self._image_qkv = SharedInput([self.to_q, self.to_k, self.to_v])
        self._text_qkv = SharedInput([self.add_q_proj, self.add_k_proj, self.add_v_proj])
        self._image_norms = HeadNorms(self.norm_q, self.norm_k)
        self._text_norms = HeadNorms(text_norm_q, text_norm_k)

    def project(self, text: Tensor, image: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both streams (L, D) -> queries, keys and values (L, N, d) of the pack."""
        of_text, of_image = (
            x.unflatten(-1, (3, -1, self.head_size)) for x in (self._text_qkv(text), self._image_qkv(image))
        )
        heads = torch.cat([self._text_norms(of_text[:, :2]), self._image_norms(of_image[:, :2])])
        q, k = apply_rope(heads, rope[:, None]).unbind(1)
        return q, k, torch.cat([of_text[:, 2], of_image[:, 2]])


class JointBlock(nn.Module):
    """Text and image streams, joined in attention only. Source: arXiv 2403.03206 (MM-DiT).

    In a block that ``is_last`` the text only supplies keys and values, and is returned unchanged.
    """

    def __init__(
        self, width: int, num_heads: int, *, head_size: int, eps: float, text_norm: str, is_last: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = Modulation(width, 6, scales=(1, 4))
        self.norm1_context = Modulation(width, 2, scales=(0,)) if is_last else Modulation(width, 6, scales=(1, 4))
        self.attn = JointAttention(
            width, num_heads, head_size=head_size, eps=eps, text_norm=text_norm, has_text_output=not is_last
        )
        self.ff = FeedForward(width)
        self.ff_context = None if is_last else FeedForward(width)

    def forward(
        self, text: Tensor, image: Tensor, vectors: Tensor, text_vectors: Tensor, context: PackContext
    ) -> tuple[Tensor, Tensor]:
        """Both streams (L, D), before and after the block. vectors: what modulates each, (S, count, D)."""
        rows, text_rows = context.layout.image_rows, context.layout.text_rows
        q, k, v = self.before_attention(text, image, vectors, text_vectors, text_rows, rows, context.rope)
        attended = context.attention(q, k, v, context.layout).flatten(1)
        return self.after_attention(text, image, attended, vectors, text_vectors, text_rows, rows)

    def before_attention(
        self,
        text: Tensor,
        image: Tensor,
        vectors: Tensor,
        text_vectors: Tensor,
        text_rows: Rows,
        rows: Rows,
        rope: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (L, N, d) of the pack."""
        shift, gain = vectors.unbind(1)[:2]
        text_shift, text_gain = text_vectors.unbind(1)[:2]
        if self.ff_context is None:  # scale before shift
            text_shift, text_gain = text_gain, text_shift
        return self.attn.project(
            modulate(text, text_shift, text_gain, text_rows), modulate(image, shift, gain, rows), rope
        )

    def after_attention(
        self,
        text: Tensor,
        image: Tensor,
        attended: Tensor,
        vectors: Tensor,
        text_vectors: Tensor,
        text_rows: Rows,
        rows: Rows,
    ) -> tuple[Tensor, Tensor]:
        """Both streams with what attention (L, N d) and the MLPs add."""
        text_attended, image_attended = attended.split([text.shape[0], image.shape[0]])
        image = add_gated(image, vectors, rows, self.attn.to_out[0](image_attended), self.ff)
        if self.ff_context is not None and self.attn.to_add_out is not None:
            text = add_gated(text, text_vectors, text_rows, self.attn.to_add_out(text_attended), self.ff_context)
        return text, image


def add_gated(x: Tensor, vectors: Tensor, rows: Rows, attended: Tensor, ff: FeedForward) -> Tensor:
    """A stream (L, D) with what attention adds to it, and then the MLP around a residual."""
    _, _, gate, mlp_shift, mlp_gain, mlp_gate = vectors.unbind(1)
    x = torch.addcmul(x, gate[rows], attended)
    return torch.addcmul(x, mlp_gate[rows], ff(modulate(x, mlp_shift, mlp_gain, rows)))


def final_modulation(x: Tensor, vectors: Tensor, rows: Rows) -> Tensor:
    """Layer norm of (L, D), scaled and shifted by the vectors (S, 2, D) of sequences, scale first."""
    gain, shift = vectors.unbind(1)
    return modulate(x, shift, gain, rows)
