"""The UNet's forward: the predictions of rows, packed or one by one.

B rows, F frames, h w latent size, L text tokens, D their width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyramid_serve.pia.sampler import UNetRow


def predict(unet: Any, rows: Sequence[UNetRow]) -> list[Tensor]:
    """The predictions (4, F, h, w), float32, of rows that have equal shapes. unet: diffusers' ``UNetMotionModel``.

    On a CPU each row is computed by itself, since how a product is summed up depends on how many rows it has: so a
    video's bits do not depend on what shares its forwards; they do depend on the number of threads, by some 1e-6.
    Elsewhere all rows are computed in one call.
    """
    size = 1 if rows[0].sample.device.type == "cpu" else len(rows)
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
