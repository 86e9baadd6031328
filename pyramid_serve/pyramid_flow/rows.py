"""Products whose result for a row does not depend on the rows beside it.

S sequences in the pack, L tokens of a stream, D width.

How a matrix product sums up a row depends on the shape of the whole product: libraries choose another kernel for
another number of rows, and share rows out among threads. Element-wise functions that are not exact, such as GELU and
SiLU, depend on it as well, since vectorised loops compute their last few elements in another way. On a CPU the
sequences of a pack are therefore computed one after the other, each at a shape of its own, and only what is made of
their conditioning is computed for all of them, in tiles of ``NUM_ROWS``. A GPU computes a whole pack at once; there
:mod:`fixed_tiles` has products that do not depend on the pack.
"""

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from pyramid_serve.pyramid_flow.attention import FLEX_BLOCK
from pyramid_serve.pyramid_flow.pack import is_one_by_one, padded

Prediction = Generator[None, None, list[Tensor]]
"""A forward that yields after each layer, and returns the predictions (C, T, h, w) of its sequences."""
_Sequence = TypeVar("_Sequence")

NUM_ROWS = 4
"""Products have a multiple of this many rows on a CPU, so that no thread gets so few that it takes another kernel."""


def tile_on(device: torch.device, *, batch_invariant: bool) -> int:
    """Tokens that the text and the image of a sequence are each filled up to a multiple of.

    On a CPU whatever it takes is done always. Elsewhere ``batch_invariant`` asks for it: the parts of a sequence then
    begin where a tile of attention begins.
    """
    if is_one_by_one(device):
        return NUM_ROWS
    return FLEX_BLOCK if batch_invariant else 1


def in_turn(
    predict: Callable[[Sequence[_Sequence], list[Tensor]], Prediction],
    sequences: Sequence[_Sequence],
    vectors: Sequence[Tensor],
) -> list[Tensor]:
    """What ``predict`` returns for sequences and their vectors (S, ...): on a CPU for each by itself, else for all.

    It yields wherever the other sequences may go on: after each layer, so that all use its weights from the cache.
    """
    size = 1 if is_one_by_one(vectors[0].device) else len(sequences)
    own = [slice(start, start + size) for start in range(0, len(sequences), size)]
    packs = [predict(sequences[i], [x[i] for x in vectors]) for i in own]
    predictions: list[Tensor] = []
    while not predictions:  # all have as many layers, so all end in the same round
        for running in packs:
            try:
                next(running)
            except StopIteration as done:
                predictions += done.value
    return predictions


def at_once(layers: Generator[None, None, Tensor]) -> Tensor:
    """What layers return that are computed with no other sequences in turn."""
    while True:
        try:
            next(layers)
        except StopIteration as done:
            out: Tensor = done.value
            return out


def in_tiles(function: Callable[..., Tensor], *vectors: Tensor) -> Tensor:
    """``function`` of vectors of sequences (S, ...), on a CPU in tiles of ``NUM_ROWS`` filled up with zeros."""
    num_sequences = vectors[0].shape[0]
    if not is_one_by_one(vectors[0].device):
        return function(*vectors)
    tiles = zip(*(padded(x, NUM_ROWS).split(NUM_ROWS) for x in vectors), strict=True)
    return torch.cat([function(*tile) for tile in tiles])[:num_sequences]
