"""Pictures to latents and latents to frames, in the UNet's scale.

H W in pixels, h w = H and W divided by the VAE's factor, 8 for all published ones.
"""

from typing import Any

import torch
from torch import Tensor

from pyramid_serve.errors import NonFiniteError
from pyramid_serve.precision import check_finite, first_non_finite_layer


def encode_picture(vae: Any, picture: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation (4, h, w) of the latents of a picture (3, H, W) in [-1, 1], float32.

    vae: diffusers' ``AutoencoderKL``. Raises ``NonFiniteError`` where they hold NaN or infinity.
    """
    distribution = vae.encode(picture[None].to(vae.dtype)).latent_dist
    scale = vae.config.scaling_factor
    mean, std = distribution.mean[0].float() * scale, distribution.std[0].float() * scale
    check_finite(mean, "latents of the picture")
    check_finite(std, "deviation of the picture's latents")
    return mean, std


def decode_frames(vae: Any, latents: Tensor) -> Tensor:
    """8-bit frames (F, H, W, 3) of latents (4, F, h, w).

    One frame at a time: the pixels of several in one call would depend on their number. Raises ``NonFiniteError`` where
    latents or pixels hold NaN or infinity; the message names the first layer at which that happened.
    """
    check_finite(latents, "latents")
    scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
    return torch.stack([_decode_frame(vae, frame) for frame in scaled.unbind(1)])


def _decode_frame(vae: Any, latents: Tensor) -> Tensor:
    """One frame (H, W, 3) of latents (4, h, w)."""
    pixels: Tensor = vae.decode(latents[None]).sample[0].float()
    try:
        check_finite(pixels, "frames")
    except NonFiniteError as error:
        layer = first_non_finite_layer(vae, lambda: vae.decode(latents[None]))
        raise NonFiniteError(f"{error}, first at {layer}" if layer else str(error)) from None
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
