"""What a unit sees of the units before it: the older, the coarser.

C channels, U finished latent frames, H W latent size.
"""

import torch.nn.functional as F
from torch import Tensor

from pyramid_serve.pyramid_flow.shapes import NUM_STAGES


def halve(latents: Tensor) -> Tensor:
    """(C, T, h, w) -> (C, T, h/2, w/2), bilinear."""
    return F.interpolate(latents.transpose(0, 1), scale_factor=0.5, mode="bilinear").transpose(0, 1)


def history_clips(history: Tensor, stage: int) -> tuple[Tensor, ...]:
    """The finished latents (C, U, H, W) as the clips that ``stage`` sees, oldest first.

    The last frame at the stage's own resolution, each one before it a stage lower, and all the rest at the lowest, in
    one clip. Empty where U is 0. Source: arXiv 2410.05954, section 3.3 (temporal pyramid).
    """
    num_above = min(stage, history.shape[1])
    num_lowest = history.shape[1] - num_above
    clips = [_at_stage(history[:, :num_lowest], 0)] if num_lowest else []
    for age in reversed(range(num_above)):
        index = history.shape[1] - 1 - age
        clips.append(_at_stage(history[:, index : index + 1], stage - age))
    return tuple(clips)


def _at_stage(latents: Tensor, stage: int) -> Tensor:
    for _ in range(NUM_STAGES - 1 - stage):
        latents = halve(latents)
    return latents
