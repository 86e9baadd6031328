"""Pictures to latents and latents to frames, in the transformer's scale.

B videos, H W in pixels, h w = H / 8, W / 8.
"""

import torch
from torch import Tensor

from pyramid_serve.errors import NonFiniteError
from pyramid_serve.precision import check_finite, first_non_finite_layer
from pyramid_serve.pyramid_flow.autoencoder import CausalVideoVAE, DecoderMemory, Tiling
from pyramid_serve.pyramid_flow.parts import LatentScale


def encode_picture(vae: CausalVideoVAE, scale: LatentScale, picture: Tensor, *, tiling: Tiling | None = None) -> Tensor:
    """A picture (3, H, W) in [-1, 1] as unit 0: latents (16, 1, h, w), float32, the mean of their distribution."""
    mean = vae.encode(picture[None, :, None], tiling=tiling).mean[0]
    check_finite(mean, "unit 0: latents of the picture")
    return scale.from_vae(mean)


def to_uint8(pixels: Tensor) -> Tensor:
    """Frames (F, H, W, 3) of pixels (3, F, H, W) in [-1, 1]: ``clamp(127.5 x + 127.5, 0, 255)``, truncated."""
    return (pixels.float() * 127.5 + 127.5).clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def decode_unit(
    vae: CausalVideoVAE,
    scale: LatentScale,
    latents: Tensor,
    memory: DecoderMemory | None,
    *,
    tiling: Tiling | None = None,
) -> tuple[Tensor, DecoderMemory]:
    """The next unit (B, 16, 1, h, w) of B videos as 8-bit frames (B, 1 or 8, H, W, 3), and the memory for the next.

    Raises ``NonFiniteError`` where latents or frames hold NaN or infinity, which 8 bits would show as black or white;
    the message names the first layer of the decoder at which that happened.
    """
    check_finite(latents, "latents")
    scaled = scale.to_vae(latents, first_unit=0 if memory is None else 1)
    frames, new_memory = vae.decode_unit(scaled, memory, tiling=tiling)
    try:
        check_finite(frames, "frames")
    except NonFiniteError as error:
        layer = first_non_finite_layer(vae, lambda: vae.decode_unit(scaled, memory, tiling=tiling))
        raise NonFiniteError(f"{error}, first at {layer}" if layer else str(error)) from None
    return torch.stack([to_uint8(video) for video in frames]), new_memory
