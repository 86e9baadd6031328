"""Worn shapes: what histories show in training, beside the clips themselves."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tools.shapes import draw
from tools.shapes.scenes import MOTIONS, SHAPES, SIZE, Scene, render, sample_scene
from tools.shapes.train_transformer import WORN_HISTORIES, corrupted_history
from tools.shapes.wear import render_worn, sample_wear


def scenes(num: int) -> list[Scene]:
    rng = np.random.default_rng(0)
    return [sample_scene(rng, shape=SHAPES[i % 4], motion=MOTIONS[(i // 4) % 8]) for i in range(num)]


def test_a_worn_shape_without_strength_is_the_shape_itself() -> None:
    rng = np.random.default_rng(2)
    for scene in scenes(8):
        wear = replace(sample_wear(rng, scene), strength=(0.0, 0.0))
        worn, whole = render_worn(scene, wear, num_frames=3), render(scene, num_frames=3)
        assert (
            worn.float() - whole.float()
        ).abs().mean() < 0.2  # its place and size are measured, so edges may be off by a little


def test_worn_shapes_stay_where_they_were_and_keep_their_area() -> None:
    """Else what mends them would move them or change their size, unit after unit."""

    def cover_of(frames: Tensor) -> Tensor:
        return frames[0, 0].double() / 200

    rng = np.random.default_rng(3)
    places = torch.arange(SIZE, dtype=torch.float64)
    for scene in scenes(32):
        scene = replace(scene, start=(64.0, 64.0), start_radius=26.0, background_rgb=(0.0,) * 3, color_rgb=(200.0,) * 3)
        wear = replace(sample_wear(rng, scene), strength=(1.0, 1.0), fading=0.0, growth=0.0)
        whole, worn = cover_of(render(scene, num_frames=1)), cover_of(render_worn(scene, wear, num_frames=1))
        assert (whole - worn).abs().sum() > 0.02 * whole.sum()
        assert worn.sum().item() == pytest.approx(whole.sum().item(), rel=0.025)
        for axis in (0, 1):
            centres = [float((cover.sum(axis) * places).sum() / cover.sum()) for cover in (whole, worn)]
            assert centres[1] == pytest.approx(centres[0], abs=0.25)


def test_what_spins_is_worn_toward_a_circle_at_its_own_angle_and_no_shape_toward_itself() -> None:
    rng = np.random.default_rng(4)
    for scene in scenes(64):
        wear = sample_wear(rng, scene)
        is_spin = scene.motion == "spins" and scene.shape != "circle"
        assert (wear.tilt == 0.0) == is_spin
        assert max(wear.strength) <= (0.5 if is_spin else 1.0)
        assert max(wear.strength) * wear.other_share <= (0.9 if is_spin else 1.0)
        assert wear.other == "circle" or not is_spin
        assert wear.other != scene.shape


def test_a_chipped_shape_lacks_one_of_its_corners() -> None:
    rng = np.random.default_rng(5)
    scene = sample_scene(rng, shape="star", motion="stays still", color="white", background="black", color_jitter=0)
    scene = replace(scene, start=(64.0, 64.0), start_radius=40.0, end_radius=40.0, angle=0.0)
    wear = replace(
        sample_wear(rng, scene),
        strength=(1.0, 1.0),
        stretch=0.0,
        waves=(),
        other_share=0.0,
        tilt=0.0,
        softness=0.0,
        fading=0.0,
        growth=0.0,
        chipped_corner=0,
        chip=0.6,
    )
    worn = render_worn(scene, wear, num_frames=1)[0, 0].float()
    background, color = scene.background_rgb[0], scene.color_rgb[0]
    rows = ((worn - background) / (color - background) > 0.5).any(dim=1).nonzero().flatten()
    assert rows[0] > 64 - 32  # the upper corner, which was at 64 - 40
    assert rows[-1] > 64 + 27  # the lower ones, at 40 cos 36 degrees, moved up with the centre


def test_what_keeps_its_size_is_worn_in_size_more_and_more_and_what_changes_it_is_not() -> None:
    rng = np.random.default_rng(6)
    for scene in scenes(64):
        keeps = scene.motion not in ("grows", "shrinks")
        wear = sample_wear(rng, scene)
        assert (wear.growth != 0.0) == keeps
        if scene.motion == "stays still":
            wear = replace(wear, strength=(0.0, 0.0), growth=-0.3)
            worn, whole = render_worn(scene, wear, num_frames=121), render(scene)
            off = [(worn[i].float() - whole[i].float()).abs().mean().item() for i in (0, 60, 120)]
            assert off[0] < 0.2 < off[1] < off[2]


def test_whole_histories_are_worn_or_none_of_them_is() -> None:
    clean, worn = torch.zeros(400, 16, 2, 8, 8), torch.full((400, 16, 2, 8, 8), 50.0)
    levels = corrupted_history(clean, worn, torch.Generator().manual_seed(0))
    assert [level.shape[3] for level in levels] == [2, 4, 8]
    is_worn = [level.mean(dim=(1, 2, 3, 4)) > 25 for level in levels]
    assert torch.equal(is_worn[0], is_worn[2]) and torch.equal(is_worn[1], is_worn[2])
    assert float(is_worn[2].float().mean()) == pytest.approx(WORN_HISTORIES, abs=0.1)
    rest = (levels[2] - 50 * is_worn[2].float().view(-1, 1, 1, 1, 1)).std(dim=(1, 2, 3, 4))
    assert float(rest.mean()) > 0.05 and float(rest.max()) < 0.4  # the noise
    again = corrupted_history(clean, worn, torch.Generator().manual_seed(0))
    assert all(torch.equal(one, other) for one, other in zip(levels, again, strict=True))


def test_drawn_clips_come_with_worn_ones_and_pictures_alone(tmp_path: Path) -> None:
    draw.write_file(tmp_path / "clips_000.pt", num_clips=2, num_frames=9, seed=1)
    draw.write_file(tmp_path / "pictures_000.pt", num_clips=3, num_frames=1, seed=1)
    clips, pictures = draw.read_files(tmp_path, "clips"), draw.read_files(tmp_path, "pictures")
    assert clips.worn is not None and clips.worn.shape == clips.latents.shape == (2, 16, 2, 16, 16)
    assert not torch.equal(clips.worn, clips.latents)
    assert pictures.worn is None and pictures.latents.shape == (3, 16, 1, 16, 16)
    torch.save({"latents": clips.latents, "prompts": clips.prompts}, tmp_path / "clips_001.pt")
    with pytest.raises(ValueError, match="worn"):
        draw.read_files(tmp_path, "clips")
