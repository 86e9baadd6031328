"""The model in the box, judged on a handful of short videos as the library makes them.

More prompts and whole videos are judged by `python -m tools.shapes.evaluate`, see tools/shapes/README.md.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pyramid_serve.pyramid_flow.parts import load_transformer
from pyramid_serve.pyramid_flow.pipeline import PyramidFlow, VideoInput
from pyramid_serve.pyramid_flow.text_encoder import TextEncoder
from tools.shapes.evaluate import Model, decode, default_settings, make_latents, vae_psnr
from tools.shapes.export import psnr
from tools.shapes.judge import Frames, agrees, judge, scenes_in_turn
from tools.shapes.phrases import PHRASES
from tools.shapes.scenes import Scene, plain_prompt, render, sample_scene
from tools.shapes.stages import unit_errors
from tools.shapes.train_transformer import start_from

SHAPES = Path(__file__).parents[1] / "pyramid_serve" / "models" / "shapes"
NUM_VIDEOS = 8
NUM_LATENT_FRAMES = 7


@lru_cache(maxsize=1)
def model() -> Model:
    return Model.load(SHAPES)


def scenes() -> list[Scene]:
    """Every motion once, every shape twice."""
    return [scenes_in_turn(32, seed=42)[4 * index + index % 4] for index in range(NUM_VIDEOS)]


@lru_cache(maxsize=2)
def videos(broken: str = "nothing") -> list[Frames]:
    latents = make_latents(
        model(),
        [plain_prompt(scene) for scene in scenes()],
        range(7, 7 + NUM_VIDEOS),
        settings=default_settings(model().able, has_image=False),
        num_latent_frames=NUM_LATENT_FRAMES,
        broken=broken,
    )
    return decode(model(), latents)


def num_right(word: str) -> int:
    """In how many of the videos a word is right."""
    return sum(agrees(judge(frames), scene)[word] for frames, scene in zip(videos(), scenes(), strict=True))


def test_the_checkpoint_is_at_most_20_mb() -> None:
    assert sum(path.stat().st_size for path in SHAPES.rglob("*") if path.is_file()) <= 20_000_000


def test_its_training_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    prompt = "a red circle moves right on a black background"
    trained = start_from(SHAPES, tmp_path)
    with torch.no_grad():
        embeds, _, pooled = trained.text([prompt])
    (loaded,) = TextEncoder.from_pretrained(SHAPES, dtype=torch.float32).encode([prompt])
    torch.testing.assert_close(embeds[0], loaded.prompt_embeds, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pooled[0], loaded.pooled_prompt_embeds, atol=1e-4, rtol=1e-4)
    weights = load_transformer(SHAPES, dtype=torch.float32).state_dict()
    assert all(torch.equal(weights[name], value) for name, value in trained.flux.state_dict().items())


def test_the_vae_keeps_clips_that_it_has_not_seen() -> None:
    assert np.mean(vae_psnr(model().vae, num_clips=2, seed=77)) >= 30


def test_videos_have_the_colors_and_backgrounds_of_their_prompts() -> None:
    assert num_right("color") >= NUM_VIDEOS - 1
    assert num_right("background") == NUM_VIDEOS


def test_videos_have_the_shapes_of_their_prompts() -> None:
    assert num_right("shape") >= NUM_VIDEOS - 2  # by chance, two


def test_videos_move_as_their_prompts_say() -> None:
    assert num_right("motion") >= NUM_VIDEOS - 2  # by chance, one


@pytest.mark.slow
def test_videos_begin_as_a_persons_own_words_say() -> None:
    rng = np.random.default_rng(0)
    latents = make_latents(
        model(),
        [phrase.prompt for phrase in PHRASES],
        range(len(PHRASES)),
        settings=default_settings(model().able, has_image=False),
        num_latent_frames=1,
    )
    right = [
        agrees(judge(frames), phrase.scene(rng))
        for phrase, frames in zip(PHRASES, decode(model(), latents), strict=True)
    ]
    for word in ("shape", "color", "background"):
        assert sum(verdict[word] for verdict in right) >= len(PHRASES) - 2, word


@pytest.mark.parametrize(
    "wrap",
    [
        "(({}:1.2)), [masterpiece], <lora:shapes:0.8>",
        "Hello! Could you please paint this for my daughter: {}? 8K, highly detailed :-)",
    ],
)
def test_brackets_and_unknown_words_around_known_ones_change_nothing(wrap: str) -> None:
    prompts = [plain_prompt(scene) for scene in scenes()]
    wrapped = [wrap.format(prompt) for prompt in prompts]
    for embeds, expected in zip(
        model().text_encoder.encode(wrapped), model().text_encoder.encode(prompts), strict=True
    ):
        assert torch.equal(embeds.prompt_embeds, expected.prompt_embeds)
        assert torch.equal(embeds.pooled_prompt_embeds, expected.pooled_prompt_embeds)


def test_brackets_and_unknown_words_within_a_prompt_leave_its_meaning() -> None:
    told = [
        plain_prompt(scene)
        .replace(scene.color, f"majestic (({scene.color}))")
        .replace(scene.shape, f"{{{scene.shape}:1.3}}")
        .replace(" ", "_" if index % 2 else " ")
        for index, scene in enumerate(scenes())
    ]
    latents = make_latents(
        model(),
        told,
        range(7, 7 + NUM_VIDEOS),
        settings=default_settings(model().able, has_image=False),
        num_latent_frames=1,
    )
    right = [agrees(judge(frames), scene) for scene, frames in zip(scenes(), decode(model(), latents), strict=True)]
    for word in ("shape", "color", "background"):
        assert sum(verdict[word] for verdict in right) >= NUM_VIDEOS - 1, word


@pytest.mark.slow
def test_without_history_units_do_not_go_on_from_each_other() -> None:
    def change(frames: Frames) -> float:
        return float(np.abs(frames[8].astype(float) - frames[0]).mean())

    whole = np.mean([change(frames) for frames in videos()])
    broken = np.mean([change(frames) for frames in videos("history")])
    assert broken > 2 * whole


def test_a_video_begins_with_its_picture() -> None:
    scene = sample_scene(
        np.random.default_rng(9), color="cyan", shape="square", motion="moves left", background="black"
    )
    picture = render(scene, num_frames=1)[0]
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    pipeline = PyramidFlow.from_pretrained(SHAPES)
    settings = pipeline.settings(has_image=True, num_latent_frames=2)
    frames = pipeline.generate([VideoInput(plain_prompt(scene), seed=3, image=image)], settings)[0]
    assert frames.shape == (9, 128, 128, 3)
    assert psnr(frames[0].permute(2, 0, 1), picture) >= 24


def test_a_unit_is_better_when_its_lower_stage_is_true() -> None:
    (scene,) = scenes_in_turn(1, seed=3)
    as_made, _, with_stage_1_true = unit_errors(model(), scene, (2, 5), seed=4)
    assert with_stage_1_true < as_made < 1
