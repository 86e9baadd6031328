"""Where noise comes from: a function of (seed, unit, stage), so that batch, replica and retry do not change a video.

C channels, T frames, H W latent size, h w latent size at a stage.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pyramid_serve.pyramid_flow.schedule import GAMMA
from pyramid_serve.pyramid_flow.shapes import LATENT_CHANNELS, NUM_STAGES, LatentShape


class NoiseSource(Protocol):
    """The noise of one video, in float32 on the CPU."""

    def initial(self, unit: int) -> Tensor:
        """Where a unit starts, at full latent size: (C, 1, H, W), standard normal."""
        ...

    def block(self, unit: int, stage: int) -> Tensor:
        """What is added on entering ``stage`` > 0: (C, 1, h, w), block noise."""
        ...


@dataclass(frozen=True)
class SeededNoise:
    """Noise drawn on the CPU, so the same on every device, by a generator of its own for each unit and stage."""

    seed: int
    shape: LatentShape

    def initial(self, unit: int) -> Tensor:
        return torch.randn(LATENT_CHANNELS, 1, *self.shape.size_at(NUM_STAGES - 1), generator=self._generator(unit, 0))

    def block(self, unit: int, stage: int) -> Tensor:
        noise = torch.randn(LATENT_CHANNELS, 1, *self.shape.size_at(stage), generator=self._generator(unit, stage))
        return block_noise(noise)

    def _generator(self, unit: int, stage: int) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed}/{unit}/{stage}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


@dataclass(frozen=True)
class RecordedNoise:
    """Noise that was drawn before, to repeat a run of another implementation.

    initial_noise: (C, T, H, W), its slice 0 for ``first_unit``; block_noise: in the order of use, unit by unit, stages
    1 and 2 of each. Image-to-video starts at unit 1.
    """

    initial_noise: Tensor
    block_noise: Sequence[Tensor]
    first_unit: int = 0

    def initial(self, unit: int) -> Tensor:
        return self.initial_noise[:, unit - self.first_unit, None]

    def block(self, unit: int, stage: int) -> Tensor:
        return self.block_noise[(unit - self.first_unit) * (NUM_STAGES - 1) + stage - 1]


def block_noise(standard_normal: Tensor) -> Tensor:
    """Correlate noise (..., h, w) within blocks of 2 x 2: variance 1, covariance -1/3, each block summing to zero.

    Drawn directly: the covariance is singular, and what is left of white noise without its block mean has just this
    shape. Source: arXiv 2410.05954, section 3.2.
    """
    mean = F.avg_pool2d(standard_normal, 2).repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
    return (standard_normal - mean) * math.sqrt(1 + GAMMA)


def halve_noise(noise: Tensor) -> Tensor:
    """Half the size of noise (C, T, h, w), its variance kept."""
    return 2 * F.interpolate(noise.transpose(0, 1), scale_factor=0.5, mode="bilinear").transpose(0, 1)
