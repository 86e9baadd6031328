"""The UNet's forward: the predictions of rows, packed or one by one.

B rows, F frames, h w latent size, L text tokens, D their width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyramid_serve.pia.sampler import UNetRow

_MAX_SEQUENCES = 65_535
"""Of one call of attention on CUDA, where some kernels count sequences in 16 bits. The motion modules have one for each
latent pixel of a row."""


def predict(unet: Any, rows: Sequence[UNetRow], *, one_by_one: bool) -> list[Tensor]:
    """The predictions (4, F, h, w), float32, of rows that have equal shapes. unet: diffusers' ``UNetMotionModel``.

    one_by_one: each row is computed by itself, since how a product is summed up may depend on how many rows it has; so
    a video's bits do not depend on what shares its forwards. On a CPU they still depend on the number of threads, by
    some 1e-6. Otherwise all rows are computed in one call, or in as few as attention allows.
    """
    size = 1 if one_by_one else max(_MAX_SEQUENCES // rows[0].sample[0, 0].numel(), 1)
    predictions: list[Tensor] = []
    for start in range(0, len(rows), size):
        predictions += _predict_at_once(unet, rows[start : start + size])
    return predictions


def _predict_at_once(unet: Any, rows: Sequence[UNetRow]) -> list[Tensor]:
    sample = torch.stack([row.sample for row in rows]).to(unet.dtype)  # (B, 9, F, h, w)
    timesteps = torch.stack([row.timestep.float() for row in rows])  # (B)
    prompts = torch.stack([row.prompt_embeds for row in rows]).to(unet.dtype)  # (B, L, D)
    per_frame = prompts.repeat_interleave(sample.shape[2], dim=0)  # (B F, L, D)
    predictions: Tensor = unet(sample, timesteps, encoder_hidden_states=per_frame).sample
    return list(predictions.float())
