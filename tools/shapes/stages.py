"""Which stage a model's errors come from: `python -m tools.shapes.stages`.

Makes single units of real clips after their true histories, without guidance: as always, and with the truth put in
place of what one of the lower stages leaves. Where that helps, that stage is to blame. Prints mean squared errors of
the unit's latents over their variance in the picture, for each shape and motion.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from pyramid_serve.pyramid_flow import sampler, schedule
from pyramid_serve.pyramid_flow.noise import SeededNoise
from pyramid_serve.pyramid_flow.sampler import denoise_unit, run_units
from pyramid_serve.pyramid_flow.shapes import LatentShape
from tools.shapes.evaluate import CHECKPOINT, Model, default_settings
from tools.shapes.judge import scenes_in_turn
from tools.shapes.latents import transformer_latents
from tools.shapes.scenes import SIZE, Scene, plain_prompt, render, to_pixels
from tools.shapes.teacher_forcing import pyramid

logger = logging.getLogger(__name__)

TRUE_STAGES = (None, 0, 1)


@torch.inference_mode()
def unit_errors(model: Model, scene: Scene, units: Sequence[int], *, seed: int) -> list[float]:
    """Errors for each of `TRUE_STAGES`, the mean over `units`, each made after its true history."""
    settings = replace(default_settings(model.able, has_image=False), video_guidance_scale=1.0)
    shape = LatentShape.of_pixels(height=SIZE, width=SIZE, num_latent_frames=max(units) + 1)
    prompt, negative = model.text_encoder.encode([plain_prompt(scene), model.able.negative_prompt])
    (clip,) = transformer_latents(to_pixels(render(scene).transpose(0, 1).unsqueeze(0)))

    errors: list[list[float]] = [[] for _ in TRUE_STAGES]
    for unit in units:
        truth = clip[:, unit : unit + 1]
        for true_stage, found in zip(TRUE_STAGES, errors, strict=True):
            steps = denoise_unit(
                prompt, negative, clip[:, :unit], settings=settings, noise=SeededNoise(seed + unit, shape)
            )
            with _true(true_stage, truth, seed):
                (made,) = run_units(model.predict, [steps])
            found.append(float((made - truth).square().mean() / truth.var(dim=(2, 3)).mean()))
    return [float(np.mean(found)) for found in errors]


def _true(true_stage: int | None, truth: Tensor, seed: int) -> AbstractContextManager[object]:
    """Leave stage `true_stage` with the true unit (C, 1, H, W), at the noise level at which the stage ends."""
    if true_stage is None:
        return nullcontext()
    enter_stage, end = schedule.enter_stage, schedule.stage(true_stage).end
    level = pyramid(truth.unsqueeze(0))[true_stage][0]
    noise = torch.randn(level.shape, generator=torch.Generator().manual_seed(seed))

    def enter(latents: Tensor, block_noise: Tensor, index: int) -> Tensor:
        latents = end * noise + (1 - end) * level if index == true_stage + 1 else latents
        return enter_stage(latents, block_noise, index)

    return patch.object(sampler, "enter_stage", enter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--count", type=int, default=32, help="clips, words in turn")
    parser.add_argument("--units", type=int, nargs="+", default=(1, 4, 9))
    parser.add_argument("--seed", type=int, default=200)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = Model.load(args.checkpoint)
    rows: dict[str, list[list[float]]] = {}
    for index, scene in enumerate(scenes_in_turn(args.count, args.seed)):
        errors = unit_errors(model, scene, args.units, seed=args.seed + 100 * index)
        for name in (scene.shape, scene.motion, "all"):
            rows.setdefault(name, []).append(errors)
    logger.info("%-12s %9s %9s %9s", "", "as made", "0 true", "1 true")
    for name, found in rows.items():
        logger.info("%-12s %9.3f %9.3f %9.3f", name, *np.mean(found, axis=0))


if __name__ == "__main__":
    main()
