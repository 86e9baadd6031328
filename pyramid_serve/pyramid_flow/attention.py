"""Frame-causal attention over a pack, computed in one of several ways.

L tokens of the pack, N heads, D head size. Queries, keys and values are (L, N, D), and so is the result.

A token attends to the tokens of its own sequence at its own time or before; text counts as time 0. A sequence lies in
order of time, so what a frame sees is always a prefix of its sequence.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from pyramid_serve.pyramid_flow.pack import PackLayout, SequenceSpan
from pyramid_serve.pyramid_flow.settings import AttentionName

GROUP_SIZE = 256
"""Tokens. Small frames are grouped up to this many, under a mask, since fewer and larger kernels are faster."""
FLEX_BLOCK = 128


class Attention(Protocol):
    """How attention is computed: queries, keys and values (L, N, D) of a pack -> (L, N, D)."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layout: PackLayout) -> Tensor: ...


def attention_by_name(name: str) -> Attention:
    """``dense`` (the reference), ``blocks`` (CPU, and any device) or ``flex`` (CUDA, compiled)."""
    table: dict[str, Attention] = {
        "dense": dense_attention,
        "blocks": block_attention,
        "flex": compiled_flex_attention,
    }
    if name not in table:
        raise ValueError(f"attention={name!r}: must be one of {', '.join(get_args(AttentionName))}")
    return table[name]


def fastest_on(device: torch.device) -> AttentionName:
    """The name of the way to use on a device if none is asked for."""
    return "flex" if device.type == "cuda" else "blocks"


def dense_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackLayout) -> Tensor:
    """The definition: one mask over the whole pack, quadratic in it. The others are tested against it."""
    same = layout.sequence[:, None] == layout.sequence[None, :]
    mask = same & (layout.time[:, None] >= layout.time[None, :])
    return _heads_last(_attend(_heads_first(q), _heads_first(k), _heads_first(v), mask))


def block_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackLayout) -> Tensor:
    """Each frame against its prefix, as plain attention with no mask; small frames of a sequence in groups."""
    q, k, v = _heads_first(q), _heads_first(k), _heads_first(v)
    groups = [
        _attend(q[:, :, start:end], k[:, :, span.start : end], v[:, :, span.start : end], mask)
        for span in layout.spans
        for start, end, mask in _frame_groups(span, q)
    ]
    return torch.cat([_heads_last(group) for group in groups])


def reference_flex_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackLayout) -> Tensor:
    """FlexAttention with a block mask built from the layout, not compiled: quadratic memory, for tests."""
    return _flex(flex_attention, q, k, v, layout)


def compiled_flex_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackLayout) -> Tensor:
    """FlexAttention compiled to one kernel that skips the blocks that no token of the row sees."""
    return _flex(_compiled_flex(), q, k, v, layout)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Queries, keys and values (1, N, L, D) -> (1, N, L, D)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _heads_first(x: Tensor) -> Tensor:
    """(L, N, D) -> (1, N, L, D)."""
    return x.transpose(0, 1).unsqueeze(0)


def _heads_last(x: Tensor) -> Tensor:
    """(1, N, L, D) -> (L, N, D)."""
    return x.squeeze(0).transpose(0, 1)


def _frame_groups(span: SequenceSpan, q: Tensor) -> Iterator[tuple[int, int, Tensor | None]]:
    """(first query, end of the queries, mask) of each group; the mask spans the sequence from its start."""
    start, pending = span.start, []
    for i, end in enumerate(span.frame_ends):
        pending.append(end)
        is_last = i + 1 == len(span.frame_ends)
        if is_last or span.frame_ends[i + 1] - start > GROUP_SIZE:
            ends = tuple(e - span.start for e in pending)
            yield start, end, _group_mask(start - span.start, ends, q.dtype, q.device) if len(ends) > 1 else None
            start, pending = end, []


@lru_cache(maxsize=128)
@torch.inference_mode(False)
def _group_mask(start: int, frame_ends: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(queries, keys) of the frames that end at ``frame_ends``, the first beginning at ``start``; keys begin at 0.

    What is added to the scores: 0, and minus infinity where a query does not see a key.
    """
    with torch.device("cpu"):
        starts, ends = torch.tensor((start, *frame_ends[:-1])), torch.tensor(frame_ends)
        visible_until = ends.repeat_interleave(ends - starts)
        hidden = torch.arange(frame_ends[-1])[None, :] >= visible_until[:, None]
        return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf).to(device)


@lru_cache(maxsize=1)
def _compiled_flex() -> "FlexFunction":
    # fullgraph: past the limit of compilations this is an error, not attention over a whole (L, L) score matrix.
    compiled: FlexFunction = torch.compile(flex_attention, dynamic=True, fullgraph=True)
    return compiled


class FlexFunction(Protocol):
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, block_mask: BlockMask) -> Tensor: ...


def _flex(function: "FlexFunction", q: Tensor, k: Tensor, v: Tensor, layout: PackLayout) -> Tensor:
    block_mask = _block_mask(layout.spans, q.device)
    return _heads_last(function(_heads_first(q), _heads_first(k), _heads_first(v), block_mask=block_mask))


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _block_mask(spans: tuple[SequenceSpan, ...], device: torch.device) -> BlockMask:
    """The block mask of a pack, from its spans alone: no (L, L) mask is ever built.

    The keys that a token sees run from its sequence's start to the end of its frame. Over a block of queries both
    bounds only grow, so the blocks of keys that any query sees are one range, and those that all see a range within it.
    """
    frame_ends = [end for span in spans for end in span.frame_ends]
    frame_starts = [start for span in spans for start in (span.start, *span.frame_ends[:-1])]
    num_tokens = frame_ends[-1]
    with torch.device("cpu"):
        lengths = torch.tensor(frame_ends) - torch.tensor(frame_starts)
        ends = torch.tensor(frame_ends).repeat_interleave(lengths)
        starts = torch.tensor([span.start for span in spans for _ in span.frame_ends]).repeat_interleave(lengths)
        first = torch.arange(0, num_tokens, FLEX_BLOCK)
        last = (first + FLEX_BLOCK - 1).clamp(max=num_tokens - 1)
        any_start = starts[first] // FLEX_BLOCK
        any_end = (ends[last] + FLEX_BLOCK - 1) // FLEX_BLOCK
        full_start = (starts[last] + FLEX_BLOCK - 1) // FLEX_BLOCK
        full_end = torch.maximum(ends[first] // FLEX_BLOCK, full_start)
        num_full = full_end - full_start
        num_partial = any_end - any_start - num_full
        # As wide as there are blocks, though no row fills that: one shape of mask for every pack, so one compilation.
        column = torch.arange(first.shape[0])
        full = full_start[:, None] + column
        before = any_start[:, None] + column
        partial = torch.where(before < full_start[:, None], before, before + num_full[:, None])
    starts, ends = starts.to(device=device, dtype=torch.int32), ends.to(device=device, dtype=torch.int32)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= starts[query]) & (key < ends[query])

    def on_device(x: Tensor) -> Tensor:
        return x.to(device=device, dtype=torch.int32)[None, None].contiguous()

    return BlockMask.from_kv_blocks(
        on_device(num_partial),
        on_device(partial.clamp(max=first.shape[0] - 1)),
        on_device(num_full),
        on_device(full.clamp(max=first.shape[0] - 1)),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=sees,
        seq_lengths=(num_tokens, num_tokens),
        compute_q_blocks=False,
    )
