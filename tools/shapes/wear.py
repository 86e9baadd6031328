"""Shapes drawn as badly as a model may leave them after some units: stretched, dented, halfway to another shape.

A model that only ever saw clean histories copies its own small errors into the next unit and adds to them, until a
star is a blob. So part of the histories in training show a worn shape, and the unit to make shows it as the prompt has
it: what the model learns from that is to mend, which keeps shapes whole for as long as a video lasts.

Letters: F frames, H W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tools.shapes.scenes import SHAPES, Scene, area, corner_angles, geometry, paint, progress_of, signed_distance

_MOST_OF_A_SPIN = 0.5
_MOST_ROUNDING = 0.9  # of what spins, where 1 is a circle
_CHIPPED = 0.6
"""Of shapes with corners, how many have one that is worn off more than the rest."""
_GROWTH = 0.13
"""Of shapes that are to keep their size: usual logarithm of how far they lose it by the last frame."""
_CHIP_WIDTH = 0.3  # of the angle from corner to corner
_COARSE = 2  # pixels between the points at which area and centre are measured


class Wave(NamedTuple):
    """One dent around the outline."""

    fold: int  # times around
    height: float  # over the radius
    phase: float  # radians
    drift: float  # radians gained by the last frame


@dataclass(frozen=True)
class Wear:
    """What is wrong with a shape at full strength; the strength goes evenly from the first frame to the last, 0..1.

    Angles in radians, clockwise.
    """

    strength: tuple[float, float]
    stretch: float  # logarithm of the length along `axis` over the true one
    axis: float
    waves: tuple[Wave, ...]
    other: str  # the shape that it is halfway to
    other_share: float  # 0..1
    other_angle: float
    chipped_corner: int
    chip: float  # how much of the length to that corner is gone at full strength
    growth: float  # logarithm of the size in the last frame over the true one, whatever the strength
    tilt: float
    softness: float  # pixels that an edge is wider by
    fading: float  # how much of the background shows through, 0..1


def sample_wear(rng: np.random.Generator, scene: Scene) -> Wear:
    """Random wear; weak at the first frame more often than at the last.

    How far a shape has spun can still be seen: a model that cannot see it draws all angles at once, which is round.
    """
    is_spin = scene.is_seen_to_spin
    most = _MOST_OF_A_SPIN if is_spin else 1.0
    waves = tuple(
        Wave(int(fold), rng.normal(0, 0.25 / math.sqrt(fold)), rng.uniform(0, 2 * math.pi), rng.uniform(-4, 4))
        for fold in rng.choice(np.arange(2, 9), size=3, replace=False)
    )
    return Wear(
        strength=(most * rng.random() ** 2, most * rng.random()),
        stretch=rng.normal(0, 0.22),
        axis=rng.uniform(0, math.pi),
        waves=waves,
        other="circle" if is_spin else str(rng.choice([shape for shape in SHAPES if shape != scene.shape])),
        other_share=_MOST_ROUNDING / most * math.sqrt(rng.random()) if is_spin else rng.random(),
        other_angle=rng.uniform(0, 2 * math.pi),
        chipped_corner=int(rng.integers(5)),
        chip=rng.uniform(0, 0.6) / most if rng.random() < _CHIPPED else 0.0,
        growth=rng.normal(0, _GROWTH) if scene.start_radius == scene.end_radius else 0.0,
        tilt=0.0 if is_spin else rng.normal(0, 0.12),
        softness=5 * rng.random() ** 2,
        fading=0.4 * rng.random() ** 2,
    )


def render_worn(scene: Scene, wear: Wear, *, num_frames: int) -> Tensor:
    """Frames (F, 3, H, W) uint8 of the scene with its shape worn, at the true centre in every frame.

    Of the true area, but for the wear's growth: that begins at nothing, so that the true size is to be seen.
    """
    x, y, radius, angle = geometry(scene, num_frames=num_frames)
    progress = progress_of(num_frames)
    strength = wear.strength[0] + (wear.strength[1] - wear.strength[0]) * progress
    shape = _WornShape(scene, wear, radius, angle, progress, strength)
    coarse = x[..., ::_COARSE], y[:, ::_COARSE]
    cover = (0.5 - shape.distance(*coarse) / _COARSE).clamp_(0, 1)
    covered = cover.sum(dim=(1, 2), keepdim=True)
    off_x, off_y = ((cover * places).sum(dim=(1, 2), keepdim=True) / covered for places in coarse)
    scale = (area(scene.shape) * radius.square() / (covered * _COARSE**2)).sqrt() * (wear.growth * progress).exp()
    distance = shape.distance(x / scale + off_x, y / scale + off_y) * scale
    coverage = (0.5 - distance / (1 + strength * wear.softness)).clamp_(0, 1)
    return paint(scene, coverage * (1 - strength * wear.fading))


@dataclass(frozen=True)
class _WornShape:
    """A worn shape through all frames; its tensors are (F, 1, 1)."""

    scene: Scene
    wear: Wear
    radius: Tensor
    angle: Tensor
    progress: Tensor
    strength: Tensor

    def chip_at(self, direction: Tensor) -> Tensor:
        """How near directions (F, H, W) are to the chipped corner: 1 at it, nearly 0 at the next ones."""
        corners = corner_angles(self.scene.shape)
        if not corners:
            return torch.zeros(())
        corner = corners[self.wear.chipped_corner % len(corners)]
        away = torch.remainder(direction - self.angle - corner + math.pi, 2 * math.pi) - math.pi
        return torch.exp(-0.5 * (away * len(corners) / (2 * math.pi * _CHIP_WIDTH)).square())

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """(F, H, W) in pixels to the edge, negative inside, at x (F, 1, W) and y (F, H, 1) from the true centre."""
        wear, strength = self.wear, self.strength
        direction = torch.atan2(y, x)
        dent = sum(
            (w.height * torch.cos(w.fold * direction + w.phase + w.drift * self.progress) for w in wear.waves),
            torch.zeros(()),
        )
        inward = 1 / (1 + strength * (dent - wear.chip * self.chip_at(direction))).clamp(min=0.35)
        cos, sin = math.cos(wear.axis), math.sin(wear.axis)
        along = (x * cos + y * sin) * inward * torch.exp(-strength * wear.stretch)
        across = (y * cos - x * sin) * inward * torch.exp(strength * wear.stretch)
        x, y = along * cos - across * sin, along * sin + across * cos
        own = signed_distance(self.scene.shape, x, y, self.radius, self.angle + strength * wear.tilt)
        other_radius = self.radius * math.sqrt(area(self.scene.shape) / area(wear.other))
        other = signed_distance(wear.other, x, y, other_radius, self.angle + wear.other_angle)
        return torch.lerp(own, other, strength * wear.other_share)
