"""The latents that the VAE is taught: a fixed linear transform of blocks of 8 x 8 pixels and 8 frames.

F frames, H W pixels, T latent frames, h = H / 8, w = W / 8.

A block's 16 latents are the first terms of its cosine transform, in colours that are as uncorrelated as the prompts'
own. So latents move smoothly with what they show, and half the size of them is nearly the latents of half the size,
which the pyramid builds on. The decoder puts back the sharp edges that 16 numbers leave out. Frame 0 makes a block of
its own, as if it stood still for 8 frames.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from pyramid_serve.pyramid_flow.parts import VARIANTS
from pyramid_serve.pyramid_flow.shapes import SPATIAL_FACTOR, TEMPORAL_FACTOR

LATENT_SCALE = VARIANTS["PyramidFluxTransformer"].latent_scale

# Rows: the principal axes of the prompts' colours, the strongest first. Orthonormal.
_COLOR_AXES = ((0.461, 0.593, 0.660), (0.772, 0.098, -0.628), (0.437, -0.799, 0.413))


class Term(NamedTuple):
    """One latent: a colour axis, the cosines' orders in time, y and x, and the term's usual size in the data."""

    axis: int
    orders: tuple[int, int, int]
    size: float


# Sizes are about the root mean squares over `sample_scene`'s clips, pixels in [-1, 1].
TERMS = (
    *(Term(axis, (0, 0, 0), size) for axis, size in enumerate((24.6, 7.6, 3.6))),
    *(Term(axis, (0, 1, 0), size) for axis, size in enumerate((1.82, 1.29, 0.75))),
    *(Term(axis, (0, 0, 1), size) for axis, size in enumerate((1.81, 1.27, 0.72))),
    Term(0, (0, 1, 1), 0.80),
    Term(0, (0, 2, 0), 0.77),
    Term(0, (0, 0, 2), 0.73),
    Term(0, (1, 0, 0), 0.44),
    Term(1, (1, 0, 0), 0.30),
    Term(0, (1, 1, 0), 0.28),
    Term(0, (1, 0, 1), 0.35),
)
# Between 0, the transform's own proportions, in which the sums drown all else, and 1, all of one size, in which an
# error of the sums, seen as flicker, costs no more than one of the finest terms.
_EVENNESS = 0.6
_MEAN_SIZE = math.sqrt(sum(term.size ** (2 - 2 * _EVENNESS) for term in TERMS) / len(TERMS))


@lru_cache(maxsize=1)
def _basis() -> Tensor:
    """(16, 3, 8, 8, 8): a block's latent is the sum of its pixels times this."""
    order, place = torch.arange(SPATIAL_FACTOR)[:, None], torch.arange(SPATIAL_FACTOR)[None]
    cosines = torch.cos(math.pi * (place + 0.5) * order / SPATIAL_FACTOR)
    cosines = cosines / cosines.norm(dim=1, keepdim=True)
    axes = torch.tensor(_COLOR_AXES)
    return torch.stack(
        [
            torch.einsum("c,t,y,x->ctyx", axes[term.axis], *(cosines[order] for order in term.orders))
            / (term.size**_EVENNESS * _MEAN_SIZE)
            for term in TERMS
        ]
    )


def block_transform(pixels: Tensor) -> Tensor:
    """Latents (B, 16, T, h, w) of clips (B, 3, F, H, W) in [-1, 1], F = 8 n + 1, of about unit size."""
    padded = torch.cat([pixels[:, :, :1].expand(-1, -1, TEMPORAL_FACTOR - 1, -1, -1), pixels], dim=2)
    blocks = rearrange(
        padded,
        "b c (t p) (h q) (w r) -> (b t h w) (c p q r)",
        p=TEMPORAL_FACTOR,
        q=SPATIAL_FACTOR,
        r=SPATIAL_FACTOR,
    )
    b, _, f, h, w = padded.shape
    return rearrange(
        blocks @ _basis().flatten(1).T,
        "(b t h w) k -> b k t h w",
        b=b,
        t=f // TEMPORAL_FACTOR,
        h=h // SPATIAL_FACTOR,
        w=w // SPATIAL_FACTOR,
    )


# One scale for the VAE's latents, midway between what the published scales of frame 0 and of the others ask for.
GAIN = 1 / math.sqrt(LATENT_SCALE.image_scale * LATENT_SCALE.video_scale)
_SHIFT = (LATENT_SCALE.image_shift + LATENT_SCALE.video_shift) / 2


def vae_latents(pixels: Tensor) -> Tensor:
    """What the VAE's encoder gives for clips (B, 3, F, H, W) in [-1, 1]: (B, 16, T, h, w) in the VAE's own scale."""
    return block_transform(pixels) * GAIN + _SHIFT


def transformer_latents(pixels: Tensor) -> Tensor:
    """The same in the transformer's scale."""
    return LATENT_SCALE.from_vae(vae_latents(pixels))


@lru_cache(maxsize=1)
def _inverse() -> Tensor:
    """(16, 3, 8, 8): the mean frame of the block nearest to a latent of one."""
    inverse = torch.linalg.pinv(_basis().flatten(1))
    blocks: Tensor = rearrange(inverse, "(c p q r) k -> k c p q r", c=3, p=TEMPORAL_FACTOR, q=SPATIAL_FACTOR)
    return blocks.mean(dim=2)


def mean_frames(latents: Tensor) -> Tensor:
    """The mean of each unit's frames (B, 3, T, H, W) in [-1, 1] from the transformer's latents (B, 16, T, h, w).

    A little soft at the edges, and far cheaper than the decoder.
    """
    blocks = (LATENT_SCALE.to_vae(latents) - _SHIFT) / GAIN
    pixels = torch.einsum("bkthw,kcqr->bcthqwr", blocks, _inverse())
    return rearrange(pixels, "b c t h q w r -> b c t (h q) (w r)")
