"""The fixed transform that the VAE is taught."""

import torch
import torch.nn.functional as F

from tools.shapes.judge import scenes_in_turn
from tools.shapes.latents import GAIN, TERMS, block_transform, mean_frames, transformer_latents, vae_latents
from tools.shapes.scenes import render, to_pixels

SUMS = [i for i, term in enumerate(TERMS) if term.orders == (0, 0, 0)]


def clips(num_clips: int, num_frames: int) -> torch.Tensor:
    """(B, 3, F, 128, 128) in [-1, 1]."""
    drawn = [render(scene, num_frames=num_frames) for scene in scenes_in_turn(num_clips, seed=4)]
    return to_pixels(torch.stack(drawn).transpose(1, 2))


def test_a_plain_color_is_told_by_its_sums_alone() -> None:
    pixels = torch.tensor([0.5, -0.25, 1.0]).view(1, 3, 1, 1, 1).expand(1, 3, 9, 16, 24)
    latents = block_transform(pixels)
    assert latents.shape == (1, 16, 2, 2, 3)
    rest = [i for i in range(16) if i not in SUMS]
    assert latents[:, SUMS].abs().min() > 0.1
    torch.testing.assert_close(latents[:, rest], torch.zeros(1, 13, 2, 2, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents, latents[:, :, :1, :1, :1].expand_as(latents))


def test_frame_0_is_a_still_block() -> None:
    picture = clips(1, 1)
    still = picture.expand(-1, -1, 9, -1, -1)
    torch.testing.assert_close(block_transform(still)[:, :, 0], block_transform(still)[:, :, 1])


def test_half_the_size_of_the_sums_is_the_sums_of_half_the_size() -> None:
    pixels = clips(2, 9)
    small = block_transform(F.avg_pool3d(pixels, (1, 2, 2)))[:, SUMS]
    torch.testing.assert_close(F.avg_pool3d(block_transform(pixels), (1, 2, 2))[:, SUMS], small, atol=1e-4, rtol=1e-4)


def test_what_moves_changes_its_latents_little_at_a_time() -> None:
    latents = block_transform(clips(32, 121))[:, :, 1:]
    change = latents.diff(dim=2).square().mean() / latents.var()
    assert change < 0.25


def test_latents_are_of_unit_size_in_the_middle_of_the_published_scales() -> None:
    pixels = clips(32, 17)
    assert 0.8 < block_transform(pixels).square().mean().sqrt() < 1.25
    scaled = transformer_latents(pixels)
    image, video = scaled[:, :, 0].std(), scaled[:, :, 1:].std()
    assert 0.7 < float(image * video) < 1.4
    assert 0.8 * GAIN < vae_latents(pixels).std() < 1.25 * GAIN


def test_mean_frames_show_what_the_latents_were_made_of() -> None:
    pixels = clips(4, 17)
    units = torch.stack([pixels[:, :, 0], pixels[:, :, 1:9].mean(2), pixels[:, :, 9:].mean(2)], dim=2)
    assert (mean_frames(transformer_latents(pixels)) - units).square().mean() < 0.02 * units.var()
