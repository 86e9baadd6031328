"""A video between two of its steps, and the same as named tensors.

C = 4 channels, F frames, h w latent size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_PREFIX = "scheduler."


@dataclass(frozen=True, eq=False)
class SamplerState:
    """What has to be known to make the steps that are left. All noise is drawn again, since it comes from the seed."""

    iteration: int
    """Of FreeInit, from 0; always 0 without it."""
    step: int
    """Steps that are done of this iteration."""
    latents: Tensor
    """(C, F, h, w), float32"""
    scheduler: Mapping[str, Tensor]
    """As ``schedulers.scheduler_state`` tells it."""

    def as_tensors(self) -> dict[str, Tensor]:
        """Under names that ``of_tensors`` knows, contiguous, on the CPU."""
        own = {"iteration": torch.tensor(self.iteration), "step": torch.tensor(self.step), "latents": self.latents}
        named = own | {_PREFIX + name: tensor for name, tensor in self.scheduler.items()}
        return {name: tensor.cpu().contiguous() for name, tensor in named.items()}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of ``as_tensors``. Raises ``ValueError`` for other tensors."""
        try:
            return cls(
                iteration=int(tensors["iteration"]),
                step=int(tensors["step"]),
                latents=tensors["latents"],
                scheduler={
                    name.removeprefix(_PREFIX): each for name, each in tensors.items() if name.startswith(_PREFIX)
                },
            )
        except KeyError as missing:
            raise ValueError(f"state: has no {missing}") from None
