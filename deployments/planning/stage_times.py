"""How long the stages of a video take, as numbers from which the time of any forward can be computed."""

from collections.abc import Sequence
from dataclasses import dataclass

from pyramid_serve.api import Plan
from pyramid_serve.families import Family, StepRun


@dataclass(frozen=True)
class StageTimes:
    """Seconds of the parts of forwards and of what lies between them.

    A forward of the denoiser takes ``forward_fixed_s``, and for each unit in it ``unit_s`` and for each of the unit's
    sequences of n tokens ``token_s`` n + ``token_squared_s`` n^2; but never less than ``forward_floor_s``.
    """

    source: str
    """Where the numbers come from, for people."""
    num_text_tokens: int
    forward_floor_s: float
    forward_fixed_s: float
    unit_s: float
    token_s: float
    token_squared_s: float
    decode_fixed_s: float
    """Of each forward of the decoder."""
    first_pixel_s: float
    """Of each pixel that the first unit of a video decodes to."""
    pixel_s: float
    """Of each pixel that another unit decodes to."""
    memory_move_s: float
    """Of a video's decoder memory from the host to the device, or back."""
    encode_s: float
    """Of a forward of the text encoder: the prompts that a video brings."""
    save_fixed_s: float
    save_pixel_s: float
    """Of each pixel of a unit, on one core of an orchestrator: making its fragment of the stream and writing it."""
    begin_s: float
    """From the acceptance of a video to the encoding of its prompts, where it need not wait for others."""
    handover_s: float
    """From the end of a unit at the denoiser until the next is there."""
    join_s: float
    """From the last fragment to the completed video."""

    def step_s(self, run: StepRun) -> float:
        """What one step adds to the forward that it is part of."""
        return self.unit_s + sum(n * (self.token_s + n * self.token_squared_s) for n in run.sequence_tokens)

    def forward_s(self, steps: Sequence[float]) -> float:
        """A forward of the denoiser, of steps that take so many seconds each."""
        return max(self.forward_floor_s, self.forward_fixed_s + sum(steps))


@dataclass(frozen=True)
class StepWork:
    """Equal steps in a row: how many, what each counts in a token budget, and what it adds to a forward in seconds."""

    num_steps: int
    num_tokens: int
    seconds: float


@dataclass(frozen=True)
class UnitWork:
    """What one unit takes."""

    steps: tuple[StepWork, ...]
    decode_s: float
    """Added to the forward of the decoder that it is part of."""
    save_s: float


@dataclass(frozen=True)
class VideoWork:
    """What a video of one size and length takes."""

    name: str
    length_s: float
    units: tuple[UnitWork, ...]

    @property
    def denoise_s(self) -> float:
        """Of all its steps, without what each forward takes beside them."""
        return sum(step.num_steps * step.seconds for unit in self.units for step in unit.steps)

    @property
    def decode_s(self) -> float:
        return sum(unit.decode_s for unit in self.units)

    @property
    def save_s(self) -> float:
        return sum(unit.save_s for unit in self.units)


def work_of(plan: Plan, family: Family, times: StageTimes) -> VideoWork:
    """What the video of a plan takes by these times."""
    return VideoWork(
        name=f"{plan.size} {plan.num_frames / plan.fps:.3g} s",
        length_s=plan.num_frames / plan.fps,
        units=tuple(_unit_work(plan, unit, family, times) for unit in range(plan.num_units)),
    )


def _unit_work(plan: Plan, unit: int, family: Family, times: StageTimes) -> UnitWork:
    num_pixels = plan.unit(unit).num_frames * plan.width * plan.height
    return UnitWork(
        steps=tuple(
            StepWork(run.num_steps, sum(run.sequence_tokens), times.step_s(run))
            for run in family.step_runs(plan, unit, num_text_tokens=times.num_text_tokens)
        ),
        decode_s=num_pixels * (times.pixel_s if unit else times.first_pixel_s),
        save_s=times.save_fixed_s + num_pixels * times.save_pixel_s,
    )
