"""Products whose result for a row does not depend on the rows beside it.

S sequences in the pack, L tokens of a stream.

How a matrix product sums up a row depends on the shape of the whole product: libraries choose another kernel for
another number of rows, and share rows out among threads. On a CPU every product is therefore computed at a shape that
has nothing to do with the rest of the pack: the tokens of one sequence at a time, and conditioning in tiles of
``NUM_ROWS`` sequences. The same holds for element-wise functions that are not exact, such as GELU and SiLU, since
vectorised loops compute their last few elements in another way. What is packed is exact or works row by row: sums,
products, norms and copies.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_ROWS = 4
"""Products have a multiple of this many rows on a CPU, so that no thread gets so few that it takes another kernel."""


class Part(NamedTuple):
    """Tokens of a stream that are computed together, and which vectors of their sequences (S, ...) they take."""

    num_tokens: int
    sequence: slice | Tensor
    """A slice of one sequence, so that its vectors broadcast; or (L,) the sequence of each token."""


def parts_of(lengths: Sequence[int], sequence: Tensor) -> tuple[Part, ...]:
    """The parts of a stream: each sequence's tokens on a CPU, and otherwise the whole stream at once.

    lengths: tokens of each sequence; sequence: (L,) that of each token, on the device.
    """
    if sequence.device.type == "cpu":
        return tuple(Part(length, slice(index, index + 1)) for index, length in enumerate(lengths))
    return (Part(sequence.shape[0], sequence),)


def split(stream: Tensor, parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """The rows (L, ...) of each part."""
    rows: tuple[Tensor, ...] = stream.split([part.num_tokens for part in parts])
    return rows


def project(linear: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``linear(x)`` of the rows (L, D) of one part, on a CPU with rows of zeros up to a multiple of ``NUM_ROWS``."""
    num_missing = -x.shape[0] % NUM_ROWS
    if x.device.type != "cpu" or not num_missing:
        return linear(x)
    return linear(F.pad(x, (0, 0, 0, num_missing)))[: x.shape[0]]


def project_parts(linear: Callable[[Tensor], Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """``linear`` of each part (L, D) of a stream."""
    return [project(linear, x) for x in parts]


def in_tiles(function: Callable[..., Tensor], *vectors: Tensor) -> Tensor:
    """``function`` of vectors of sequences (S, ...), on a CPU in tiles of ``NUM_ROWS`` filled up with zeros."""
    num_sequences = vectors[0].shape[0]
    if vectors[0].device.type != "cpu":
        return function(*vectors)
    num_missing = -num_sequences % NUM_ROWS
    padded = [F.pad(x, (0, 0) * (x.ndim - 1) + (0, num_missing)) for x in vectors]
    tiles = zip(*(x.split(NUM_ROWS) for x in padded), strict=True)
    return torch.cat([function(*tile) for tile in tiles])[:num_sequences]
