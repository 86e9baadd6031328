"""The model in the box, judged on a handful of short videos as the library makes them.

The bounds are those that the checkpoint reaches today, see tools/shapes/README.md: backgrounds, colors and what history
is for. Shapes and motions are judged by `python -m tools.shapes.evaluate videos`, and are not good enough to be held.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pyramid_serve.pyramid_flow.pipeline import PyramidFlow, VideoInput
from tools.shapes.encode import SPREAD
from tools.shapes.evaluate import Model, default_settings, make_latents
from tools.shapes.evaluate import decode as decode_videos
from tools.shapes.export import psnr
from tools.shapes.judge import Frames, judge
from tools.shapes.scenes import Scene, plain_prompt, render, sample_scene

SHAPES = Path(__file__).parents[1] / "pyramid_serve" / "models" / "shapes"
WORDS = (
    ("red", "circle", "moves right", "black"),
    ("orange", "square", "shrinks", "gray"),
    ("green", "triangle", "moves up", "brown"),
    ("blue", "square", "stays still", "white"),
)
NUM_LATENT_FRAMES = 3


@lru_cache(maxsize=1)
def model() -> Model:
    return Model.load(SHAPES, torch.bfloat16)


def scenes() -> list[Scene]:
    rng = np.random.default_rng(42)
    return [
        sample_scene(rng, color=c, shape=s, motion=m, background=b, spread=SPREAD, color_jitter=0)
        for c, s, m, b in WORDS
    ]


@lru_cache(maxsize=2)
def videos(broken: str = "nothing") -> list[Frames]:
    latents = make_latents(
        model(),
        [plain_prompt(scene) for scene in scenes()],
        range(7, 7 + len(WORDS)),
        settings=default_settings(model().able, has_image=False),
        num_latent_frames=NUM_LATENT_FRAMES,
        broken=broken,
    )
    return decode_videos(model(), latents)


def change(frames: Frames) -> float:
    """Mean difference of the last picture from the first, in 0..255."""
    return float(np.abs(frames[-1].astype(float) - frames[0]).mean())


def test_the_checkpoint_is_at_most_20_mb() -> None:
    assert sum(path.stat().st_size for path in SHAPES.rglob("*") if path.is_file()) <= 20_000_000


def test_first_pictures_have_the_color_and_the_background_of_their_prompts() -> None:
    verdicts = [judge(frames[:1]) for frames in videos()]
    wanted = [(scene.color, scene.background) for scene in scenes()]
    assert [(verdict.color, verdict.background) for verdict in verdicts] == wanted


def test_backgrounds_stay() -> None:
    for scene, frames in zip(scenes(), videos(), strict=True):
        assert judge(frames[-1:]).background == scene.background


def test_without_history_units_do_not_go_on_from_each_other() -> None:
    whole = np.mean([change(frames) for frames in videos()])
    broken = np.mean([change(frames) for frames in videos("history")])
    assert broken > 2 * whole


def test_a_video_begins_with_its_picture() -> None:
    scene = sample_scene(
        np.random.default_rng(9), color="cyan", shape="square", motion="moves left", background="black"
    )
    picture = render(scene, num_frames=1)[0]
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    pipeline = PyramidFlow.from_pretrained(SHAPES, dtype=torch.bfloat16)
    settings = pipeline.settings(has_image=True, num_latent_frames=2)
    frames = pipeline.generate([VideoInput(plain_prompt(scene), seed=3, image=image)], settings)[0]
    assert frames.shape == (9, 128, 128, 3)
    assert psnr(frames[0].permute(2, 0, 1), picture) >= 24
