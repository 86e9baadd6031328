"""The transformer's training forward: many units of a clip at once, with their histories shared.

A unit at stage i sees the frame before it at stage i, the one before that at stage i - 1, and so on down to stage 0.
So the frame f at stage s always sees the same older frames, whichever unit looks: f - 1 at stage s - 1, ... All units
of a clip can therefore share one set of clean tokens, under a mask. Only the text differs: it sees frame 0, so there
is one copy of it for each stage that frame 0 is shown at, and one for unit 0, which sees itself. What comes out is
what the library's packed forward gives for each unit by itself; a test holds the two together.

B clips, L tokens, Lt text tokens, D width, N heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pyramid_serve.pyramid_flow.flux import Flux
from pyramid_serve.pyramid_flow.history import halve
from pyramid_serve.pyramid_flow.layers import LAYER_NORM_EPS, rope_table
from pyramid_serve.pyramid_flow.shapes import NUM_STAGES, PATCH_SIZE

NOISY = -1
"""Stands for a stage in a segment: the unit that is being denoised, or the text of unit 0."""


@dataclass(frozen=True)
class Segment:
    """Tokens that see and are seen alike. frame is -1 for text; stage NOISY for what goes with the noisy unit."""

    frame: int
    stage: int


@dataclass(frozen=True)
class Layout:
    """Where the tokens of `units` at `stage` lie: texts first, then clean frames, then the noisy units."""

    texts: tuple[Segment, ...]
    clean: tuple[Segment, ...]
    units: tuple[int, ...]
    stage: int
    mask: Tensor  # (L, L) bool: row sees column
    rope: Tensor  # (L, 1, d/2, 2)
    is_text: Tensor  # (texts * Lt,) for each text token, its place in the prompt


@lru_cache(maxsize=512)
def layout_of(
    stage: int,
    units: tuple[int, ...],
    num_text: int,
    size: tuple[int, int],
    axes_dims: tuple[int, ...],
    device: torch.device,
) -> Layout:
    """`size` is the full latent size (h, w)."""
    sees = {Segment(unit, NOISY): _seen_by_unit(unit, stage) for unit in units}
    waiting = [segment for seen in sees.values() for segment in seen]
    while waiting:
        segment = waiting.pop()
        if segment not in sees:
            sees[segment] = _seen_by_clean(segment)
            waiting += sees[segment]
    texts = tuple(sorted((s for s in sees if s.frame < 0), key=lambda s: s.stage))
    clean = tuple(sorted((s for s in sees if s.frame >= 0 and s.stage != NOISY), key=lambda s: (s.stage, s.frame)))
    order = [*texts, *clean, *(Segment(unit, NOISY) for unit in units)]
    grid = _grid(size, stage)
    positions, owners = [], []
    for index, segment in enumerate(order):
        if segment.frame < 0:
            part = torch.zeros(num_text, 3)
        else:
            rows, columns = _grid(size, stage if segment.stage == NOISY else segment.stage)
            part = torch.stack(
                torch.meshgrid(
                    torch.tensor([float(segment.frame)]),
                    _resampled(grid[0], rows),
                    _resampled(grid[1], columns),
                    indexing="ij",
                ),
                dim=-1,
            ).reshape(-1, 3)
        positions.append(part)
        owners.append(torch.full((len(part),), index))
    owner = torch.cat(owners)
    table = torch.tensor([[other == own or other in sees[own] for other in order] for own in order])
    return Layout(
        texts=texts,
        clean=clean,
        units=units,
        stage=stage,
        mask=table[owner][:, owner].to(device),
        rope=rope_table(torch.cat(positions), axes_dims).to(device),
        is_text=torch.arange(num_text).repeat(len(texts)).to(device),
    )


def _seen_by_unit(unit: int, stage: int) -> list[Segment]:
    if unit == 0:
        return [Segment(-1, NOISY)]
    return _history(unit - 1, stage)


def _history(frame: int, stage: int) -> list[Segment]:
    """A clean frame at a stage, all it sees, and the text that goes with its oldest frame."""
    frames = [Segment(older, max(stage - (frame - older), 0)) for older in range(frame + 1)]
    return [*frames, Segment(-1, max(stage - frame, 0))]


def _seen_by_clean(segment: Segment) -> list[Segment]:
    if segment.frame < 0:
        return [Segment(0, segment.stage)]
    return _history(segment.frame, segment.stage)


def _grid(size: tuple[int, int], stage: int) -> tuple[int, int]:
    factor = PATCH_SIZE * 2 ** (NUM_STAGES - 1 - stage)
    return size[0] // factor, size[1] // factor


def _resampled(num_current: int, num: int) -> Tensor:
    return F.interpolate(torch.arange(num_current, dtype=torch.float32)[None, None], size=num, mode="linear")[0, 0]


def pyramid(latents: Tensor) -> list[Tensor]:
    """Latents (B, C, T, H, W) at all stages, the lowest first."""
    levels = [latents]
    for _ in range(NUM_STAGES - 1):
        b = latents.shape[0]
        halved = halve(rearrange(levels[0], "b c t h w -> c (b t) h w"))
        levels.insert(0, rearrange(halved, "c (b t) h w -> b c t h w", b=b))
    return levels


def forward(
    flux: Flux,
    *,
    stage: int,
    units: Sequence[int],
    noisy: Tensor,
    history: Sequence[Tensor],
    timesteps: Tensor,
    prompt_embeds: Tensor,
    prompt_mask: Tensor,
    pooled: Tensor,
) -> Tensor:
    """Predictions (B, C, U, h, w) for the units of B clips.

    noisy: (B, C, U, h, w) at the stage's size; history: the latents that units see before them, at all stages,
    (B, C, T, ., .), the lowest first, T at least the last unit, empty where all units are 0; timesteps (B,);
    prompt_embeds (B, Lt, D), their mask (B, Lt), and pooled (B, P).
    """
    size = (noisy.shape[3] * 2 ** (NUM_STAGES - 1 - stage), noisy.shape[4] * 2 ** (NUM_STAGES - 1 - stage))
    layout = layout_of(stage, tuple(units), prompt_embeds.shape[1], size, flux.config.axes_dims, noisy.device)
    frames = [history[s.stage][:, :, s.frame] for s in layout.clean] + list(noisy.unbind(2))
    tokens = torch.cat([_patchify(frame) for frame in frames], dim=1)
    image = flux.x_embedder(tokens).float()
    text = flux.context_embedder(prompt_embeds).float().repeat(1, len(layout.texts), 1)
    valid = F.pad(prompt_mask[:, layout.is_text], (0, image.shape[1]), value=True)
    mask = (layout.mask & valid[:, None, :])[:, None]  # (B, 1, L, L)
    dtype = torch.bfloat16 if torch.is_autocast_enabled(noisy.device.type) else torch.float32
    mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
    conditioning = flux.time_text_embed(timesteps, pooled)
    cos, sin = (part.squeeze(-1).unsqueeze(0) for part in layout.rope.split(1, dim=-1))  # (1, L, 1, d/2)
    for module in flux.transformer_blocks:
        text, image = _joint_block(module, text, image, conditioning, (cos, sin), mask)
    packed = torch.cat([text, image], dim=1)
    for module in flux.single_transformer_blocks:
        packed = _single_block(module, packed, conditioning, (cos, sin), mask)
    num_current = noisy.shape[2] * (noisy.shape[3] // PATCH_SIZE) * (noisy.shape[4] // PATCH_SIZE)
    vectors = flux.norm_out.linear(conditioning).unsqueeze(1).chunk(2, dim=-1)
    out = flux.proj_out(_modulate(packed[:, -num_current:], vectors[1], vectors[0])).float()
    return rearrange(
        cast(Tensor, out),
        "b (u h w) (p1 p2 c) -> b c u (h p1) (w p2)",
        u=noisy.shape[2],
        h=noisy.shape[3] // PATCH_SIZE,
        p1=PATCH_SIZE,
        p2=PATCH_SIZE,
    )


def compile_blocks() -> None:
    """Compile both kinds of block, for this process and for all sizes."""
    global _joint_block, _single_block
    _joint_block = torch.compile(_joint_block, dynamic=True)
    _single_block = torch.compile(_single_block, dynamic=True)


def _patchify(frame: Tensor) -> Tensor:
    return rearrange(frame, "b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=PATCH_SIZE, p2=PATCH_SIZE)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift.float(), F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS), 1 + scale.float())


def _rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate interleaved pairs of (B, L, N, d)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (part.to(x.dtype) for part in rope)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def _attend(q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    """(B, L, N, d) three times -> (B, L, N d)."""
    # Written out: at these short lengths it is faster on the CPU than the fused kernel, backwards above all; on a GPU
    # the steps failed with that kernel under such masks (torch 2.11, illegal memory access in the backward pass).
    q, k, v = (x.transpose(1, 2) for x in (_rope(q, rope) * q.shape[-1] ** -0.5, _rope(k, rope), v))
    weights = torch.softmax(torch.matmul(q, k.transpose(-1, -2)) + mask, dim=-1)
    return torch.matmul(weights.to(v.dtype), v).transpose(1, 2).flatten(2)


def _heads(x: Tensor, head_size: int) -> Tensor:
    out: Tensor = x.unflatten(-1, (-1, head_size))
    return out


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    weight = cast(Tensor, norm.weight)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), cast(float, norm.eps))


def _joint_block(
    block: nn.Module, text: Tensor, image: Tensor, conditioning: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor
) -> tuple[Tensor, Tensor]:
    b = cast(Any, block)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = b.norm1.linear(conditioning).unsqueeze(1).chunk(6, dim=-1)
    t_shift, t_scale, t_gate, t_mlp_shift, t_mlp_scale, t_mlp_gate = (
        b.norm1_context.linear(conditioning).unsqueeze(1).chunk(6, dim=-1)
    )
    x, y, size = _modulate(image, shift, scale), _modulate(text, t_shift, t_scale), b.attn.head_size
    q = torch.cat(
        [
            _norm(b.attn.norm_added_q, _heads(b.attn.add_q_proj(y), size)),
            _norm(b.attn.norm_q, _heads(b.attn.to_q(x), size)),
        ],
        dim=1,
    )
    k = torch.cat(
        [
            _norm(b.attn.norm_added_k, _heads(b.attn.add_k_proj(y), size)),
            _norm(b.attn.norm_k, _heads(b.attn.to_k(x), size)),
        ],
        dim=1,
    )
    v = torch.cat([_heads(b.attn.add_v_proj(y), size), _heads(b.attn.to_v(x), size)], dim=1)
    out = _attend(q, k, v, rope, mask)
    text = text + t_gate * b.attn.to_add_out(out[:, : text.shape[1]])
    image = image + gate * b.attn.to_out[0](out[:, text.shape[1] :])
    image = image + mlp_gate * b.ff(_modulate(image, mlp_shift, mlp_scale))
    text = text + t_mlp_gate * b.ff_context(_modulate(text, t_mlp_shift, t_mlp_scale))
    return text, image


def _single_block(
    block: nn.Module, packed: Tensor, conditioning: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor
) -> Tensor:
    b = cast(Any, block)
    shift, scale, gate = b.norm.linear(conditioning).unsqueeze(1).chunk(3, dim=-1)
    x, size = _modulate(packed, shift, scale), b.attn.head_size
    q = _norm(b.attn.norm_q, _heads(b.attn.to_q(x), size))
    k = _norm(b.attn.norm_k, _heads(b.attn.to_k(x), size))
    attended = _attend(q, k, _heads(b.attn.to_v(x), size), rope, mask)
    mlp = F.gelu(b.proj_mlp(x), approximate="tanh")
    out: Tensor = packed + gate * b.proj_out(torch.cat([attended, mlp], dim=-1))
    return out
