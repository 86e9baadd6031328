"""The judge: watches a video and says its shape, colour, background and motion: `python -m tools.shapes.judge a.mp4`.

It measures each frame by itself: the background is the colour of the border, the shape is what differs from it. The
outline as a function of the angle tells the shape by its 3-, 4- or 5-fold part and the turn by that part's phase. The
motion is the largest of shift, change of size and turn over the whole video, each against its own least value.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tools.shapes.scenes import BACKGROUNDS, COLORS, SHAPES, Scene, render, sample_scene

logger = logging.getLogger(__name__)

Frames = NDArray[np.uint8]
Floats = NDArray[np.float64]

_NUM_ANGLES = 120
FOLDS = {"triangle": 3, "square": 4, "star": 5}
"""How many times each shape's outline comes again around it."""
_LEAST_SHIFT = 12.0  # pixels
_LEAST_GROWTH = math.log(1.22)
_LEAST_TURN = math.radians(25)


@dataclass(frozen=True)
class Verdict:
    """What is seen. `is_whole`: in every frame one shape, uncut by the border, of the one kind and colour."""

    shape: str
    color: str
    background: str
    motion: str
    is_whole: bool
    shift_x: float  # pixels from the first frame to the last
    shift_y: float
    growth: float  # last size over first
    turn: float  # degrees, clockwise


@dataclass(frozen=True)
class _Look:
    """One frame: where the shape is, how large, of what outline."""

    x: float
    y: float
    size: float  # square root of the area, 0 for an empty frame
    folds: NDArray[np.complex128]  # Fourier parts 0..8 of the outline, over its mean
    color: Floats
    background: Floats
    is_cut: bool
    spill: float  # the area outside the outline, over the shape's area


def judge(frames: Frames) -> Verdict:
    """Judge frames (F, H, W, 3) uint8. Raises ValueError for another shape or type of array."""
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames: {frames.dtype} of shape {frames.shape}, must be uint8 (F, H, W, 3)")
    looks = [_look(frame.astype(np.float64)) for frame in frames]
    seen = [look for look in looks if look.size > 0]
    if not seen:
        background = np.median([look.background for look in looks], axis=0)
        nothing = _nearest(background, BACKGROUNDS)
        return Verdict("none", "none", nothing, "none", False, 0.0, 0.0, 1.0, 0.0)
    kinds = [_kind(look.folds) for look in seen]
    shape = Counter(kinds).most_common(1)[0][0]
    colors = [_nearest(look.color, COLORS) for look in seen]
    color = Counter(colors).most_common(1)[0][0]
    shift_x, shift_y = (_course(np.array([getattr(look, axis) for look in seen])) for axis in ("x", "y"))
    growth = math.exp(_course(np.log([look.size for look in seen])))
    turn = 0.0
    if shape in FOLDS:
        fold = FOLDS[shape]
        turn = _course(np.unwrap(-np.angle([look.folds[fold] for look in seen])) / fold)
    return Verdict(
        shape=shape,
        color=color,
        background=_nearest(np.median([look.background for look in looks], axis=0), BACKGROUNDS),
        motion=_motion(shift_x, shift_y, growth, turn),
        is_whole=_is_whole(looks, kinds, shape, colors, color),
        shift_x=shift_x,
        shift_y=shift_y,
        growth=growth,
        turn=math.degrees(turn),
    )


def corners(frames: Frames | Floats, shape: str) -> NDArray[np.complex128]:
    """The part of the outline in frames (F, H, W, 3), 0..255, that is the shape's own, over the outline's mean (F,).

    How large it is tells how deep the corners are; its phase over minus `FOLDS[shape]` is the turn, clockwise.
    """
    return np.array([_look(frame.astype(np.float64)).folds[FOLDS[shape]] for frame in frames])


def agrees(verdict: Verdict, scene: Scene) -> dict[str, bool]:
    """Which of the four the verdict has as the scene. A spinning circle is seen to stay still, and that is right."""
    motion = "stays still" if (scene.shape, scene.motion) == ("circle", "spins") else scene.motion
    return {
        "shape": verdict.shape == scene.shape,
        "color": verdict.color == scene.color,
        "background": verdict.background == scene.background,
        "motion": verdict.motion == motion,
    }


def _look(frame: Floats) -> _Look:
    height, width, _ = frame.shape
    border = np.concatenate(
        [frame[:2].reshape(-1, 3), frame[-2:].reshape(-1, 3), frame[:, :2].reshape(-1, 3), frame[:, -2:].reshape(-1, 3)]
    )
    background = np.median(border, axis=0)
    distance = np.linalg.norm(frame - background, axis=2)
    peak = np.sort(distance.ravel())[-max(1, distance.size // 200)]
    nothing = _Look(0, 0, 0, np.zeros(9, complex), background, background, False, 0)
    if peak < 40:
        return nothing
    color = np.median(frame[distance > 0.8 * peak], axis=0)
    direction = (color - background) / max(float(np.sum((color - background) ** 2)), 1.0)
    cover = np.clip((frame - background) @ direction, 0, 1)
    cover[cover < 0.25] = 0
    area = float(cover.sum())
    if area < 30:
        return nothing
    rows, columns = np.mgrid[:height, :width].astype(np.float64)
    x, y = float((cover * columns).sum() / area), float((cover * rows).sum() / area)
    outline = _outline(cover, x, y)
    within = np.hypot(rows - y, columns - x) <= outline.max() + 3
    return _Look(
        x=x,
        y=y,
        size=math.sqrt(area),
        folds=np.fft.rfft(outline)[:9] / max(float(outline.sum()), 1e-6),
        color=color,
        background=background,
        is_cut=bool(max(cover[0].max(), cover[-1].max(), cover[:, 0].max(), cover[:, -1].max()) > 0.5),
        spill=float(cover[~within].sum() / area),
    )


def _outline(cover: Floats, x: float, y: float) -> Floats:
    """Distance from (x, y) to the edge at equal angles, clockwise: the length of the covered part of each ray."""
    height, width = cover.shape
    angles = 2 * math.pi * np.arange(_NUM_ANGLES) / _NUM_ANGLES
    radii = np.arange(0, 0.75 * max(height, width), 0.5)
    columns = x + radii[:, None] * np.cos(angles)
    rows = y + radii[:, None] * np.sin(angles)
    left, top = np.floor(columns).astype(int), np.floor(rows).astype(int)
    right_part, low_part = columns - left, rows - top

    def at(row: NDArray[np.int_], column: NDArray[np.int_]) -> Floats:
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        values: Floats = np.where(inside, cover[row.clip(0, height - 1), column.clip(0, width - 1)], 0.0)
        return values

    upper = at(top, left) * (1 - right_part) + at(top, left + 1) * right_part
    lower = at(top + 1, left) * (1 - right_part) + at(top + 1, left + 1) * right_part
    lengths: Floats = (upper * (1 - low_part) + lower * low_part).sum(axis=0) * 0.5
    return lengths


def _kind(folds: NDArray[np.complex128]) -> str:
    """The shape with this outline: the strongest of the 3-, 4- and 5-fold parts, each over its ideal strength."""
    ideal = {"triangle": 0.135, "square": 0.068, "star": 0.163}
    strengths = {name: abs(folds[fold]) / ideal[name] for name, fold in FOLDS.items()}
    best = max(strengths, key=lambda name: strengths[name])
    return best if strengths[best] > 0.5 else "circle"


def _nearest(color: Floats, names: dict[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: float(np.linalg.norm(color - np.array(names[name]))))


def _course(values: Floats) -> float:
    """How much values change from the first to the last, by a straight line through all."""
    if len(values) < 2:
        return 0.0
    slope = float(np.polyfit(np.arange(len(values)), values, 1)[0])
    return slope * (len(values) - 1)


def _motion(shift_x: float, shift_y: float, growth: float, turn: float) -> str:
    sideways = abs(shift_x) > abs(shift_y)
    move = (
        ("moves right" if shift_x > 0 else "moves left") if sideways else ("moves down" if shift_y > 0 else "moves up")
    )
    strengths = {
        move: max(abs(shift_x), abs(shift_y)) / _LEAST_SHIFT,
        "grows" if growth > 1 else "shrinks": abs(math.log(growth)) / _LEAST_GROWTH,
        "spins": abs(turn) / _LEAST_TURN,
    }
    best = max(strengths, key=lambda name: strengths[name])
    return best if strengths[best] > 1 else "stays still"


def _is_whole(looks: list[_Look], kinds: list[str], shape: str, colors: list[str], color: str) -> bool:
    if any(look.size == 0 or look.is_cut or look.spill > 0.05 for look in looks):
        return False
    sizes = np.array([look.size for look in looks])
    is_steady = bool(np.all(np.abs(np.diff(np.log(sizes))) < 0.12))
    return is_steady and all(kind == shape for kind in kinds) and all(name == color for name in colors)


def score_of_real_clips(num_clips: int, seed: int) -> dict[str, float]:
    """How often the judge is right on real clips, words in turn: each of the four, all of them, and wholeness."""
    right: dict[str, list[bool]] = {}
    for scene in scenes_in_turn(num_clips, seed):
        verdict = judge(render(scene).permute(0, 2, 3, 1).numpy())
        parts = agrees(verdict, scene)
        if not all(parts.values()) or not verdict.is_whole:
            logger.info("missed %s: %s", scene, verdict)
        for name, is_right in {**parts, "all": all(parts.values()), "whole": verdict.is_whole}.items():
            right.setdefault(name, []).append(is_right)
    return {name: float(np.mean(values)) for name, values in right.items()}


def scenes_in_turn(num_scenes: int, seed: int) -> list[Scene]:
    """Scenes that go through shapes, motions, colours and backgrounds in turn, each as often as the others."""
    rng = np.random.default_rng((seed, 7))
    scenes = []
    colors, backgrounds, motions = (
        list(COLORS),
        list(BACKGROUNDS),
        ("moves right", "moves left", "moves up", "moves down", "stays still", "grows", "shrinks", "spins"),
    )
    for i in range(num_scenes):
        shape, motion = SHAPES[i % 4], motions[(i // 4) % 8]
        color = colors[(i + i // 8 + i // 64) % 8]
        offset = next(k for k in range(4) if backgrounds[(i // 2 + i // 32 + k) % 4] != color)
        background = backgrounds[(i // 2 + i // 32 + offset) % 4]
        scenes.append(sample_scene(rng, color=color, shape=shape, motion=motion, background=background))
    return scenes


def read_frames(path: Path) -> Frames:
    """Frames of an MP4, a GIF or a folder of PNG pictures."""
    if path.is_dir():
        return np.stack([np.asarray(Image.open(name).convert("RGB")) for name in sorted(path.glob("*.png"))])
    if path.suffix.lower() == ".mp4":
        video = imageio_ffmpeg.read_frames(str(path))
        width, height = next(video)["size"]
        return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in video])
    with Image.open(path) as picture:
        frames = []
        for index in range(getattr(picture, "n_frames", 1)):
            picture.seek(index)
            frames.append(np.asarray(picture.convert("RGB")))
    return np.stack(frames)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "videos", nargs="*", type=Path, help="MP4s, GIFs or folders of PNG frames; none: test the judge itself"
    )
    parser.add_argument("--clips", type=int, default=512, help="real clips to test the judge on")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for video in args.videos:
        logger.info("%s: %s", video, json.dumps(asdict(judge(read_frames(video)))))
    if not args.videos:
        logger.info("%s", json.dumps(score_of_real_clips(args.clips, args.seed)))


if __name__ == "__main__":
    main()
