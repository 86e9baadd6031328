"""The drawn clips and their prompts."""

import numpy as np
import pytest
import torch

from tools.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    MOTIONS,
    MOVING_MARGIN,
    SHAPES,
    SIZE,
    Scene,
    plain_prompt,
    render,
    sample_prompt,
    sample_scene,
)


def scenes(num: int) -> list[Scene]:
    rng = np.random.default_rng(0)
    return [sample_scene(rng, shape=SHAPES[i % 4], motion=MOTIONS[(i // 4) % 8]) for i in range(num)]


def test_a_shape_is_whole_in_view_from_the_first_frame_to_the_last() -> None:
    for scene in scenes(64):
        for frame in (0, 60, 120):
            picture = render(scene, num_frames=1, first_frame=frame)[0].float()
            border = torch.cat([picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]], dim=1)
            assert torch.equal(border, picture[:, :1, :1].squeeze(2).expand_as(border)), (scene, frame)
            assert (picture != picture[:, :1, :1]).any()


def test_a_shape_that_moves_keeps_further_from_the_border() -> None:
    for scene in scenes(256):
        if scene.motion.startswith("moves"):
            centers, radius = np.array([scene.start, scene.end]), scene.start_radius
            assert (centers - radius).min() >= MOVING_MARGIN - 1e-6, scene
            assert (centers + radius).max() <= SIZE - MOVING_MARGIN + 1e-6, scene
            assert 30 - 1e-6 <= np.abs(centers[1] - centers[0]).max() <= 42 + 1e-6, scene


def test_a_shape_never_has_the_color_of_its_background() -> None:
    assert all(scene.color != scene.background for scene in scenes(500))
    with pytest.raises(ValueError, match="color='white'"):
        sample_scene(np.random.default_rng(0), color="white", background="white")


def test_a_crop_is_the_part_of_the_whole_picture() -> None:
    scene = scenes(1)[0]
    whole = render(scene, num_frames=3, first_frame=5)
    part = render(scene, num_frames=3, first_frame=5, box=(16, 40, 32, 48))
    assert whole.shape == (3, 3, SIZE, SIZE)
    assert torch.equal(part, whole[:, :, 16:48, 40:88])


def test_edges_are_antialiased() -> None:
    scene = sample_scene(np.random.default_rng(1), shape="circle", color="white", background="black", color_jitter=0)
    values = render(scene, num_frames=1).unique()
    assert len(values) > 20


def test_the_same_seed_gives_the_same_clip_and_words() -> None:
    first, second = (np.random.default_rng(4) for _ in range(2))
    assert sample_scene(first) == sample_scene(second)
    scene = scenes(1)[0]
    assert sample_prompt(scene, first) == sample_prompt(scene, second)


def test_every_color_shape_motion_and_background_is_drawn() -> None:
    drawn = scenes(600)
    assert {scene.color for scene in drawn} == set(COLORS)
    assert {scene.background for scene in drawn} == set(BACKGROUNDS)


def test_the_plain_prompt_names_the_four_words() -> None:
    rng = np.random.default_rng(0)
    scene = sample_scene(rng, color="red", shape="circle", motion="moves right", background="black")
    assert plain_prompt(scene) == "a red circle moves right on a black background"
    assert len({sample_prompt(scene, rng) for _ in range(100)}) > 20
