"""Draw clips once, as latents, for the transformer's training: `python -m tools.shapes.draw --out DIR`.

Writes files of clips' latents with several prompts each, more of what is hard, the same clips with their shapes worn
(`wear.py`), and single pictures' latents: those that the VAE is taught (see `latents.py`), so neither training waits
for the other. Files that are there are kept, so it goes on where it was stopped; after a change of what is drawn, begin
in a new folder.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tools.shapes.latents import transformer_latents
from tools.shapes.scenes import MOTIONS, NUM_FRAMES, SHAPES, Scene, render, sample_prompt, sample_scene, to_pixels
from tools.shapes.training import load_state, save_state
from tools.shapes.wear import render_worn, sample_wear

logger = logging.getLogger(__name__)

CLIPS_PER_FILE = 256
PICTURES_PER_FILE = 4096
PROMPTS_PER_CLIP = 6
COLOR_JITTER = 6.0  # of 255
CLIP_COLOR_JITTER = 12.0
OTHER_COLORS = 0.15
"""A video may go on from another's picture, so some clips have other colours. With more of them the colours of all
videos drift there. Pictures, which a video begins with from words, have the words' own."""
STAR_WEIGHT = 3.0
SPIN_WEIGHTS = {"square": 12.0, "triangle": 6.0, "star": 20.0}
SHRINK_WEIGHT = 2.0
STILL_WEIGHT = 2.0
PICTURE_SPREAD, PICTURE_SIZE = 0.35, 0.75
"""Where and how large the shapes of pictures are. They teach how a video begins, and that need not be anywhere; rather
large, since a larger shape is made of more latents and keeps its corners more easily."""
LARGE_CLIPS, LARGE_SPREAD = 0.5, 0.5
"""How many of the clips are as large as pictures, and over how much of the range their sizes are spread. With half of
all clips smaller than any picture, videos from words shrank toward the mean as they went on."""


@dataclass(frozen=True)
class LatentClips:
    """Latents (N, 16, T, h, w) float16 in the transformer's scale, the same of the worn clips, each clip's words."""

    latents: Tensor
    worn: Tensor | None  # of pictures there are none
    prompts: list[list[str]]
    chances: NDArray[np.float64]  # how often the training takes each (N,), 1 in all

    def to(self, device: str) -> LatentClips:
        """The same, its latents there."""
        return replace(self, latents=self.latents.to(device), worn=None if self.worn is None else self.worn.to(device))


def chances_of(words: Sequence[tuple[str, str]]) -> NDArray[np.float64]:
    """Chances (N,) of shapes and motions to be drawn: what is hard to learn more often than the rest."""
    weights = np.array([_weight(shape, motion) for shape, motion in words])
    chances: NDArray[np.float64] = weights / weights.sum()
    return chances


def _weight(shape: str, motion: str) -> float:
    """Stars have the most corners; what shrinks comes to be made of few latents; what stays still has only itself to
    keep its size by; what spins is at another angle in each unit, and loses its corners first, a star before all
    others. A circle that spins looks still.
    """
    if motion == "spins" and shape in SPIN_WEIGHTS:
        return SPIN_WEIGHTS[shape]
    of_motion = {"shrinks": SHRINK_WEIGHT, "stays still": STILL_WEIGHT}.get(motion, 1.0)
    return (STAR_WEIGHT if shape == "star" else 1.0) * of_motion


def sample_scenes(num_scenes: int, rng: np.random.Generator, *, motions: Sequence[str] = MOTIONS) -> list[Scene]:
    """Scenes of clips, what is hard more often."""
    return [
        sample_scene(
            rng,
            shape=shape,
            motion=motion,
            color_jitter=CLIP_COLOR_JITTER,
            other_colors=OTHER_COLORS,
            size=PICTURE_SIZE,
            size_spread=LARGE_SPREAD if rng.random() < LARGE_CLIPS else 1.0,
        )
        for shape, motion in _sample_words(num_scenes, rng, motions)
    ]


def sample_pictures(num_scenes: int, rng: np.random.Generator) -> list[Scene]:
    """Scenes of single pictures, what is hard more often."""
    return [
        sample_scene(
            rng, shape=shape, motion=motion, color_jitter=COLOR_JITTER, spread=PICTURE_SPREAD, size=PICTURE_SIZE
        )
        for shape, motion in _sample_words(num_scenes, rng, MOTIONS)
    ]


def _sample_words(num: int, rng: np.random.Generator, motions: Sequence[str]) -> list[tuple[str, str]]:
    words = [(shape, motion) for shape in SHAPES for motion in motions]
    return [words[i] for i in rng.choice(len(words), size=num, p=chances_of(words))]


def write_file(path: Path, *, num_clips: int, num_frames: int, seed: int) -> None:
    rng = np.random.default_rng((seed, num_frames))
    scenes = sample_pictures(num_clips, rng) if num_frames == 1 else sample_scenes(num_clips, rng)
    prompts = [[sample_prompt(scene, rng) for _ in range(PROMPTS_PER_CLIP)] for scene in scenes]
    state: dict[str, object] = {
        "latents": latents_of(render(scene, num_frames=num_frames) for scene in scenes),
        "prompts": prompts,
    }
    if num_frames > 1:
        wear_rng = np.random.default_rng((seed, num_frames, 1))
        state["worn"] = latents_of(
            render_worn(scene, sample_wear(wear_rng, scene), num_frames=num_frames) for scene in scenes
        )
    save_state(path, state)


def latents_of(clips: Iterable[Tensor]) -> Tensor:
    """(N, 16, T, h, w) float16 of clips (F, 3, H, W) uint8."""
    return torch.cat([transformer_latents(to_pixels(clip.transpose(0, 1)[None])).half() for clip in clips]).cpu()


def read_files(folder: Path, kind: str) -> LatentClips:
    """All files of `kind`: "clips", "pictures" or "rollouts".

    Raises ValueError where there are none, or none of worn clips.
    """
    states = [load_state(path) for path in sorted(folder.glob(f"{kind}_*.pt"))]
    if not states:
        raise ValueError(f"{folder}: no {kind}_*.pt; run tools.shapes.draw")
    if kind != "pictures" and not all("worn" in state for state in states):
        raise ValueError(f"{folder}: clips without worn ones beside them; remove them and run tools.shapes.draw")
    num_clips = sum(len(state["prompts"]) for state in states)
    return LatentClips(
        latents=torch.cat([state["latents"] for state in states]),
        worn=None if kind == "pictures" else torch.cat([state["worn"] for state in states]),
        prompts=[prompts for state in states for prompts in state["prompts"]],
        chances=np.full(num_clips, 1 / num_clips),
    )


def mixed(clips: LatentClips, rollouts: LatentClips, share: float) -> LatentClips:
    """Both, the rollouts being `share` of what is taken."""
    assert clips.worn is not None and rollouts.worn is not None
    return LatentClips(
        latents=torch.cat([clips.latents, rollouts.latents]),
        worn=torch.cat([clips.worn, rollouts.worn]),
        prompts=clips.prompts + rollouts.prompts,
        chances=np.concatenate([(1 - share) * clips.chances, share * rollouts.chances]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=8192)
    parser.add_argument("--pictures", type=int, default=16384)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument(
        "--files",
        type=int,
        nargs=2,
        default=(None, None),
        help="of all in the order of writing, the first and the one after the last: to share the work",
    )
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    pictures = [(f"pictures_{i:03d}.pt", PICTURES_PER_FILE, 1, i) for i in range(args.pictures // PICTURES_PER_FILE)]
    clips = [(f"clips_{i:03d}.pt", CLIPS_PER_FILE, NUM_FRAMES, i) for i in range(args.clips // CLIPS_PER_FILE)]
    files = [*pictures[:1], *clips[:2], *pictures[1:], *clips[2:]]
    for name, num_clips, num_frames, index in files[slice(*args.files)]:
        path = args.out / name
        if not path.exists():
            with torch.device(args.device):
                write_file(path, num_clips=num_clips, num_frames=num_frames, seed=args.seed + 1000 * index)
            logger.info("wrote %s", name)


if __name__ == "__main__":
    main()
