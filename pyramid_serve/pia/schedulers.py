"""The schedulers of diffusers as PIA needs them: linear betas, offset 1, no clipping, whatever the base model says.

A scheduler keeps the state of one video, so each video has its own.
"""

from collections.abc import Mapping
from typing import Any

from pyramid_serve.pia.settings import SchedulerName

SCHEDULER_CLASSES: dict[SchedulerName, str] = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "pndm": "PNDMScheduler",
    "lcm": "LCMScheduler",
}
_TRAINED_WITH = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "linear",
    "trained_betas": None,
    "steps_offset": 1,
    "clip_sample": False,
}
"""What the motion modules were trained with. A base model says "scaled_linear", which makes the motion flicker."""
_PLAIN_STEPS = {"skip_prk_steps": True}
"""PNDM without its Runge-Kutta steps, of which each takes several turns of the UNet."""


def new_scheduler(name: SchedulerName, config: Mapping[str, Any]) -> Any:
    """A scheduler for one video. config: the base model's ``scheduler_config.json``, of which the rest is kept."""
    import diffusers  # here, since it takes seconds to import

    needed = _TRAINED_WITH | (_PLAIN_STEPS if name == "pndm" else {})
    return getattr(diffusers, SCHEDULER_CLASSES[name]).from_config({**config, **needed})
