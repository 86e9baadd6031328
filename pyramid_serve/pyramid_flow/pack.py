"""Sequences of clips, packed end to end for one forward of a transformer.

S sequences, L tokens of the whole pack, C channels, T frames, h w latent size of a clip.

A sequence is one video's text, its history and the noisy latents it is working on. A pack holds sequences of different
videos, units, stages and timesteps, with no padding: cost is the sum over the sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from pyramid_serve.pyramid_flow.rows import Part, parts_of
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
    """Where a sequence lies in the pack, and where each of its frames ends there (frame 0 with the text)."""

    start: int
    end: int
    frame_ends: tuple[int, ...]


class PackLayout(NamedTuple):
    """Where every token of a pack lies.

    The pack's order is sequence by sequence: text, then frame by frame. The *text* and *image* streams hold the tokens
    of one kind, in the order of the sequences. All tensors except ``positions`` are int64.
    """

    spans: tuple[SequenceSpan, ...]
    sequence: Tensor
    """(L,) the sequence of each token of the pack."""
    time: Tensor
    """(L,) the frame number of each token of the pack; text counts as 0."""
    positions: Tensor
    """(L, 3) float, on the CPU: time, row, column in the grid of the current clip; text is at (0, 0, 0)."""
    text: Tensor
    """Where the text stream's tokens stand in the pack."""
    image: Tensor
    """Where the image stream's tokens stand in the pack."""
    current: Tensor
    """Where, in the *image* stream, the current clips' tokens stand."""
    text_parts: tuple[Part, ...]
    """The text stream as it is computed, see :mod:`rows`."""
    image_parts: tuple[Part, ...]
    """The image stream as it is computed."""
    packed_parts: tuple[Part, ...]
    """The pack as it is computed."""
    current_parts: tuple[Part, ...]
    """The tokens of the current clips as they are computed."""

    @property
    def num_tokens(self) -> int:
        return self.sequence.shape[0]

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        """Both streams (num_text, ...) and (num_image, ...) as one in the pack's order (L, ...)."""
        packed = text.new_empty(self.num_tokens, *text.shape[1:])
        packed[self.text] = text
        packed[self.image] = image
        return packed

    def split(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """The text and the image stream of a packed tensor (L, ...)."""
        return packed[self.text], packed[self.image]


class Pack(NamedTuple):
    """What a transformer computes on, except for the clips, which each variant embeds in its own way."""

    shapes: tuple[SequenceShape, ...]
    layout: PackLayout
    timesteps: Tensor
    """(S,) float32."""
    pooled_prompt_embeds: Tensor
    """(S, P)."""
    prompt_embeds: Tensor
    """The text stream, (num_text, D of the text encoder)."""


def pack(sequences: Sequence[ClipSequence], dtype: torch.dtype) -> Pack:
    """Sequences end to end, their text in ``dtype``. Raises ``ValueError`` for none."""
    if not sequences:
        raise ValueError("sequences: give at least one")
    shapes, device = tuple(sequence.shape for sequence in sequences), sequences[0].clips[0].device
    return Pack(
        shapes=shapes,
        layout=layout_of(shapes, device),
        timesteps=torch.tensor([s.timestep for s in sequences], dtype=torch.float32, device=device),
        pooled_prompt_embeds=torch.stack([s.prompt.pooled_prompt_embeds for s in sequences]).to(dtype),
        prompt_embeds=torch.cat([s.prompt.prompt_embeds for s in sequences]).to(dtype),
    )


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is cached may be used with gradients later
def layout_of(shapes: tuple[SequenceShape, ...], device: torch.device) -> PackLayout:
    """The layout of a pack. Cached for the last packs, since a pack's shape stays the same for all steps of a stage."""
    with torch.device("cpu"):
        return _new_layout(shapes, device)


def _new_layout(shapes: tuple[SequenceShape, ...], device: torch.device) -> PackLayout:
    starts = list(accumulate((shape.num_tokens for shape in shapes), initial=0))
    spans, sequence, time, positions, is_text, is_current = [], [], [], [], [], []
    for index, (shape, start) in enumerate(zip(shapes, starts, strict=False)):
        spans.append(SequenceSpan(start, start + shape.num_tokens, tuple(start + end for end in shape.frame_ends)))
        sequence.append(torch.full((shape.num_tokens,), index))
        clip_positions = [_clip_positions(grid, shape.grids[-1], t) for grid, t in _clip_starts(shape.grids)]
        positions.append(torch.cat([torch.zeros(shape.num_text_tokens, 3), *clip_positions]))
        time.append(positions[-1][:, 0].long())
        token = torch.arange(shape.num_tokens)
        is_text.append(token < shape.num_text_tokens)
        is_current.append(token >= shape.num_tokens - shape.num_current_tokens)
    text_mask, current_mask, sequences = torch.cat(is_text), torch.cat(is_current), torch.cat(sequence)
    return PackLayout(
        spans=tuple(spans),
        sequence=sequences.to(device),
        time=torch.cat(time).to(device),
        positions=torch.cat(positions),
        text=text_mask.nonzero().squeeze(1).to(device),
        image=(~text_mask).nonzero().squeeze(1).to(device),
        current=current_mask[~text_mask].nonzero().squeeze(1).to(device),
        text_parts=parts_of([shape.num_text_tokens for shape in shapes], sequences[text_mask].to(device)),
        image_parts=parts_of([shape.num_image_tokens for shape in shapes], sequences[~text_mask].to(device)),
        packed_parts=parts_of([shape.num_tokens for shape in shapes], sequences.to(device)),
        current_parts=parts_of([shape.num_current_tokens for shape in shapes], sequences[current_mask].to(device)),
    )


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


def unpatchify(tokens: Tensor, shapes: Sequence[SequenceShape]) -> list[Tensor]:
    """Tokens of all current clips (num_current, 4 C) -> each one's (C, T, h, w)."""
    parts = tokens.split([shape.num_current_tokens for shape in shapes])
    pattern = "(t h w) (p1 p2 c) -> c t (h p1) (w p2)"
    clips = []
    for part, shape in zip(parts, shapes, strict=True):
        t, h, w = shape.grids[-1]
        clips.append(rearrange(part, pattern, t=t, h=h, w=w, p1=PATCH_SIZE, p2=PATCH_SIZE).contiguous())
    return clips
