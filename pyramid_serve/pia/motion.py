"""How like the given picture each frame is meant to be: the fifth input channel of PIA's UNet.

The lists are the published ones. Their numbers differ between implementations (the style lists are in the opposite
order in the published code), so they are chosen by names here. Source: arXiv 2312.13964, section 3.2.
"""

from pyramid_serve.pia.settings import Mode, Motion, MotionKind

_AFFINITIES: dict[Mode, dict[Motion, tuple[float, ...]]] = {
    "animate": {
        "small": (1.0, 0.9, 0.85, 0.85, 0.85, 0.8),
        "moderate": (1.0, 0.8, 0.8, 0.8, 0.79, 0.78, 0.75),
        "large": (1.0, 0.8, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.6, 0.5, 0.5),
    },
    "loop": {
        "small": (1.0, 0.9, 0.85, 0.85, 0.85, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.85, 0.85, 0.9, 1.0),
        "moderate": (1.0, 0.8, 0.8, 0.8, 0.79, 0.78, 0.75, 0.75, 0.75, 0.75, 0.75, 0.78, 0.79, 0.8, 0.8, 1.0),
        "large": (1.0, 0.8, 0.7, 0.7, 0.7, 0.7, 0.6, 0.5, 0.5, 0.6, 0.7, 0.7, 0.7, 0.7, 0.8, 1.0),
    },
    "style": {
        "small": (0.5, 0.4, 0.4, 0.4, 0.35, 0.3),
        "moderate": (0.5, 0.4, 0.4, 0.4, 0.35, 0.35, 0.3, 0.25, 0.2),
        "large": (0.5, 0.2),
    },
}


def affinities(kind: MotionKind, num_frames: int) -> list[float]:
    """The affinity of each frame to the picture, from 0 to 1.

    The last value of a list repeats. A loop ends where it began at every length: its list is resampled linearly.
    """
    values = _AFFINITIES[kind.mode][kind.motion]
    if kind.mode == "loop":
        return [_at(values, frame * (len(values) - 1) / max(num_frames - 1, 1)) for frame in range(num_frames)]
    return [values[min(frame, len(values) - 1)] for frame in range(num_frames)]


def _at(values: tuple[float, ...], place: float) -> float:
    """The value between two of the list, by linear interpolation."""
    before = min(int(place), len(values) - 2)
    share = place - before
    return values[before] * (1 - share) + values[before + 1] * share
