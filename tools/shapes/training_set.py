"""What the transformer is trained on, as it lies on the training's device: clips, pictures, and their prompts' tokens.

Rollouts (see `rollouts.py`) that are written while a training runs are taken in on the way.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tools.shapes.draw import LatentClips, mixed, read_files
from tools.shapes.text import TextEncoders, Tokens

logger = logging.getLogger(__name__)

DROPPED_PROMPTS = 0.1
ROLLOUTS = 0.4
"""Of the clips of a step, where there are any."""


@dataclass(frozen=True)
class Source:
    """What is shown, N clips or pictures, and the rows of `TrainingSet.tokens` that hold the prompts."""

    shown: LatentClips
    firsts: NDArray[np.int64]  # the first row of each (N,)
    counts: NDArray[np.int64]  # rows of each (N,)

    @classmethod
    def of(cls, shown: LatentClips, *, first_row: int) -> Source:
        counts = np.array([len(own) for own in shown.prompts])
        return cls(shown, first_row + np.cumsum(counts) - counts, counts)

    def sample(self, num: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Indices (num,) of clips, by their chances, and the row of one prompt of each (num,)."""
        picked = rng.choice(len(self.counts), size=num, p=self.shown.chances)
        return picked, self.firsts[picked] + rng.integers(self.counts[picked])


class TrainingSet:
    """Clips, pictures and tokens on one device.

    tokens: R rows, the prompts of the clips, then of the pictures, the empty one last; lengths: of each row (R,), in
    T5's tokens. One prompt in ten has a word in it that nobody knows, the same one through the whole training.
    """

    def __init__(self, folder: Path, text: TextEncoders, *, seed: int, device: str) -> None:
        """Read what `draw` and `rollouts` wrote to the folder.

        Raises ValueError where there are no clips, no worn ones beside them, or no pictures.
        """
        self._folder, self._text, self._seed, self._device = folder, text, seed, device
        self._drawn, self._pictures = (read_files(folder, kind).to(device) for kind in ("clips", "pictures"))
        self._drawn_tokens = self._tokenize(self._drawn.prompts)
        self._other_tokens = Tokens.concatenated(
            [self._tokenize(self._pictures.prompts), text.tokenize([""]).to(device)]
        )
        self._rollouts: list[Path] | None = None
        self.refresh()

    def refresh(self) -> None:
        """Take in rollouts that were written since."""
        found = sorted(self._folder.glob("rollouts_*.pt"))
        if found == self._rollouts:
            return
        self._rollouts = found
        clips, tokens = self._drawn, [self._drawn_tokens]
        if found:
            rollouts = read_files(self._folder, "rollouts").to(self._device)
            clips = mixed(self._drawn, rollouts, ROLLOUTS)
            tokens.append(self._tokenize(rollouts.prompts))
            num_drawn = len(self._drawn.prompts)
            logger.info("%d clips, %d rollouts", num_drawn, len(rollouts.prompts))
            # Parts of both, so that the clips are kept once.
            worn = None if clips.worn is None else clips.worn[:num_drawn]
            self._drawn = replace(self._drawn, latents=clips.latents[:num_drawn], worn=worn)
        self.tokens = Tokens.concatenated([*tokens, self._other_tokens])
        self.lengths = self.tokens.t5_mask.sum(1).cpu().numpy()
        self.clips = Source.of(clips, first_row=0)
        self.pictures = Source.of(self._pictures, first_row=sum(len(part.t5) for part in tokens))

    def sample_rows(
        self, sources: Sequence[Source], counts: Sequence[int], rng: np.random.Generator
    ) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
        """For each source indices of so many clips (n,), and of all of them together the prompts' rows (sum of n,).

        One prompt in ten is the empty one, for guidance.
        """
        picked, rows = zip(*(source.sample(n, rng) for source, n in zip(sources, counts, strict=True)), strict=True)
        all_rows = np.concatenate(rows)
        all_rows[rng.random(len(all_rows)) < DROPPED_PROMPTS] = len(self.lengths) - 1
        return list(picked), all_rows

    def _tokenize(self, prompts: Sequence[Sequence[str]]) -> Tokens:
        return self._text.tokenize(list(chain.from_iterable(prompts))).to(self._device)

    def on_device(self, indices: NDArray[np.int64]) -> Tensor:
        """Indices as they index the clips and the tokens."""
        return torch.from_numpy(indices).to(self._device)
