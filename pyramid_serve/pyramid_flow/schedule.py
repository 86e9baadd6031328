"""The pyramid's schedule: where each stage starts and ends, its timesteps and sigmas, and the way from one to the next.

Global noise levels run from 1 to 0 in 1000 steps, a third of them to each stage. Entering a higher stage adds noise,
so that stage starts at a higher level than the last one ended. Source: arXiv 2410.05954, section 3.2, equation 15.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch.nn.functional as F
from torch import Tensor

from pyramid_serve.pyramid_flow.shapes import NUM_STAGES

NUM_TRAIN_TIMESTEPS = 1000
GAMMA = 1 / 3
"""Covariance of block noise, negated: the strongest there is, at which a block's four values sum to zero."""
LAST_SIGMA = 0.001


@dataclass(frozen=True)
class Stage:
    """One pyramid resolution on the global scale of noise (1 is pure noise, 0 is clean).

    uncorrected_start: where the stage begins by its share of the steps; start: the level it really begins at, after the
    noise added on entering; end: where it stops. first_timestep and last_timestep condition the transformer, 1000 to 0.
    """

    uncorrected_start: float
    start: float
    end: float
    first_timestep: float
    last_timestep: float

    def timesteps(self, num_steps: int) -> list[float]:
        """What each of ``num_steps`` steps conditions the transformer on."""
        return _linspace(self.first_timestep, self.last_timestep, num_steps)

    def sigmas(self, num_steps: int) -> list[float]:
        """The stage's own noise level before each step, 1 to 0.001, and 0 after the last: ``num_steps + 1`` numbers."""
        return [*_linspace(1.0, LAST_SIGMA, num_steps), 0.0]


def stage(index: int) -> Stage:
    """Stage 0 is the lowest resolution, ``NUM_STAGES - 1`` the full one."""
    return _stages()[index]


def enter_stage(latents: Tensor, block_noise: Tensor, index: int) -> Tensor:
    """Bring latents (C, T, h, w) that ended stage ``index - 1`` to the start of stage ``index``: (C, T, 2h, 2w).

    Upsampled by repetition, then scaled and renoised so that their distribution is that of the stage's start.
    ``block_noise`` (C, T, 2h, 2w) is correlated within blocks of 2 x 2, see :mod:`noise`. Source: equation 15.
    """
    signal = 1 - stage(index).uncorrected_start
    alpha = 1 / (math.sqrt(1 + 1 / GAMMA) * (1 - signal) + signal)
    beta = alpha * (1 - signal) / math.sqrt(GAMMA)
    return alpha * F.interpolate(latents, scale_factor=2.0, mode="nearest") + beta * block_noise


@lru_cache(maxsize=1)
def _stages() -> tuple[Stage, ...]:
    bounds = [int(i / NUM_STAGES * NUM_TRAIN_TIMESTEPS) for i in range(NUM_STAGES + 1)]
    uncorrected = [1 - bound / NUM_TRAIN_TIMESTEPS for bound in bounds]
    starts = [1.0] + [_corrected(start) for start in uncorrected[1:-1]]
    ends = uncorrected[1:]
    lengths = [start - end for start, end in zip(starts, ends, strict=True)]
    stages = []
    for i in range(NUM_STAGES):
        first = NUM_TRAIN_TIMESTEPS - _timestep_index(sum(lengths[:i]) / sum(lengths))
        next_first = NUM_TRAIN_TIMESTEPS - _timestep_index(sum(lengths[: i + 1]) / sum(lengths))
        last = first + (next_first - first) * (1 - 1 / NUM_TRAIN_TIMESTEPS)
        stages.append(Stage(uncorrected[i], starts[i], ends[i], float(first), last))
    return tuple(stages)


def _corrected(start: float) -> float:
    signal = 1 - start
    return 1 - signal / (math.sqrt(1 + 1 / GAMMA) * (1 - signal) + signal)


def _timestep_index(fraction: float) -> int:
    return min(int(fraction * NUM_TRAIN_TIMESTEPS), NUM_TRAIN_TIMESTEPS - 1)


def _linspace(first: float, last: float, num: int) -> list[float]:
    if num < 1:
        raise ValueError(f"num_steps={num}: must be at least 1")
    return [first + (last - first) * i / max(num - 1, 1) for i in range(num)]
