"""Sequences of clips, packed end to end for one forward of a transformer.

S sequences, L tokens of the whole pack, C channels, T frames, h w latent size of a clip.

A sequence is one video's text, its history and the noisy latents it is working on. A pack holds sequences of different
videos, units, stages and timesteps, with no padding: cost is the sum over the sequences.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from pyramid_serve.pyramid_flow.shapes import PATCH_SIZE


@dataclass(frozen=True)
class PromptEmbeds:
    """An encoded prompt: ``prompt_embeds`` (num_tokens, D), padding dropped, and ``pooled_prompt_embeds`` (P,)."""

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    truncated_at: int | None = None
    """The character of the prompt at which the text encoder stopped reading. None: it read the whole prompt."""

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "PromptEmbeds":
        return PromptEmbeds(
            self.prompt_embeds.to(device=device, dtype=dtype),
            self.pooled_prompt_embeds.to(device=device, dtype=dtype),
            self.truncated_at,
        )


@dataclass(frozen=True)
class ClipSequence:
    """One sequence of a pack.

    clips: (C, T, h, w) each, oldest first; the last one is the current, noisy clip that the prediction is for.
    timestep: 0 to 1000.
    """

    prompt: PromptEmbeds
    clips: tuple[Tensor, ...]
    timestep: float

    def __post_init__(self) -> None:
        """``ValueError`` for clips that do not split into patches, or are larger than the current one."""
        if not self.clips:
            raise ValueError("clips: give at least the current one")
        height, width = self.clips[-1].shape[-2:]
        for clip in self.clips:
            if clip.ndim != 4 or clip.shape[2] % PATCH_SIZE or clip.shape[3] % PATCH_SIZE:
                raise ValueError(f"clips: shape {tuple(clip.shape)}, must be (C, T, h, w) with even h and w")
            if clip.shape[2] > height or clip.shape[3] > width:
                raise ValueError(f"clips: {tuple(clip.shape)} is larger than the current one, {height} x {width}")

    @property
    def shape(self) -> "SequenceShape":
        return SequenceShape(
            num_text_tokens=self.prompt.prompt_embeds.shape[0],
            grids=tuple((t, h // PATCH_SIZE, w // PATCH_SIZE) for _, t, h, w in (clip.shape for clip in self.clips)),
        )

    @property
    def num_tokens(self) -> int:
        return self.shape.num_tokens


class SequenceShape(NamedTuple):
    """What decides a sequence's layout: text tokens, and each clip's (frames, rows, columns) of tokens."""

    num_text_tokens: int
    grids: tuple[tuple[int, int, int], ...]

    @property
    def num_image_tokens(self) -> int:
        return sum(t * h * w for t, h, w in self.grids)

    @property
    def num_current_tokens(self) -> int:
        t, h, w = self.grids[-1]
        return t * h * w

    @property
    def num_tokens(self) -> int:
        return self.num_text_tokens + self.num_image_tokens

    @property
    def frame_ends(self) -> list[int]:
        """Where, counted in this sequence's tokens, text and frame 0 end, then frame 1, and so on."""
        frame_tokens = [h * w for t, h, w in self.grids for _ in range(t)]
        return list(accumulate(frame_tokens, initial=self.num_text_tokens))[1:]


class SequenceSpan(NamedTuple):
    """Where a sequence's text and image begin in the pack, and where, counted in its own tokens, each frame ends."""

    text_start: int
    num_text: int
    image_start: int
    frame_ends: tuple[int, ...]
    """Text is counted with frame 0, see :attr:`SequenceShape.frame_ends`."""

    @property
    def num_tokens(self) -> int:
        return self.frame_ends[-1]

    @property
    def text(self) -> slice:
        """Its text in the pack."""
        return slice(self.text_start, self.text_start + self.num_text)

    @property
    def image(self) -> slice:
        """Its frames in the pack."""
        return slice(self.image_start, self.image_start + self.num_tokens - self.num_text)


class PackLayout(NamedTuple):
    """Where every token of a pack lies.

    The pack's order is all texts, sequence by sequence, and then all images: the *text* and the *image* stream. In a
    stream, each sequence is filled up with padding to a multiple of the layout's tile.
    """

    spans: tuple[SequenceSpan, ...]
    sequence: Tensor
    """(L,) int64, the sequence of each token of the pack; padding belongs to the sequence before it."""
    time: Tensor
    """(L,) int64, the frame number of each token of the pack; text counts as 0, padding as ``PADDING_TIME``."""
    positions: Tensor
    """(L, 3) float, on the CPU: time, row, column in the grid of the current clip; text is at (0, 0, 0)."""
    num_text: int
    """The length of the text stream, with padding. The image stream begins there."""
    current: Tensor
    """int64, where, in the *image* stream, the current clips' tokens stand; the last one again up to whole tiles."""
    rows: "Rows"
    """Which vectors of sequences (S, ...) the tokens of the pack take."""
    current_rows: "Rows"
    """Which vectors the tokens of the current clips take."""

    @property
    def num_tokens(self) -> int:
        return self.sequence.shape[0]

    @property
    def text_rows(self) -> "Rows":
        return self.rows if isinstance(self.rows, slice) else self.rows[: self.num_text]

    @property
    def image_rows(self) -> "Rows":
        return self.rows if isinstance(self.rows, slice) else self.rows[self.num_text :]


Rows = slice | Tensor
"""Which vectors of sequences (S, ...) tokens take: those of the one sequence, or an index of each token (L,)."""
PADDING_TIME = 2**30
"""Later than any frame, so that no token sees padding."""


class Pack(NamedTuple):
    """What a transformer computes on."""

    shapes: tuple[SequenceShape, ...]
    layout: PackLayout
    prompt_embeds: Tensor
    """The text stream, (num_text, D of the text encoder)."""
    patches: Tensor
    """The image stream, (num_image, patch features), in the order of channels that the variant asks for."""


def pack(
    sequences: Sequence[ClipSequence], dtype: torch.dtype, patchify: Callable[[Tensor], Tensor], *, tile: int
) -> Pack:
    """Sequences laid out for one forward, in ``dtype``.

    patchify: a clip (C, T, h, w) -> its patches (T * h/2 * w/2, patch features).
    """
    shapes, device = tuple(sequence.shape for sequence in sequences), sequences[0].clips[0].device
    images = (torch.cat([patchify(clip) for clip in sequence.clips]) for sequence in sequences)
    return Pack(
        shapes=shapes,
        layout=layout_of(shapes, device, tile),
        prompt_embeds=_stream([sequence.prompt.prompt_embeds for sequence in sequences], tile).to(dtype),
        patches=_stream(list(images), tile).to(dtype),
    )


def conditioning_of(sequences: Sequence[ClipSequence], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Timesteps (S,) in float32 and pooled prompts (S, P) in ``dtype`` of sequences. Raises ``ValueError`` for none."""
    if not sequences:
        raise ValueError("sequences: give at least one")
    timesteps = torch.tensor([s.timestep for s in sequences], dtype=torch.float32, device=sequences[0].clips[0].device)
    return timesteps, torch.stack([s.prompt.pooled_prompt_embeds for s in sequences]).to(dtype)


def is_one_by_one(device: torch.device) -> bool:
    """Whether every sequence is a pack of its own on a device, see :mod:`rows`."""
    return device.type == "cpu"


def padded(x: Tensor, tile: int) -> Tensor:
    """(L, ...) filled up with zeros to a multiple of ``tile``."""
    num_missing = -x.shape[0] % tile
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, num_missing)) if num_missing else x


def _stream(parts: Sequence[Tensor], tile: int) -> Tensor:
    filled = [padded(part, tile) for part in parts]
    return filled[0] if len(filled) == 1 else torch.cat(filled)


@lru_cache(maxsize=128)
@torch.inference_mode(False)  # what is cached may be used with gradients later
def layout_of(shapes: tuple[SequenceShape, ...], device: torch.device, tile: int = 1) -> PackLayout:
    """The layout of a pack. Cached for the last packs, since a pack's shape stays the same for all steps of a stage."""
    with torch.device("cpu"):
        return _new_layout(shapes, device, tile)


def _new_layout(shapes: tuple[SequenceShape, ...], device: torch.device, tile: int) -> PackLayout:
    num_text = sum(_filled(shape.num_text_tokens, tile) for shape in shapes)
    spans, texts, images, current = [], [], [], []
    text_start, image_start = 0, num_text
    for index, shape in enumerate(shapes):
        spans.append(SequenceSpan(text_start, shape.num_text_tokens, image_start, tuple(shape.frame_ends)))
        positions = torch.cat([_clip_positions(grid, shape.grids[-1], t) for grid, t in _clip_starts(shape.grids)])
        texts.append(_part(index, torch.zeros(shape.num_text_tokens, 3), tile))
        images.append(_part(index, positions, tile))
        end = image_start - num_text + shape.num_image_tokens
        of_clip = torch.arange(_filled(shape.num_current_tokens, tile)) + end - shape.num_current_tokens
        current.append(of_clip.clamp(max=end - 1))
        text_start += len(texts[-1].sequence)
        image_start += len(images[-1].sequence)
    sequence, time, positions = (torch.cat(column) for column in zip(*texts, *images, strict=True))
    of_current = torch.cat(current).to(device)
    sequence = sequence.to(device)
    is_alone = len(shapes) == 1 and is_one_by_one(device)
    return PackLayout(
        spans=tuple(spans),
        sequence=sequence,
        time=time.to(device),
        positions=positions,
        num_text=num_text,
        current=of_current,
        rows=slice(0, 1) if is_alone else sequence,
        current_rows=slice(0, 1) if is_alone else sequence[num_text:][of_current],
    )


class _Part(NamedTuple):
    """The columns of a layout for the text or the image of one sequence."""

    sequence: Tensor
    time: Tensor
    positions: Tensor


def _part(index: int, positions: Tensor, tile: int) -> _Part:
    num_tokens = _filled(len(positions), tile)
    return _Part(
        sequence=torch.full((num_tokens,), index),
        time=F.pad(positions[:, 0].long(), (0, num_tokens - len(positions)), value=PADDING_TIME),
        positions=padded(positions, tile),
    )


def _filled(num_tokens: int, tile: int) -> int:
    return -(-num_tokens // tile) * tile


def _clip_starts(grids: tuple[tuple[int, int, int], ...]) -> list[tuple[tuple[int, int, int], int]]:
    first_frames = accumulate((t for t, _, _ in grids), initial=0)
    return list(zip(grids, first_frames, strict=False))


def _clip_positions(grid: tuple[int, int, int], current: tuple[int, int, int], first_frame: int) -> Tensor:
    """(T * rows * columns, 3) positions of a clip's tokens, in the grid of the current clip."""
    t, rows, columns = grid
    axes = torch.meshgrid(
        torch.arange(first_frame, first_frame + t, dtype=torch.float32),
        _resampled_indices(current[1], rows),
        _resampled_indices(current[2], columns),
        indexing="ij",
    )
    return torch.stack(axes, dim=-1).reshape(-1, 3)


def _resampled_indices(num_current: int, num_clip: int) -> Tensor:
    indices = torch.arange(num_current, dtype=torch.float32)
    return F.interpolate(indices[None, None], size=num_clip, mode="linear")[0, 0]


def patchify(clip: Tensor) -> Tensor:
    """(C, T, h, w) -> (T * h/2 * w/2, 4 C): tokens frame by frame, row by row, each (p1 p2 c)."""
    return rearrange(clip, "c t (h p1) (w p2) -> (t h w) (p1 p2 c)", p1=PATCH_SIZE, p2=PATCH_SIZE)


def unpatchify(tokens: Tensor, shapes: Sequence[SequenceShape], tile: int = 1) -> list[Tensor]:
    """Tokens of all current clips, each filled up to a multiple of ``tile``, (L, 4 C) -> each one's (C, T, h, w)."""
    parts = tokens.split([_filled(shape.num_current_tokens, tile) for shape in shapes])
    pattern = "(t h w) (p1 p2 c) -> c t (h p1) (w p2)"
    clips = []
    for part, shape in zip(parts, shapes, strict=True):
        t, h, w = shape.grids[-1]
        own = part[: shape.num_current_tokens]
        clips.append(rearrange(own, pattern, t=t, h=h, w=w, p1=PATCH_SIZE, p2=PATCH_SIZE).contiguous())
    return clips
