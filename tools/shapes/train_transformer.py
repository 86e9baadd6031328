"""Train the transformer: `python -m tools.shapes.train_transformer --latents DIR --out dit.pt`.

The paper's objective (arXiv 2410.05954, 3.2 and 3.3): each stage is a flow of its own, from its start (the lower
stage's latents, upsampled, at the corrected noise level) to its end, both with the same noise; the target is start
minus end. Histories are corrupted with noise of up to 1/3, most of them show their shape worn (`wear.py`), what the
lower stage left is a little wrong too, and 10 % of prompts are dropped for guidance. Run it again with the same `--out`
to go on from its last state.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import Enum
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pyramid_serve.pyramid_flow import flux
from pyramid_serve.pyramid_flow.parts import load_transformer
from pyramid_serve.pyramid_flow.schedule import LAST_SIGMA, stage
from tools.shapes import teacher_forcing
from tools.shapes.draw import LatentClips
from tools.shapes.teacher_forcing import forward, pyramid
from tools.shapes.text import (
    WIDTH,
    TextEncoders,
    corpus,
    load_encoders,
    teach_words,
    write_clip_tokenizer,
    write_t5_tokenizer,
)
from tools.shapes.training import Options, Training, autocast
from tools.shapes.training_set import TrainingSet

CONFIG: dict[str, Any] = {
    "_class_name": "PyramidFluxTransformer",
    "num_layers": 2,
    "num_single_layers": 4,
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "axes_dims_rope": [16, 24, 24],
    "in_channels": 64,
    "patch_size": 1,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "interp_condition_pos": True,
    "use_temporal_causal": True,
    "use_flash_attn": False,
    "use_gradient_checkpointing": False,
}
MAX_CORRUPTION = 1 / 3
WORN_HISTORIES = 0.9
WORN_STARTS = 0.6
START_SHIFT = 2.5 / 64
"""Usual shift of what the lower stage left, where it is wrong most, over half the picture."""
START_GROWTH = 0.08  # logarithm
START_TURN = 0.15  # radians
MEAN_CONTRASTS = (0.09, 0.17, 0.33)
"""Variance over the picture of latents at each stage, the mean of channels and clips."""
NUM_WORD_STEPS = 400
NUM_COMPILING_STEPS = 10
REFRESH_EVERY = 100


class Units(Enum):
    """Which units of a clip a group is made of."""

    PICTURE = 0  # unit 0, of clips of one frame
    FIRST = 1  # unit 1, in which the prompt alone tells the motion: it has groups of its own, or it is not learnt
    LATER = 2  # any from unit 1


@dataclass(frozen=True)
class Group:
    """Part of a training batch: clips of one stage, and `num_units` units of each."""

    stage: int
    units: Units
    num_clips: int
    num_units: int = 1

    @property
    def is_picture(self) -> bool:
        return self.units is Units.PICTURE


GROUPS = (
    Group(2, Units.LATER, 13),
    Group(1, Units.LATER, 14, 2),
    Group(2, Units.PICTURE, 16),
    Group(2, Units.FIRST, 5),
    Group(1, Units.FIRST, 8),
    Group(1, Units.PICTURE, 14),
    Group(0, Units.LATER, 3, 8),
    Group(0, Units.FIRST, 6),
    Group(0, Units.PICTURE, 10),
)


class TextToVideo(nn.Module):
    """The transformer, and the text encoders that it reads; those are taught beforehand and stay as they are."""

    def __init__(self, tokenizers: Path) -> None:
        super().__init__()
        self.text = TextEncoders(tokenizers)
        self.flux = flux.from_config(CONFIG)


@torch.no_grad()
def initialize(model: TextToVideo) -> None:
    """adaLN-Zero: every block adds nothing yet, and the prediction is zero (arXiv 2212.09748)."""
    for name, module in model.flux.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if ".norm" in name or name.startswith("norm_out") or name == "proj_out":
                nn.init.zeros_(module.weight)


def is_hidden(name: str, param: nn.Parameter) -> bool:
    """Whether Muon steps a parameter: the blocks' matrices, but not embeddings, modulations or the output."""
    return param.ndim == 2 and "blocks." in name and ".norm" not in name


def noised(
    clean: Tensor, below: Tensor | None, index: int, sigma: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Units on their way through stage `index`, and the flow there, both (B, C, U, h, w).

    clean: the units at this stage; below: what the stage below left of them, at half the size, None at stage 0; sigma:
    the stage's own noise level (B, 1, 1, 1, 1), 1 at its start.
    """
    at = stage(index)
    noise = torch.randn(clean.shape, generator=generator, device=generator.device)
    left = torch.zeros_like(clean) if below is None else F.interpolate(below, scale_factor=(1, 2, 2), mode="nearest")
    start = at.start * noise + (1 - at.start) * left
    end = at.end * noise + (1 - at.end) * clean
    return sigma * start + (1 - sigma) * end, start - end


def misdrawn(units: Tensor, worn: Tensor, generator: torch.Generator) -> Tensor:
    """Units (B, C, U, H, W) as a lower stage may leave them: their shapes worn, shifted, too large or small, turned.

    A stage that only ever began at the truth trusts what it begins at, and keeps the lower stage's errors; one that
    began at errors like these looks at the history instead (conditioning augmentation, arXiv 2106.15282).
    """
    num_clips, _, num_units, height, width = units.shape
    num = num_clips * num_units
    device = generator.device
    share = torch.rand(num_clips, 1, num_units, 1, 1, generator=generator, device=device)
    share = share * (torch.rand(share.shape, generator=generator, device=device) < WORN_STARTS)
    pictures = rearrange(units + share * (worn - units), "b c u h w -> (b u) c h w")
    strength = torch.rand(num, 1, generator=generator, device=device)
    growth, turn, right, down = (strength * torch.randn(num, 4, generator=generator, device=device)).unbind(1)
    scale, turn = (-START_GROWTH * growth).exp(), START_TURN * turn
    across, along = scale * turn.cos(), scale * turn.sin()
    places = torch.stack([across, -along, START_SHIFT * right, along, across, START_SHIFT * down], dim=1).view(
        num, 2, 3
    )
    grid = F.affine_grid(places, [num, 1, height, width], align_corners=False)
    moved = F.grid_sample(pictures, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return rearrange(moved, "(b u) c h w -> b c u h w", u=num_units)


def choose_units(group: Group, num_frames: int, rng: np.random.Generator) -> list[int]:
    if group.units is not Units.LATER:
        return [group.units.value]
    return sorted(int(unit) for unit in rng.choice(np.arange(1, num_frames), size=group.num_units, replace=False))


def choose_sigmas(num: int, generator: torch.Generator) -> Tensor:
    """Noise levels (num,) of a stage. Nine in ten are above 0.1: below it a sampler of few steps takes but one."""
    low, share = torch.rand(2, num, generator=generator, device=generator.device)
    least = torch.where(low < 0.1, 0.0, 0.1)
    sigmas: Tensor = least + (1 - least) * share
    return sigmas


def corrupted_history(latents: Tensor, worn: Tensor, generator: torch.Generator) -> list[Tensor]:
    """What units see of the clips (B, C, T, H, W) before them, at all stages: worn in most, and with noise."""
    device = generator.device
    wear, strength = torch.rand(2, len(latents), 1, 1, 1, 1, generator=generator, device=device)
    latents = torch.where(wear < WORN_HISTORIES, worn, latents)
    corruption = MAX_CORRUPTION * strength.square()
    return [
        level + corruption * torch.randn(level.shape, generator=generator, device=device) for level in pyramid(latents)
    ]


def group_loss(
    model: TextToVideo,
    group: Group,
    clips: LatentClips,
    text: tuple[Tensor, Tensor, Tensor],
    chosen: Tensor,
    rng: np.random.Generator,
    generator: torch.Generator,
) -> Tensor:
    """Squared error of the flow: each clip's over its contrast, lest white on black drown blue on brown; all
    over the root of the flow's size, so that no stage drowns the others.
    """
    latents = clips.latents[chosen].float()
    units = choose_units(group, latents.shape[2], rng)
    sigma = choose_sigmas(group.num_clips, generator).view(-1, 1, 1, 1, 1)
    worn = None if clips.worn is None else clips.worn[chosen].float()
    clean = latents[:, :, units]
    levels = left = pyramid(clean)
    if worn is not None and group.stage > 0:  # pictures have no history to look at instead
        left = pyramid(misdrawn(clean, worn[:, :, units], generator))
    level, below = levels[group.stage], left[group.stage - 1] if group.stage > 0 else None
    current, flow = noised(level, below, group.stage, sigma, generator)
    at = stage(group.stage)
    share = (sigma.flatten() - LAST_SIGMA) / (1 - LAST_SIGMA)
    timesteps = at.last_timestep + (at.first_timestep - at.last_timestep) * share.clamp(min=0)
    history = [] if worn is None else corrupted_history(latents, worn, generator)
    with autocast(latents.device):
        prediction = forward(
            model.flux,
            stage=group.stage,
            units=units,
            noisy=current,
            history=history,
            timesteps=timesteps,
            prompt_embeds=text[0],
            prompt_mask=text[1],
            pooled=text[2],
        )
    errors = (prediction - flow).square().mean(dim=(1, 2, 3, 4))
    contrasts = level.var(dim=(3, 4)).mean(dim=(1, 2))
    errors = errors * MEAN_CONTRASTS[group.stage] / (contrasts + 0.1 * MEAN_CONTRASTS[group.stage])
    return errors.mean() / flow.square().mean().sqrt()


def train_step(
    model: TextToVideo,
    groups: Sequence[Group],
    training_set: TrainingSet,
    *,
    run: Callable[..., Iterable[Tensor]],
    seed: int,
    step: int,
) -> list[Tensor]:
    """Gradients of one step; the losses of its groups. `run` is `map`, or a pool's."""
    rng = np.random.default_rng((seed, step))
    sources = [training_set.pictures if group.is_picture else training_set.clips for group in groups]
    picked, rows = training_set.sample_rows(sources, [group.num_clips for group in groups], rng)
    chosen = [training_set.on_device(indices) for indices in picked]
    tokens = training_set.tokens[training_set.on_device(rows)].shortened(int(training_set.lengths[rows].max()))
    with torch.no_grad():
        embeds, pooled = model.text.encode(tokens)
    firsts = list(accumulate((group.num_clips for group in groups), initial=0))

    def take_group(index: int) -> Tensor:
        part = slice(firsts[index], firsts[index + 1])
        length = int(training_set.lengths[rows[part]].max())
        text = (embeds[part, :length], tokens.t5_mask[part, :length], pooled[part])
        own_rng = np.random.default_rng((seed, step, index))
        own_generator = torch.Generator(tokens.t5.device).manual_seed(int(own_rng.integers(2**63)))
        loss = group_loss(model, groups[index], sources[index].shown, text, chosen[index], own_rng, own_generator)
        loss.backward()
        return loss.detach()

    # Groups side by side, one thread each: far less waiting than threads inside of each small operation.
    return list(run(take_group, range(len(groups))))


def start_from(checkpoint: Path, tokenizers: Path) -> TextToVideo:
    """The model of a checkpoint that `export` wrote, with its tokenizers copied to where the training keeps them."""
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(checkpoint / name, tokenizers / name, dirs_exist_ok=True)
    model = TextToVideo(tokenizers)
    model.flux.load_state_dict(cast(nn.Module, load_transformer(checkpoint)).state_dict())
    model.text = load_encoders(checkpoint)
    return model


def start_anew(tokenizers: Path) -> TextToVideo:
    """A model that knows the words and nothing else yet."""
    write_clip_tokenizer(tokenizers / "tokenizer", corpus())
    write_t5_tokenizer(tokenizers / "tokenizer_2", corpus())
    model = TextToVideo(tokenizers)
    initialize(model)
    teach_words(model.text, num_steps=NUM_WORD_STEPS)
    return model


def train(options: Options, *, latents: Path, checkpoint: Path | None, compiled: bool, batch: int) -> None:
    """Train to the end, from the state in `out` if there is one, else from a checkpoint, else from nothing.

    Every group has `batch` times its clips. Logs each group's loss.
    """
    torch.manual_seed(options.seed)
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)  # inside of each of the pool's threads
    tokenizers = options.out.with_name("tokenizers")
    if options.out.exists():
        model = TextToVideo(tokenizers)
    else:
        model = start_anew(tokenizers) if checkpoint is None else start_from(checkpoint, tokenizers)
    if compiled:
        teacher_forcing.compile_blocks()
    # A GPU takes one thing after the other anyway.
    is_parallel = not options.device.startswith("cuda")
    side_by_side = ThreadPoolExecutor(options.num_threads).map if is_parallel else map
    training = Training(model, is_hidden, options, average=0.995, run=side_by_side)
    training_set = TrainingSet(latents, model.text, seed=options.seed, device=options.device)
    groups = [replace(group, num_clips=group.num_clips * batch) for group in GROUPS]
    last_alone = training.step + NUM_COMPILING_STEPS if compiled and is_parallel else 0

    def take(step: int) -> list[Tensor]:
        if step == last_alone > 0:
            torch.compiler.set_stance("eager_on_recompile")  # two threads that compile wait for each other forever
        if step % REFRESH_EVERY == 0:
            training_set.refresh()
        run = map if step < last_alone else side_by_side
        return train_step(model, groups, training_set, run=run, seed=options.seed, step=step)

    training.run(take, num_warmup=50, log_every=25, save_every=50 if is_parallel else 200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    Options.add_to(parser, steps=10000, decay_steps=4000, muon_lr=2e-3, adam_lr=1.5e-3)
    parser.add_argument("--latents", type=Path, required=True)
    parser.add_argument("--start-from", type=Path, help="a checkpoint that export wrote, e.g. the one in the package")
    parser.add_argument("--compile", action="store_true", help="two minutes first, then steps of two thirds the time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, help="end after so long; the rate still falls over the same share")
    parser.add_argument("--batch", type=int, default=1, help="times as many clips in a step; 16 for a GPU")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(
        replace(Options.of(args), device=args.device, seconds=args.seconds),
        latents=args.latents,
        checkpoint=args.start_from,
        compiled=args.compile,
        batch=args.batch,
    )


if __name__ == "__main__":
    main()
