"""Where noise comes from: a function of (seed, purpose), so that batch, replica and retry do not change a video.

Each purpose has a generator of its own on the CPU, seeded with a hash of ``SEED/PURPOSE``: "initial", "picture",
"strength", "free_init/ITERATION", and "step/ITERATION/STEP". The numbers are therefore not those that
``diffusers.PIAPipeline`` draws for the same seed, from one generator for all purposes in turn.

C = 4 channels, F frames, h w latent size.
"""

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]


class NoiseSource(Protocol):
    """The noise of one video: standard normal, float32, on the CPU."""

    def initial(self, shape: Shape) -> Tensor:
        """Where the video starts: (C, F, h, w)."""
        ...

    def picture(self, shape: Shape) -> Tensor:
        """What tells which of the picture's latents that the VAE finds likely are taken: (C, h, w)."""
        ...

    def strength(self, shape: Shape) -> Tensor:
        """What is added to the picture's latents where the strength is below 1: (C, F, h, w)."""
        ...

    def free_init(self, iteration: int, shape: Shape) -> Tensor:
        """The high frequencies of the noise that an iteration of FreeInit from 1 on starts from: (C, F, h, w)."""
        ...

    def step(self, iteration: int, step: int) -> torch.Generator:
        """For a scheduler that draws noise at a step (LCM). Iterations and steps count from 0."""
        ...


@dataclass(frozen=True)
class SeededNoise:
    """The noise of a seed."""

    seed: int

    def initial(self, shape: Shape) -> Tensor:
        return self._draw("initial", shape)

    def picture(self, shape: Shape) -> Tensor:
        return self._draw("picture", shape)

    def strength(self, shape: Shape) -> Tensor:
        return self._draw("strength", shape)

    def free_init(self, iteration: int, shape: Shape) -> Tensor:
        return self._draw(f"free_init/{iteration}", shape)

    def step(self, iteration: int, step: int) -> torch.Generator:
        return self._generator(f"step/{iteration}/{step}")

    def _draw(self, purpose: str, shape: Shape) -> Tensor:
        return torch.randn(shape, generator=self._generator(purpose), device="cpu")

    def _generator(self, purpose: str) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed}/{purpose}".encode(), digest_size=8).digest()
        return torch.Generator("cpu").manual_seed(int.from_bytes(digest) >> 1)
