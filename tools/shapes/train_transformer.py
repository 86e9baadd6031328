"""Train the transformer with its text encoders: `python -m tools.shapes.train_transformer --latents DIR --out dit.pt`.

The paper's objective (arXiv 2410.05954, 3.2 and 3.3): each stage is a flow of its own, from its start (the lower
stage's latents, upsampled, at the corrected noise level) to its end, both with the same noise; the target is start
minus end. Histories are corrupted with noise of up to 1/3, and 10 % of prompts are dropped for guidance. Run it again
with the same `--out` to go on from its last state.
"""

from __future__ import annotations

import argparse
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyramid_serve.pyramid_flow import flux
from pyramid_serve.pyramid_flow.schedule import LAST_SIGMA, stage
from tools.shapes.encode import LatentClips, read_files
from tools.shapes.optim import Averaged, Optimizers, load_state, rate_at, save_state
from tools.shapes.teacher_forcing import forward, pyramid
from tools.shapes.text import WIDTH, TextEncoders, corpus, write_clip_tokenizer, write_t5_tokenizer

logger = logging.getLogger(__name__)

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
DROPPED_PROMPTS = 0.1
NUM_THREADS = 2


@dataclass(frozen=True)
class Group:
    """Part of a training batch: clips of one stage, each with `num_units` units; pictures have unit 0 alone."""

    stage: int
    num_clips: int
    num_units: int
    is_picture: bool = False


GROUPS = (
    Group(2, 11, 1),
    Group(2, 10, 1, is_picture=True),
    Group(1, 4, 6),
    Group(0, 4, 16),
    Group(1, 8, 1, is_picture=True),
    Group(0, 8, 1, is_picture=True),
)


class TextToVideo(nn.Module):
    """What is trained together."""

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
    in_block = "blocks." in name or ".layers." in name or ".block." in name
    return param.ndim == 2 and in_block and ".norm" not in name and "relative_attention_bias" not in name


def noised(levels: list[Tensor], index: int, sigma: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Units on their way through stage `index`, and the flow there, both (B, C, U, h, w).

    levels: the clean units at all stages; sigma: the stage's own noise level (B, 1, 1, 1, 1), 1 at its start.
    """
    at = stage(index)
    clean = levels[index]
    noise = torch.randn(clean.shape, generator=generator)
    below = (
        F.interpolate(levels[index - 1], scale_factor=(1, 2, 2), mode="nearest") if index else torch.zeros_like(clean)
    )
    start = at.start * noise + (1 - at.start) * below
    end = at.end * noise + (1 - at.end) * clean
    return sigma * start + (1 - sigma) * end, start - end


def group_loss(
    model: TextToVideo,
    group: Group,
    clips: LatentClips,
    text: tuple[Tensor, Tensor, Tensor],
    chosen: list[int],
    rng: np.random.Generator,
    generator: torch.Generator,
) -> Tensor:
    """Squared error of the flow over the root of its size, so that no stage drowns the others."""
    latents = clips.latents[chosen].float()
    num_frames = latents.shape[2]
    units = sorted(rng.choice(num_frames, size=min(group.num_units, num_frames), replace=False).tolist())
    if group.num_units == 1 and not group.is_picture:
        units = [int(rng.integers(1, num_frames))]
    levels = pyramid(latents)
    sigma = torch.rand(group.num_clips, 1, 1, 1, 1, generator=generator)
    current, flow = noised([level[:, :, units] for level in levels], group.stage, sigma, generator)
    at = stage(group.stage)
    share = (sigma.flatten() - LAST_SIGMA) / (1 - LAST_SIGMA)
    timesteps = at.last_timestep + (at.first_timestep - at.last_timestep) * share.clamp(min=0)
    corruption = MAX_CORRUPTION * torch.rand(group.num_clips, 1, 1, 1, 1, generator=generator).square()
    history = [level + corruption * torch.randn(level.shape, generator=generator) for level in levels]
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
    return F.mse_loss(prediction, flow) / flow.square().mean().sqrt()


def train_step(
    model: TextToVideo,
    clips: LatentClips,
    pictures: LatentClips,
    pool: ThreadPoolExecutor,
    *,
    seed: int,
    step: int,
) -> list[float]:
    """Gradients of one step; the losses of its groups."""
    rng = np.random.default_rng((seed, step))
    chosen: list[list[int]] = []
    prompts: list[str] = []
    for group in GROUPS:
        source = pictures if group.is_picture else clips
        picked = rng.integers(0, len(source.prompts), size=group.num_clips).tolist()
        chosen.append(picked)
        for index in picked:
            of_clip = source.prompts[index]
            prompts.append("" if rng.random() < DROPPED_PROMPTS else of_clip[int(rng.integers(len(of_clip)))])
    with torch.autocast("cpu", torch.bfloat16):
        embeds, mask, pooled = (x.float() if x.is_floating_point() else x for x in model.text(prompts))
    # The text's gradient is gathered here over the groups, so that each group's graph is freed when it is done.
    detached = [embeds.detach().requires_grad_(), pooled.detach().requires_grad_()]
    firsts = list(accumulate((group.num_clips for group in GROUPS), initial=0))

    def run(index: int) -> float:
        group = GROUPS[index]
        part = slice(firsts[index], firsts[index + 1])
        length = int(mask[part].sum(1).max())
        text = (detached[0][part, :length], mask[part, :length], detached[1][part])
        source = pictures if group.is_picture else clips
        own_rng, own_generator = (
            np.random.default_rng((seed, step, index)),
            torch.Generator().manual_seed(8 * step + index),
        )
        with torch.autocast("cpu", torch.bfloat16):
            loss = group_loss(model, group, source, text, chosen[index], own_rng, own_generator)
        loss.backward()
        return float(loss.detach())

    # Groups side by side, one thread each: far less waiting than threads inside of each small operation.
    losses = list(pool.map(run, range(len(GROUPS))))
    torch.autograd.backward([embeds, pooled], [x.grad for x in detached])
    return losses


def train(
    *, latents: Path, out: Path, num_steps: int, num_decay: int, seed: int, muon_lr: float, adam_lr: float
) -> None:
    """Train up to `num_steps`, from the state in `out` if there is one. New latents are taken up as they appear."""
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    tokenizers = out.with_name("tokenizers")
    write_clip_tokenizer(tokenizers / "tokenizer", corpus())
    write_t5_tokenizer(tokenizers / "tokenizer_2", corpus())
    model = TextToVideo(tokenizers)
    initialize(model)
    params = dict(model.named_parameters())
    hidden = {name for name, p in params.items() if is_hidden(name, p)}
    optimizers = Optimizers(params, hidden, muon_lr=muon_lr, adam_lr=adam_lr)
    averaged = Averaged(params, decay=0.99)
    first = 0
    if out.exists():
        state = load_state(out)
        model.load_state_dict(state["weights"])
        optimizers.load_state_dict(state["optimizers"])
        averaged.values = state["averaged"]
        first = state["step"]
    num_parameters = sum(p.numel() for p in params.values())
    logger.info(
        "%.2f million parameters, %.2f of them by Muon",
        num_parameters / 1e6,
        sum(params[n].numel() for n in hidden) / 1e6,
    )
    pool = ThreadPoolExecutor(NUM_THREADS)
    began, history = time.monotonic(), []
    for step in range(first, num_steps):
        if step == first or step % 50 == 0:
            clips, pictures = read_files(latents, "clips"), read_files(latents, "pictures")
        history.append(train_step(model, clips, pictures, pool, seed=seed, step=step))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(rate_at(step, num_steps=num_steps, num_warmup=50, num_decay=num_decay))
        averaged.update(params, step)
        if (step + 1) % 25 == 0:
            pace = (time.monotonic() - began) / (step + 1 - first)
            means = " ".join(f"{value:.4f}" for value in np.mean(history[-25:], axis=0))
            logger.info("step %d losses %s, %.2f s a step, %d clips", step + 1, means, pace, len(clips.prompts))
        if (step + 1) % 50 == 0 or step + 1 == num_steps:
            save_state(
                out,
                {
                    "weights": model.state_dict(),
                    "averaged": averaged.values,
                    "optimizers": optimizers.state_dict(),
                    "step": step + 1,
                },
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--decay-steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--muon-lr", type=float, default=2e-3)
    parser.add_argument("--adam-lr", type=float, default=1.5e-3)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(
        latents=args.latents,
        out=args.out,
        num_steps=args.steps,
        num_decay=args.decay_steps,
        seed=args.seed,
        muon_lr=args.muon_lr,
        adam_lr=args.adam_lr,
    )


if __name__ == "__main__":
    main()
