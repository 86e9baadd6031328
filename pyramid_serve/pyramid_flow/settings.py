"""How a video is sampled: denoising steps and guidance. Plain values, without torch."""

from dataclasses import dataclass
from typing import Literal

from pyramid_serve.api.limits import MAX_STEPS
from pyramid_serve.checks import real_number, whole_number
from pyramid_serve.pyramid_flow.shapes import NUM_STAGES

AttentionName = Literal["dense", "blocks", "flex"]
"""See :mod:`attention`."""
CompiledName = Literal["blocks", "none"]
"""See :mod:`compiled`."""
Steps = tuple[int, int, int]
"""Denoising steps of each stage."""

MAX_GUIDANCE = 100.0


@dataclass(frozen=True)
class LinearGuidance:
    """Guidance that falls with the unit: ``max(guidance_scale - alpha * unit, minimum)``."""

    alpha: float = 0.5
    minimum: float = 2.0

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("minimum", self.minimum)):
            number = real_number(f"linear_guidance.{name}", value, least=0, most=MAX_GUIDANCE)
            object.__setattr__(self, name, number)


@dataclass(frozen=True)
class SamplingSettings:
    """Steps of each stage and strength of guidance, for unit 0 and for the others (``video_``).

    A ``guidance_scale`` of 0 switches guidance off for all units, as in the published code: the prompt alone counts.
    """

    num_inference_steps: Steps = (20, 20, 20)
    video_num_inference_steps: Steps = (10, 10, 10)
    guidance_scale: float = 7.0
    video_guidance_scale: float = 5.0
    linear_guidance: LinearGuidance | None = None

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "video_num_inference_steps"):
            object.__setattr__(self, name, _checked_steps(name, getattr(self, name)))
        for name in ("guidance_scale", "video_guidance_scale"):
            scale = real_number(name, getattr(self, name), least=0, most=MAX_GUIDANCE)
            object.__setattr__(self, name, scale)
        if self.linear_guidance is not None and not isinstance(self.linear_guidance, LinearGuidance):
            raise ValueError(f"linear_guidance={self.linear_guidance!r:.60}: must be a LinearGuidance or None")

    def steps_of(self, unit: int) -> Steps:
        return self.num_inference_steps if unit == 0 else self.video_num_inference_steps

    def num_steps_of(self, unit: int) -> int:
        """Denoising steps of a unit, over all its stages."""
        return sum(self.steps_of(unit))

    def guidance_of(self, unit: int) -> float:
        """Guidance of a unit; at 1 the negative prompt has no part in the result."""
        if self.guidance_scale == 0:
            return 1.0
        if self.linear_guidance is not None:
            return max(self.guidance_scale - self.linear_guidance.alpha * unit, self.linear_guidance.minimum)
        return self.guidance_scale if unit == 0 else self.video_guidance_scale


def _checked_steps(name: str, steps: object) -> Steps:
    given = steps if isinstance(steps, list | tuple) else ()
    try:
        first, second, third = (whole_number(name, number, least=1, most=MAX_STEPS) for number in given)
    except ValueError:
        raise ValueError(
            f"{name}={steps!r:.60}: must be {NUM_STAGES} whole numbers from 1 to {MAX_STEPS}, one for each stage"
        ) from None
    return first, second, third
