"""The judge of moving shapes, on real clips and on broken ones."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pyramid_serve.media.writers import write_video
from tools.shapes.judge import Frames, agrees, judge, read_frames, scenes_in_turn
from tools.shapes.scenes import BACKGROUNDS, COLORS, MOTIONS, SHAPES, Scene, render, sample_scene


def every_eighth_frame(scene: Scene) -> Frames:
    frames: Frames = render(scene)[::8].permute(0, 2, 3, 1).numpy()
    return frames


def test_the_judge_is_right_on_real_clips() -> None:
    for scene in scenes_in_turn(64, seed=2):
        verdict = judge(every_eighth_frame(scene))
        assert all(agrees(verdict, scene).values()), (scene, verdict)
        assert verdict.is_whole


def test_the_judge_is_right_on_soft_and_noisy_pictures() -> None:
    generator = torch.Generator().manual_seed(0)
    for scene in scenes_in_turn(32, seed=3):
        frames = torch.from_numpy(every_eighth_frame(scene)).permute(0, 3, 1, 2).float()
        soft = F.avg_pool2d(F.pad(frames, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
        noisy = soft + 8 * torch.randn(soft.shape, generator=generator)
        verdict = judge(noisy.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy())
        assert all(agrees(verdict, scene).values()), (scene, verdict)


@pytest.mark.parametrize("name", ["video.mp4", "video.gif", "frames"])
def test_files_are_judged_as_the_frames_that_they_are_made_of(name: str, tmp_path: Path) -> None:
    for scene in scenes_in_turn(8, seed=4):
        frames = render(scene)[::8].permute(0, 2, 3, 1)
        path = tmp_path / f"{scene.shape}-{scene.motion}-{name}"
        write_video(frames, path, fps=24)
        read = read_frames(path)
        assert read.shape == frames.shape
        seen, verdict = judge(read), judge(frames.numpy())
        assert verdict.motion == scene.motion or scene.shape == "circle"
        words = ("shape", "color", "background", "motion", "is_whole")
        assert [getattr(seen, word) for word in words] == [getattr(verdict, word) for word in words], scene


def test_a_spinning_circle_counts_as_still() -> None:
    scene = sample_scene(np.random.default_rng(0), shape="circle", motion="spins")
    verdict = judge(every_eighth_frame(scene))
    assert verdict.motion == "stays still"
    assert agrees(verdict, scene)["motion"]


@pytest.mark.parametrize("shape", ["triangle", "square", "star"])
def test_turns_are_told_in_degrees_clockwise(shape: str) -> None:
    scene = sample_scene(np.random.default_rng(0), shape=shape, motion="spins")
    assert judge(every_eighth_frame(scene)).turn == pytest.approx(np.degrees(scene.turn), rel=0.05)
    back = replace(scene, turn=-scene.turn)
    assert judge(every_eighth_frame(back)).turn == pytest.approx(-np.degrees(scene.turn), rel=0.05)


def test_an_empty_video_has_no_shape() -> None:
    verdict = judge(np.full((4, 128, 128, 3), 128, dtype=np.uint8))
    assert (verdict.shape, verdict.background, verdict.is_whole) == ("none", "gray", False)


def test_a_star_that_loses_a_point_is_not_whole() -> None:
    scene = sample_scene(np.random.default_rng(0), color="red", shape="star", motion="stays still", background="black")
    frames = every_eighth_frame(scene)
    x, y = (round(place) for place in scene.start)
    tip = round(scene.start_radius)
    frames[5:8, y - tip - 3 : y - round(0.45 * tip), x - tip : x + tip] = frames[0, 0, 0]
    verdict = judge(frames)
    assert (verdict.shape, verdict.is_whole) == ("star", False)


def test_a_shape_that_leaves_the_picture_is_not_whole() -> None:
    scene = sample_scene(np.random.default_rng(0), shape="square", motion="moves right")
    gone = replace(scene, end=(scene.end[0] + 70, scene.end[1]))
    assert not judge(every_eighth_frame(gone)).is_whole


def test_a_shape_that_changes_kind_is_not_whole() -> None:
    scene = sample_scene(np.random.default_rng(0), shape="star", motion="stays still")
    frames = every_eighth_frame(scene)
    frames[-3:] = every_eighth_frame(replace(scene, shape="circle"))[-3:]
    assert not judge(frames).is_whole


def test_frames_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="float32"):
        judge(np.zeros((1, 8, 8, 3), dtype=np.float32))  # type: ignore[arg-type]


def test_scenes_in_turn_show_every_word_equally_often() -> None:
    scenes = scenes_in_turn(256, seed=0)
    for name, words in (("shape", SHAPES), ("motion", MOTIONS), ("color", COLORS)):
        counts = [sum(getattr(scene, name) == word for scene in scenes) for word in words]
        assert len(set(counts)) == 1, (name, counts)
    counts = [sum(scene.background == word for scene in scenes) for word in BACKGROUNDS]
    assert min(counts) > 40
    assert len({(scene.shape, scene.motion, scene.color) for scene in scenes}) > 200
