"""Plans: everything that decides a video.

A plan is made once, when a request is accepted, and is kept in the video's record. It says how the video is made unit
by unit, in terms that every part of the pipeline understands; what only the model's own family understands is in
``settings``, which ``family`` tells how to read. So every part can handle the plans of any family, and a record whose
family an installation does not know can still be listed, watched and deleted.
"""

from functools import cached_property
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

KEEP_UNKNOWN = ConfigDict(extra="allow", frozen=True, hide_input_in_errors=True, protected_namespaces=())
"""Of everything in a record: keys that a later release wrote are kept, so that rolling back loses nothing."""


class UnitRun(BaseModel):
    """Equal units in a row."""

    model_config = KEEP_UNKNOWN

    count: Annotated[int, Field(ge=1)]
    num_frames: Annotated[int, Field(ge=1)]
    """Frames that one of these units decodes to."""
    num_steps: Annotated[int, Field(ge=0)]
    """Denoising steps of one of these units, summed over its stages."""
    latent_shape: tuple[int, ...]
    """Of one unit's latents, for example (channels, 1, height, width)."""
    is_picture: bool = False
    """The unit's latents are those of the given picture, and nothing is denoised."""


class Plan(BaseModel):
    """Everything that decides a video, and nothing else. The same plan and model files give the same video.

    Sizes are in pixels.
    """

    model_config = KEEP_UNKNOWN

    family: str
    """The name of the family that made the plan and that reads ``settings``."""
    model: str
    """The public name of the model."""
    prompt: str
    prompt_suffix: str
    negative_prompt: str
    seconds: str
    """The length that was asked for, or else the length that the video has."""
    width: int
    height: int
    fps: Annotated[int, Field(ge=1)]
    """Frames a second."""
    seed: int
    has_picture: bool = False
    """The video is made from ``input.png``."""
    units: Annotated[tuple[UnitRun, ...], Field(min_length=1)]
    """How each unit is made, in order."""
    settings: dict[str, Any] = {}
    """The family's own values, under the names that its request fields have."""

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def full_prompt(self) -> str:
        """The prompt with its suffix, as it is encoded."""
        return self.prompt + self.prompt_suffix

    @property
    def num_units(self) -> int:
        return sum(run.count for run in self.units)

    @property
    def num_frames(self) -> int:
        return sum(run.count * run.num_frames for run in self.units)

    @cached_property
    def num_steps(self) -> int:
        """Denoising steps of the whole video; at least 1, so that it can be divided by."""
        return max(sum(run.count * run.num_steps for run in self.units), 1)

    @property
    def is_conditioned_on_picture(self) -> bool:
        """Whether every unit is denoised with the given picture, which is then no unit by itself."""
        return self.has_picture and not any(run.is_picture for run in self.units)

    def unit(self, number: int) -> UnitRun:
        """How a unit is made. Raises ``IndexError`` for a number that the video does not have."""
        if number >= 0:
            left = number
            for run in self.units:
                if left < run.count:
                    return run
                left -= run.count
        raise IndexError(f"unit={number}: must be from 0 to {self.num_units - 1}")

    def num_frames_before(self, unit: int) -> int:
        """Frames of all units before this one."""
        return sum(num * run.num_frames for num, run in self._runs_before(unit))

    def num_steps_before(self, unit: int) -> int:
        """Denoising steps of all units before this one."""
        return sum(num * run.num_steps for num, run in self._runs_before(unit))

    def _runs_before(self, unit: int) -> list[tuple[int, UnitRun]]:
        """Each run with how many of its units come before ``unit``."""
        runs, left = [], unit
        for run in self.units:
            runs.append((min(left, run.count), run))
            left = max(left - run.count, 0)
        return runs
