"""Have a model go on from real clips, for its further training: `python -m tools.shapes.rollouts --latents DIR`.

Worn shapes (`wear.py`) are a guess at what a model gets wrong; this is what it does get wrong. The rollouts are written
beside the clips as further ones whose worn latents are the model's own, so that the training shows what the model made
and asks for what should have come (DAgger, arXiv 1011.0686). A shape that stays still is left to the model from its
second unit to its last. All else is put right every few units: it goes at a speed that the model cannot know
beforehand, and asked to leap to where the clip has it, a model would learn to trust no history and to draw something
between.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyramid_serve.pyramid_flow.sampler import SamplingSettings
from tools.shapes.draw import LatentClips, read_files
from tools.shapes.evaluate import CHECKPOINT, Model, default_settings, make_latents
from tools.shapes.training import save_state

logger = logging.getLogger(__name__)

NUM_STEPS = (4, 4, 4)
"""A little fewer than in use: the same errors, a little larger."""
NUM_UNITS = 4


def settings_of(model: Model) -> SamplingSettings:
    return replace(default_settings(model.able, has_image=False), video_num_inference_steps=NUM_STEPS)


def roll_out(model: Model, clips: LatentClips, chosen: list[int], *, num_units: int, seed: int) -> Tensor:
    """What the model makes of each clip (N, 16, T, h, w), put right before every `num_units` units."""
    latents = clips.latents[chosen].float()
    prompts = [clips.prompts[index][0] for index in chosen]
    settings, seeds = settings_of(model), range(seed, seed + len(chosen))
    num_latent_frames = latents.shape[2]
    made = latents[:, :, :1]
    for first in range(1, num_latent_frames, num_units):
        last = min(first + num_units, num_latent_frames)
        gone_on = make_latents(
            model,
            prompts,
            seeds,
            settings=settings,
            num_latent_frames=last,
            histories=list(latents[:, :, :first].unbind()),
        )
        made = torch.cat([made, gone_on[:, :, first:]], dim=2)
    return made


def write_file(path: Path, model: Model, clips: LatentClips, chosen: list[int], *, seed: int) -> None:
    parts = []
    for is_still in (True, False):
        part = [index for index in chosen if (clips.drawn[index][1] == "stays still") is is_still]
        if part:
            num_units = clips.latents.shape[2] if is_still else NUM_UNITS
            parts.append((part, roll_out(model, clips, part, num_units=num_units, seed=seed)))
    order = [index for part, _ in parts for index in part]
    state = {
        "latents": clips.latents[order],
        "worn": torch.cat([made for _, made in parts]).half(),
        "prompts": [clips.prompts[index] for index in order],
        "drawn": [clips.drawn[index] for index in order],
    }
    save_state(path, state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=Path, required=True, help="what tools.shapes.draw wrote")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--files", type=int, nargs=2, default=(0, 16), help="the first, and the one after the last")
    parser.add_argument("--clips", type=int, default=16, help="in a file")
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    model = Model.load(args.checkpoint, torch.bfloat16)
    clips = read_files(args.latents, "clips")
    for index in range(*args.files):
        path = args.latents / f"rollouts_{index:03d}.pt"
        if not path.exists():
            rng = np.random.default_rng((args.seed, index))
            chosen = rng.choice(len(clips.prompts), size=args.clips, replace=False, p=clips.chances).tolist()
            write_file(path, model, clips, chosen, seed=args.seed + 1000 * index)
            logger.info("wrote %s", path.name)


if __name__ == "__main__":
    main()
