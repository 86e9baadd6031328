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
        return self._draw(unit, 0, self.shape.size_at(NUM_STAGES - 1))

    def block(self, unit: int, stage: int) -> Tensor:
        return block_noise(self._draw(unit, stage, self.shape.size_at(stage)))

    def _draw(self, unit: int, stage: int, size: tuple[int, int]) -> Tensor:
        digest = hashlib.blake2b(f"{self.seed}/{unit}/{stage}".encode(), digest_size=8).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest) >> 1)
        return torch.randn(LATENT_CHANNELS, 1, *size, generator=generator, device="cpu")


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

    It is computed directly, since the covariance is singular: white noise minus the mean of its block has just this
    covariance, but for a factor. Source: arXiv 2410.05954, section 3.2.
    """
    blocks = standard_normal.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))  # (..., h/2, 2, w/2, 2)
    noise: Tensor = (blocks - blocks.mean(dim=(-3, -1), keepdim=True)) * math.sqrt(1 + GAMMA)
    return noise.reshape(standard_normal.shape)


def halve_noise(noise: Tensor) -> Tensor:
    """Half the size of noise (C, T, h, w), its variance kept."""
    return 2 * F.interpolate(noise.transpose(0, 1), scale_factor=0.5, mode="bilinear").transpose(0, 1)
