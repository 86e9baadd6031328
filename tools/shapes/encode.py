"""Encode clips once, for the transformer's training: `python -m tools.shapes.encode --checkpoint DIR --out DIR`.

Writes files of clips' latents with several prompts each, and of single pictures' latents. Files that are there are
kept, so it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyramid_serve.pyramid_flow.autoencoder import CausalVideoVAE
from pyramid_serve.pyramid_flow.parts import load_vae
from tools.shapes.export import LATENT_SCALE
from tools.shapes.optim import load_state, save_state
from tools.shapes.scenes import NUM_FRAMES, Scene, render, sample_prompt, sample_scene

logger = logging.getLogger(__name__)

CLIPS_PER_FILE = 32
PICTURES_PER_FILE = 1024
PROMPTS_PER_CLIP = 6
SPREAD = 0.04


@dataclass(frozen=True)
class LatentClips:
    """Latents (N, 16, T, h, w) float16 in the transformer's scale, and the prompts of each."""

    latents: Tensor
    prompts: list[list[str]]


@torch.no_grad()
def encode_scenes(vae: CausalVideoVAE, scenes: list[Scene], num_frames: int) -> Tensor:
    """Latents (N, 16, T, h, w), float16, in the transformer's scale."""
    latents = []
    for first in range(0, len(scenes), max(1, 32 // num_frames)):
        batch = scenes[first : first + max(1, 32 // num_frames)]
        clips = torch.stack([render(scene, num_frames=num_frames) for scene in batch])
        pixels = clips.transpose(1, 2).to(vae.dtype) / 127.5 - 1
        latents.append(LATENT_SCALE.from_vae(vae.encode(pixels).mean).half())
    return torch.cat(latents)


def write_file(path: Path, vae: CausalVideoVAE, *, num_clips: int, num_frames: int, seed: int, spread: float) -> None:
    rng = np.random.default_rng((seed, num_frames))
    scenes = [sample_scene(rng, color_jitter=6.0, spread=spread) for _ in range(num_clips)]
    save_state(
        path,
        {
            "latents": encode_scenes(vae, scenes, num_frames),
            "prompts": [[sample_prompt(scene, rng) for _ in range(PROMPTS_PER_CLIP)] for scene in scenes],
        },
    )


def read_files(folder: Path, kind: str) -> LatentClips:
    """All files of `kind` ("clips" or "pictures"). Raises ValueError where there are none."""
    states = [load_state(path) for path in sorted(folder.glob(f"{kind}_*.pt"))]
    if not states:
        raise ValueError(f"{folder}: no {kind}_*.pt; run tools.shapes.encode")
    return LatentClips(torch.cat([s["latents"] for s in states]), [p for s in states for p in s["prompts"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="with causal_video_vae/ in it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--pictures", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--spread", type=float, default=SPREAD, help="of positions, sizes and speeds, 0..1")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args.out.mkdir(parents=True, exist_ok=True)
    vae = load_vae(args.checkpoint, dtype=torch.bfloat16)
    files = [(f"pictures_{i:03d}.pt", PICTURES_PER_FILE, 1, i) for i in range(args.pictures // PICTURES_PER_FILE)]
    clips = [(f"clips_{i:03d}.pt", CLIPS_PER_FILE, NUM_FRAMES, i) for i in range(args.clips // CLIPS_PER_FILE)]
    for name, num_clips, num_frames, index in [*files[:1], *clips[:8], *files[1:], *clips[8:]]:
        path = args.out / name
        if not path.exists():
            write_file(
                path, vae, num_clips=num_clips, num_frames=num_frames, seed=args.seed + 1000 * index, spread=args.spread
            )
            logger.info("wrote %s", name)


if __name__ == "__main__":
    main()
