"""Moving shapes drawn on the fly, with prompts in varied words.

Letters: F frames, H W pixels. A *scene* is everything that fixes one clip: what is drawn, where, and how it moves.
Every clip keeps its shape whole in view for all its frames. Motions are uniform: a constant velocity, a constant change
of size, a constant turn (clockwise). A circle that spins looks like one that stays still; so it is drawn, and so the
judge counts it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SIZE = 128
NUM_FRAMES = 121
MARGIN = 5.0
"""Pixels to the border: a model's own places are a few off, and a shape must not be cut."""
MOVING_MARGIN = 9.0
"""The same for a shape that moves, whose speed is off as well."""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (230, 25, 25),
    "green": (20, 170, 45),
    "blue": (25, 55, 230),
    "yellow": (250, 225, 20),
    "orange": (255, 135, 5),
    "purple": (140, 25, 165),
    "white": (250, 250, 250),
    "cyan": (10, 220, 230),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (5, 5, 5),
    "white": (250, 250, 250),
    "gray": (128, 128, 128),
    "brown": (130, 68, 28),
}
# The same words in a person's own pictures: pure colours, or near to those of the web.
_OTHER_COLORS: dict[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "green": (0, 190, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "orange": (255, 150, 0),
    "purple": (128, 0, 128),
    "white": (255, 255, 255),
    "cyan": (0, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "brown": (150, 60, 40),
}
SHAPES = ("circle", "square", "triangle", "star")
MOTIONS = ("moves right", "moves left", "moves up", "moves down", "stays still", "grows", "shrinks", "spins")

# Corners of each shape, and its inner radius over its outer one (a regular polygon's is cos(pi / n)).
_CORNERS = {"triangle": (3, 0.5), "square": (4, math.cos(math.pi / 4)), "star": (5, 0.43)}
# Radii over a square's, so that all shapes are of about one size to the eye.
_RELATIVE_RADIUS = {"circle": 0.82, "square": 1.0, "triangle": 1.2, "star": 1.25}
_MAX_RADIUS = 55.0
_DIRECTIONS = {"moves right": (1, 0), "moves left": (-1, 0), "moves up": (0, -1), "moves down": (0, 1)}


@dataclass(frozen=True)
class Scene:
    """One clip. Positions in pixels of a 128x128 picture, x to the right and y down, angles in radians, clockwise."""

    color: str
    shape: str
    motion: str
    background: str
    start: tuple[float, float]  # centre at frame 0
    end: tuple[float, float]  # centre at frame 120
    start_radius: float  # of the circle around the shape
    end_radius: float
    angle: float
    turn: float  # angle gained by frame 120
    color_rgb: tuple[float, float, float]  # 0..255
    background_rgb: tuple[float, float, float]

    @property
    def is_seen_to_spin(self) -> bool:
        return self.motion == "spins" and self.shape != "circle"


def sample_scene(
    rng: np.random.Generator,
    *,
    color: str | None = None,
    shape: str | None = None,
    motion: str | None = None,
    background: str | None = None,
    color_jitter: float = 8.0,
    other_colors: float = 0.0,
    spread: float = 1.0,
    size: float = 0.5,
    size_spread: float | None = None,
) -> Scene:
    """A random scene, with any of its words given; `spread` narrows where, how large and how fast around the middle.

    size: where in their range narrowed sizes lie, 0..1; size_spread: how far sizes and their change are narrowed, where
    not as the rest; other_colors: how many scenes, 0..1, have colours on the way to those of other pictures. Raises
    ValueError for a shape in its background's colour.
    """
    shape = shape or str(rng.choice(SHAPES))
    motion = motion or str(rng.choice(MOTIONS))
    if background is None:
        background = str(rng.choice([name for name in BACKGROUNDS if name != color]))
    if color is None:
        color = str(rng.choice([name for name in COLORS if name != background]))
    if color == background:
        raise ValueError(f"color={color!r}: a shape must differ from its background")
    start_radius, end_radius = _sample_radii(rng, shape, motion, spread if size_spread is None else size_spread, size)
    start, end = _sample_path(rng, motion, max(start_radius, end_radius), spread)
    # All spins are nearly one and the same: few angles to learn, and no speed to guess.
    turn = _around(rng, 0.89, 0.91, spread) * math.radians(NUM_FRAMES - 1) if motion == "spins" else 0.0
    tilt = 1 if motion == "spins" else 6
    jitter = rng.uniform(-color_jitter, color_jitter, size=(2, 3))
    own = np.array([COLORS[color], BACKGROUNDS[background]])
    others = np.array([_OTHER_COLORS[color], _OTHER_COLORS[background]])
    share = rng.random((2, 1)) if rng.random() < other_colors else 0.0
    rgb = np.clip(own + share * (others - own) + jitter, 0, 255)
    return Scene(
        color=color,
        shape=shape,
        motion=motion,
        background=background,
        start=start,
        end=end,
        start_radius=start_radius,
        end_radius=end_radius,
        angle=math.radians(_around(rng, -tilt, tilt, spread)),
        turn=turn,
        color_rgb=(float(rgb[0, 0]), float(rgb[0, 1]), float(rgb[0, 2])),
        background_rgb=(float(rgb[1, 0]), float(rgb[1, 1]), float(rgb[1, 2])),
    )


def _around(rng: np.random.Generator, low: float, high: float, spread: float, middle: float = 0.5) -> float:
    """Uniform in a part `spread` (0..1) of an interval, around the point `middle` (0..1) of it as far as it fits."""
    middle = min(max(middle, spread / 2), 1 - spread / 2)
    return float(low + (high - low) * (middle + spread * rng.uniform(-0.5, 0.5)))


def _sample_radii(rng: np.random.Generator, shape: str, motion: str, spread: float, size: float) -> tuple[float, float]:
    unit = _RELATIVE_RADIUS[shape]
    if motion == "grows":
        start = _around(rng, 17, 28, spread, size) * unit
        return start, min(start * _around(rng, 1.6, 2.0, spread), 50 * unit, _MAX_RADIUS)
    if motion == "shrinks":
        start = min(_around(rng, 29, 46, spread, size) * unit, _MAX_RADIUS)
        return start, max(start / _around(rng, 1.6, 2.0, spread), 15 * unit)
    # Between the angles at which a shape looks like itself, small ones are more than so few latents can tell. What
    # moves needs its way within the margins: 35 pixels for the largest star.
    largest = {"spins": 40, **dict.fromkeys(_DIRECTIONS, 30)}.get(motion, 33)
    radius = _around(rng, 18, largest, spread, size) * unit
    return radius, radius


def _sample_path(
    rng: np.random.Generator, motion: str, radius: float, spread: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    margin = MOVING_MARGIN if motion in _DIRECTIONS else MARGIN
    low, high = radius + margin, SIZE - radius - margin
    x, y = (_around(rng, low, high, spread) for _ in range(2))
    if motion not in _DIRECTIONS:
        return (x, y), (x, y)
    dx, dy = _DIRECTIONS[motion]
    distance = _around(rng, 30, min(42.0, high - low), spread)
    first = _around(rng, low, high - distance, spread)
    near, far = (first, first + distance) if dx + dy > 0 else (first + distance, first)
    return ((near, y), (far, y)) if dx else ((x, near), (x, far))


def render(
    scene: Scene,
    *,
    num_frames: int = NUM_FRAMES,
    first_frame: int = 0,
    box: tuple[int, int, int, int] | None = None,
    turned: Tensor | None = None,
) -> Tensor:
    """Frames (F, 3, H, W) uint8 of a scene, antialiased.

    box: the (top, left, height, width) to draw; turned: radians (F,) that each frame is turned further, clockwise.
    """
    x, y, radius, angle = geometry(scene, num_frames=num_frames, first_frame=first_frame, box=box)
    angle = angle if turned is None else angle + turned.view(-1, 1, 1)
    return paint(scene, (0.5 - signed_distance(scene.shape, x, y, radius, angle)).clamp_(0, 1))


def geometry(
    scene: Scene, *, num_frames: int, first_frame: int = 0, box: tuple[int, int, int, int] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where each pixel lies from the shape's centre, x (F, 1, W) and y (F, H, 1); radius and angle (F, 1, 1)."""
    top, left, height, width = box or (0, 0, SIZE, SIZE)
    progress = progress_of(num_frames, first_frame=first_frame)
    columns = torch.arange(width, dtype=torch.float32) + left + 0.5
    rows = torch.arange(height, dtype=torch.float32).view(-1, 1) + top + 0.5
    return (
        columns - _between(scene.start[0], scene.end[0], progress),
        rows - _between(scene.start[1], scene.end[1], progress),
        _between(scene.start_radius, scene.end_radius, progress),
        scene.angle + scene.turn * progress,
    )


def progress_of(num_frames: int, *, first_frame: int = 0) -> Tensor:
    """How far frames are on their way through a whole clip: (F, 1, 1), 0 at frame 0 and 1 at the last."""
    return (torch.arange(num_frames, dtype=torch.float32) + first_frame).view(-1, 1, 1) / (NUM_FRAMES - 1)


def paint(scene: Scene, coverage: Tensor) -> Tensor:
    """Frames (F, 3, H, W) uint8 where the scene's colour covers its background by `coverage` (F, H, W), 0..1."""
    color = torch.tensor(scene.color_rgb).view(3, 1, 1)
    background = torch.tensor(scene.background_rgb).view(3, 1, 1)
    return torch.lerp(background, color, coverage.unsqueeze(1)).round_().to(torch.uint8)


def to_pixels(frames: Tensor) -> Tensor:
    """What the VAE and the transform read: frames uint8 of any shape as float32 in [-1, 1]."""
    return frames.float() / 127.5 - 1


def area(shape: str) -> float:
    """Of a shape of radius 1."""
    if shape == "circle":
        return math.pi
    num_corners, inner = _CORNERS[shape]
    return num_corners * inner * math.sin(math.pi / num_corners)


def corner_angles(shape: str) -> list[float]:
    """Where an upright shape's corners point, radians clockwise from the right; a circle has none."""
    if shape == "circle":
        return []
    num_corners, _ = _CORNERS[shape]
    return [_upright(shape) + 2 * math.pi * corner / num_corners for corner in range(num_corners)]


def _upright(shape: str) -> float:
    """Where the first corner of an upright shape points."""
    return math.pi / 4 if shape == "square" else -math.pi / 2


def _between(start: float, end: float, progress: Tensor) -> Tensor:
    return start + (end - start) * progress


def signed_distance(shape: str, x: Tensor, y: Tensor, radius: Tensor, angle: Tensor) -> Tensor:
    """Distance in pixels to the nearest edge, negative inside; the plane is folded onto one half of one corner.

    x, y: pixels from the shape's centre; radius: of the circle around it; angle: radians, clockwise. All broadcast.
    """
    if shape == "circle":
        return torch.sqrt(x * x + y * y) - radius
    num_corners, inner = _CORNERS[shape]
    sector = 2 * math.pi / num_corners
    direction = torch.atan2(y, x) - _upright(shape) - angle
    folded = (torch.remainder(direction + sector / 2, sector) - sector / 2).abs_()
    distance = torch.sqrt(x * x + y * y)
    # The edge runs from the corner (R, 0) to (inner R cos, inner R sin) at half a sector.
    edge_x, edge_y = inner * math.cos(sector / 2) - 1, inner * math.sin(sector / 2)
    length = math.hypot(edge_x, edge_y)
    normal_x, normal_y = edge_y / length, -edge_x / length
    return (distance * folded.cos() - radius) * normal_x + distance * folded.sin() * normal_y


# Wording. The first of each tuple is the plain one and is used most.
_COLOR_WORDS = {
    "red": ("red", "crimson", "scarlet"),
    "yellow": ("yellow", "golden"),
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise", "aqua", "teal"),
    "gray": ("gray", "grey"),
}
_SHAPE_WORDS = {
    "circle": ("circle", "disc", "disk", "ball", "dot"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star", "five-pointed star"),
}
_ADJECTIVES = ("small", "big", "large", "little", "bright", "single", "simple", "plain", "solid", "flat")
_GO = tuple(
    (f"{verb}s" if verb != "go" else "goes", f"{verb.removesuffix('e')}ing")
    for verb in ("move", "go", "slide", "drift", "travel", "float", "glide", "head", "shift", "roll")
)
_WHERE = {
    "moves right": ("right", "to the right", "rightwards", "rightward", "from left to right", "towards the right"),
    "moves left": ("left", "to the left", "leftwards", "leftward", "from right to left", "towards the left"),
    "moves up": ("up", "upwards", "upward", "to the top", "from bottom to top", "towards the top"),
    "moves down": ("down", "downwards", "downward", "to the bottom", "from top to bottom", "towards the bottom"),
}
_DOES: dict[str, tuple[tuple[str, str], ...]] = {
    "moves right": (),
    "moves left": (),
    "moves up": (("rises", "rising"), ("ascends", "ascending"), ("climbs", "climbing")),
    "moves down": (("falls", "falling"), ("descends", "descending"), ("drops", "dropping"), ("sinks", "sinking")),
    "stays still": (
        ("stays still", "staying still"),
        ("stands still", "standing still"),
        ("does not move", "not moving"),
        ("is still", "still"),
        ("is motionless", "motionless"),
        ("stays in place", "staying in place"),
        ("remains still", "remaining still"),
        ("is stationary", "stationary"),
        ("is static", "static"),
        ("holds still", "holding still"),
        ("stays put", "staying put"),
    ),
    "grows": (
        ("grows", "growing"),
        ("gets bigger", "getting bigger"),
        ("gets larger", "getting larger"),
        ("expands", "expanding"),
        ("becomes bigger", "becoming bigger"),
        ("becomes larger", "becoming larger"),
        ("grows larger", "growing larger"),
        ("enlarges", "enlarging"),
        ("increases in size", "increasing in size"),
        ("swells", "swelling"),
    ),
    "shrinks": (
        ("shrinks", "shrinking"),
        ("gets smaller", "getting smaller"),
        ("becomes smaller", "becoming smaller"),
        ("contracts", "contracting"),
        ("decreases in size", "decreasing in size"),
        ("grows smaller", "growing smaller"),
    ),
    "spins": (
        ("spins", "spinning"),
        ("rotates", "rotating"),
        ("turns", "turning"),
        ("spins around", "spinning around"),
        ("turns around", "turning around"),
        ("revolves", "revolving"),
        ("rotates in place", "rotating in place"),
        ("spins clockwise", "spinning clockwise"),
        ("whirls", "whirling"),
    ),
}
_SENTENCES = (
    "a {color} {shape} {does} on a {background} background",
    "a {color} {shape} {doing} on a {background} background",
    "{color} {shape} {doing}, {background} background",
    "{color} {shape} {does} on {background}",
    "the {color} {shape} {does} against a {background} backdrop",
    "{color} {shape} {doing}, {background} backdrop",
    "a {color} {shape} that {does}, on a {background} background",
    "on a {background} background, a {color} {shape} {does}",
    "{background} background, {color} {shape} {doing}",
    "a {shape} {does}, it is {color}, the background is {background}",
    "a video of a {color} {shape} {doing} over a {background} background",
    "{color} {shape}, {doing}, {background}",
    "a {color} {shape} is {doing} on a {background} background",
    "{doing} {color} {shape} on a {background} background",
    "a {doing} {color} {shape} in front of a {background} background",
    "show a {color} {shape} {doing} with a {background} backdrop",
    "{background} screen with a {color} {shape} {doing}",
    "an animation of one {shape} in {color} which {does}; behind it all is {background}",
)


def plain_prompt(scene: Scene) -> str:
    """The scene in the plainest words, e.g. "a red circle moves right on a black background"."""
    article = "an" if scene.color == "orange" else "a"
    return f"{article} {scene.color} {scene.shape} {scene.motion} on a {scene.background} background"


def sample_prompt(scene: Scene, rng: np.random.Generator) -> str:
    """The scene in random words; a third of the time in the plainest."""
    if rng.random() < 0.33:
        return plain_prompt(scene)
    color = _pick(rng, _COLOR_WORDS.get(scene.color, (scene.color,)))
    if rng.random() < 0.1:
        color = f"{rng.choice(_ADJECTIVES)} {color}"
    words = _DOES[scene.motion]
    if scene.motion in _WHERE and (not words or rng.random() < 0.75):
        does, doing = _GO[0] if rng.random() < 0.5 else _GO[int(rng.integers(len(_GO)))]
        where = _pick(rng, _WHERE[scene.motion])
        does, doing = f"{does} {where}", f"{doing} {where}"
    else:
        does, doing = words[0] if rng.random() < 0.3 else words[int(rng.integers(len(words)))]
    sentence = str(rng.choice(_SENTENCES)).format(
        color=color,
        shape=_pick(rng, _SHAPE_WORDS[scene.shape]),
        does=does,
        doing=doing,
        background=_pick(rng, _COLOR_WORDS.get(scene.background, (scene.background,))),
    )
    sentence = re.sub(r"\ba (?=[aeio])", "an ", sentence)
    if rng.random() < 0.2:
        sentence = sentence[0].upper() + sentence[1:]
    return sentence + "." if rng.random() < 0.2 else sentence


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    """The first word seven times in ten, else any of them."""
    return words[0] if rng.random() < 0.7 else words[int(rng.integers(len(words)))]
