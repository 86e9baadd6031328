"""Have a model go on from real clips, for its further training: `python -m tools.shapes.rollouts --latents DIR`.

Worn shapes (`wear.py`) are a guess at what a model gets wrong; this is what it does get wrong. The rollouts are written
beside the clips as further ones whose worn latents are the model's own, so that the training shows what the model made
and asks for what should have come (DAgger, arXiv 1011.0686).

What should have come must follow from what is seen, or a model learns to trust no history and to draw something
between. So a shape that stays still is left to the model from its second unit to its last; so is one that spins, and
what is asked for goes on from the angle that the model has it at; all else is put right every few units, for it goes
at a speed that the model cannot know beforehand.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyramid_serve.pyramid_flow.settings import SamplingSettings
from pyramid_serve.pyramid_flow.shapes import TEMPORAL_FACTOR
from tools.shapes.draw import PROMPTS_PER_CLIP, latents_of, sample_scenes
from tools.shapes.evaluate import CHECKPOINT, Model, default_settings, make_latents
from tools.shapes.judge import FOLDS, corners
from tools.shapes.latents import mean_frames
from tools.shapes.scenes import MOTIONS, Scene, render, sample_prompt
from tools.shapes.training import save_state

logger = logging.getLogger(__name__)

NUM_STEPS = (4, 4, 4)
"""A little fewer than in use: the same errors, a little larger."""
NUM_UNITS = 4
"""After which what moves, grows or shrinks is put right."""
MEMORY = 0.25
"""How much the angle seen in a unit counts in the next: where corners are hardly seen, those before tell it."""


def settings_of(model: Model) -> SamplingSettings:
    return replace(default_settings(model.able, has_image=False), video_num_inference_steps=NUM_STEPS)


def roll_out(model: Model, clips: Tensor, prompts: Sequence[str], *, num_units: int, seed: int) -> Tensor:
    """What the model makes of each clip (N, 16, T, h, w) from its first unit on, put right before every `num_units`."""
    settings, seeds = settings_of(model), range(seed, seed + len(clips))
    num_latent_frames = clips.shape[2]
    made = clips[:, :, :1]
    for first in range(1, num_latent_frames, num_units):
        last = min(first + num_units, num_latent_frames)
        gone_on = make_latents(
            model,
            prompts,
            seeds,
            settings=settings,
            num_latent_frames=last,
            histories=list(clips[:, :, :first].unbind()),
        )
        made = torch.cat([made, gone_on[:, :, first:].to(made)], dim=2)
    return made


def corners_of_units(latents: Tensor, shape: str) -> NDArray[np.complex128]:
    """`corners` of each unit (T,) of latents (16, T, h, w), in the mean of its frames."""
    frames = mean_frames(latents[None])[0].permute(1, 2, 3, 0)
    return corners((frames * 127.5 + 127.5).numpy(), shape)


def turned_after(own: NDArray[np.complex128], true: NDArray[np.complex128], shape: str) -> Tensor:
    """How far a clip is to be turned in each unit (T,) to go on from the angle that the unit before it was seen at.

    own, true: the corners of what was made and of the clip (T,). Radians, clockwise; the smallest of those that look
    alike.
    """
    turns, seen = [0.0], 0.0 + 0.0j
    for ahead in (own * true.conj())[:-1]:
        seen = ahead + MEMORY * seen
        turns.append(-float(np.angle(seen)) / FOLDS[shape])
    return torch.tensor(turns)


def is_left_alone(scene: Scene) -> bool:
    """Whether a clip is left to the model up to its last unit."""
    return scene.motion in ("stays still", "spins")


def write_file(path: Path, model: Model, scenes: Sequence[Scene], *, seed: int) -> None:
    rng = np.random.default_rng((seed, 1))
    scenes = sorted(scenes, key=is_left_alone)
    prompts = [[sample_prompt(scene, rng) for _ in range(PROMPTS_PER_CLIP)] for scene in scenes]
    clips = latents_of(map(render, scenes)).float()
    num_put_right, num_latent_frames = len(scenes) - sum(map(is_left_alone, scenes)), clips.shape[2]
    made = clips.clone()
    for part, num_units in (
        (slice(0, num_put_right), NUM_UNITS),
        (slice(num_put_right, len(scenes)), num_latent_frames),
    ):
        if scenes[part]:
            first = [own[0] for own in prompts[part]]
            made[part] = roll_out(model, clips[part], first, num_units=num_units, seed=seed + part.start)
    depths = []
    for index, scene in enumerate(scenes):
        if scene.is_seen_to_spin:
            own, true = (corners_of_units(latents, scene.shape) for latents in (made[index], clips[index]))
            depths.append(np.abs(own) / np.abs(true))
            of_frames = turned_after(own, true, scene.shape).repeat_interleave(TEMPORAL_FACTOR)[TEMPORAL_FACTOR - 1 :]
            clips[index] = latents_of([render(scene, turned=of_frames)])[0].float()
    if depths:
        by_unit = " ".join(f"{depth:.2f}" for depth in np.mean(depths, axis=0))
        logger.info("%d spin; depth of corners over the true one, by unit: %s", len(depths), by_unit)
    state = {
        "latents": clips.half(),
        "worn": made.half(),
        "prompts": prompts,
    }
    save_state(path, state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=Path, required=True, help="where tools.shapes.draw wrote the clips")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--files", type=int, nargs=2, default=(0, 16), help="the first, and the one after the last")
    parser.add_argument("--clips", type=int, default=16, help="in a file")
    parser.add_argument("--motions", nargs="+", choices=MOTIONS, default=MOTIONS, metavar="MOTION")
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    model = Model.load(args.checkpoint, device=args.device)
    for index in range(*args.files):
        path = args.latents / f"rollouts_{index:03d}.pt"
        if not path.exists():
            seed = args.seed + 1000 * index
            scenes = sample_scenes(args.clips, np.random.default_rng((seed, 0)), motions=args.motions)
            write_file(path, model, scenes, seed=seed)
            logger.info("wrote %s", path.name)


if __name__ == "__main__":
    main()
