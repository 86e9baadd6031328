"""Frame-causal attention over a pack, computed in one of several ways.

L tokens of the pack, N heads, D head size. Queries, keys and values are (L, N, D), and so is the result.

A token attends to the tokens of its own sequence at its own time or before; text counts as time 0. Text and image of a
sequence lie in order of time each, so what a frame sees is always its text and a prefix of its image.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol, get_args

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
    pieces: list[tuple[int, Tensor]] = []
    for span in layout.spans:
        attended = _attend_in_groups(span, *(_heads_first(_tokens_of(span, x)) for x in (q, k, v)))
        pieces += [(span.text_start, attended[: span.num_text]), (span.image_start, attended[span.num_text :])]
    return _in_the_pack(sorted(pieces, key=lambda piece: piece[0]), layout.num_tokens)


def _tokens_of(span: SequenceSpan, x: Tensor) -> Tensor:
    """Text and image of a sequence, without padding, of a packed tensor (L, ...)."""
    if span.text.stop == span.image.start:
        return x[span.text.start : span.image.stop]
    return torch.cat([x[span.text], x[span.image]])


def _in_the_pack(pieces: Sequence[tuple[int, Tensor]], num_tokens: int) -> Tensor:
    """Tokens of sequences, each with where it begins, in order, as a packed tensor with zeros for the padding."""
    rows, end = [], 0
    for start, piece in pieces:
        rows += [piece.new_zeros(start - end, *piece.shape[1:]), piece] if start > end else [piece]
        end = start + piece.shape[0]
    if end < num_tokens:
        rows.append(rows[-1].new_zeros(num_tokens - end, *rows[-1].shape[1:]))
    return torch.cat(rows)


def _attend_in_groups(span: SequenceSpan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries, keys and values (1, N, l, D) of one sequence -> (l, N, D)."""
    groups = [
        _attend(q[:, :, start:end], k[:, :, :end], v[:, :, :end], mask) for start, end, mask in _frame_groups(span, q)
    ]
    return _heads_last(groups[0] if len(groups) == 1 else torch.cat(groups, dim=2))


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
    """(first query, end of the queries, mask) of each group, counted in the sequence, from whose start keys begin."""
    start, pending = 0, []
    for i, end in enumerate(span.frame_ends):
        pending.append(end)
        is_last = i + 1 == len(span.frame_ends)
        if is_last or span.frame_ends[i + 1] - start > GROUP_SIZE:
            ends = tuple(pending)
            yield start, end, _group_mask(start, ends, q.dtype, q.device) if len(ends) > 1 else None
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
    block_mask = mask_of(layout, q.device)
    return _heads_last(function(_heads_first(q), _heads_first(k), _heads_first(v), block_mask=block_mask))


class _Run(NamedTuple):
    """Tokens from ``start`` to the next run, which all see the same: a range of text and one of image."""

    start: int
    text_start: int
    text_end: int
    image_start: int
    image_end: int


def _runs(spans: tuple[SequenceSpan, ...]) -> list[_Run]:
    """The runs of a pack in its order. Padding belongs to the run before it, which changes nothing for others."""
    text, image = [], []
    for span in spans:
        first_image = span.image_start - span.num_text  # where the sequence would begin, if text lay before its image
        seen = [(span.text.start, span.text.stop, span.image.start, first_image + end) for end in span.frame_ends]
        text.append(_Run(span.text_start, *seen[0]))
        starts = (span.image_start, *(first_image + end for end in span.frame_ends[:-1]))
        image += [_Run(start, *ranges) for start, ranges in zip(starts, seen, strict=True)]
    return text + image


def mask_of(layout: PackLayout, device: torch.device) -> BlockMask:
    """What ``compiled_flex_attention`` reads beside queries, keys and values of this pack."""
    return _block_mask(layout.spans, layout.num_tokens, device)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _block_mask(spans: tuple[SequenceSpan, ...], num_tokens: int, device: torch.device) -> BlockMask:
    """The block mask of a pack, from its spans alone: no (L, L) mask is ever built.

    All tokens of a run see the same, so whether a block of queries sees any or all of a block of keys follows from the
    runs that the block of queries holds.
    """
    runs = [run for run in _runs(spans) if run.start < num_tokens]
    with torch.device("cpu"):
        starts, *bounds = torch.tensor(runs).T.contiguous().unbind(0)
        key = torch.arange(0, num_tokens, FLEX_BLOCK)
        text_start, text_end, image_start, image_end = (bound[:, None] for bound in bounds)
        sees_any = _overlaps(text_start, text_end, key) | _overlaps(image_start, image_end, key)  # (runs, blocks)
        sees_all = _contains(text_start, text_end, key) | _contains(image_start, image_end, key)
        last = (key + FLEX_BLOCK).clamp(max=num_tokens) - 1
        first_run = torch.searchsorted(starts, key, right=True) - 1  # of each block of queries
        end_run = torch.searchsorted(starts, last, right=True)
        any_run = _counts(sees_any, first_run, end_run) > 0
        every_run = _counts(sees_all, first_run, end_run) == (end_run - first_run)[:, None]
        partial = any_run & ~every_run
        ends = torch.cat([starts[1:], torch.tensor([num_tokens])])
    of_tokens = (bound.repeat_interleave(ends - starts).to(device=device, dtype=torch.int32) for bound in bounds)
    text_starts, text_ends, image_starts, image_ends = of_tokens

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_text = (key >= text_starts[query]) & (key < text_ends[query])
        return in_text | ((key >= image_starts[query]) & (key < image_ends[query]))

    def numbers(chosen: Tensor) -> tuple[Tensor, Tensor]:
        """How many blocks of keys each block of queries visits, and those first among all."""
        order = chosen.logical_not().int().argsort(dim=1, stable=True)
        # As wide as there are blocks, though no row fills that: one shape of mask for every pack, so one compilation.
        counts, indices = (x.to(device=device, dtype=torch.int32)[None, None] for x in (chosen.sum(1), order))
        return counts.contiguous(), indices.contiguous()

    return BlockMask.from_kv_blocks(
        *numbers(partial),
        *numbers(every_run),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=sees,
        seq_lengths=(num_tokens, num_tokens),
        compute_q_blocks=False,
    )


def _overlaps(start: Tensor, end: Tensor, block: Tensor) -> Tensor:
    """Whether ranges (R, 1) hold any token of blocks (B,) that begin there: (R, B)."""
    return (start < block + FLEX_BLOCK) & (end > block) & (start < end)


def _contains(start: Tensor, end: Tensor, block: Tensor) -> Tensor:
    """Whether ranges (R, 1) hold all tokens of blocks (B,): (R, B)."""
    return (start <= block) & (end >= block + FLEX_BLOCK)


def _counts(chosen: Tensor, first: Tensor, end: Tensor) -> Tensor:
    """How many of the runs (R, B) from ``first`` to ``end`` (Q,) are chosen: (Q, B)."""
    before = F.pad(chosen.long().cumsum(0), (0, 0, 1, 0))
    return before[end] - before[first]
