"""The schedulers of diffusers as PIA needs them: linear betas, offset 1, no clipping, whatever the base model says.

A scheduler keeps the state of one video, so each video has its own.
"""

from collections.abc import Mapping
from typing import Any

from pyramid_serve.checkpoints.sources import CheckpointError
from pyramid_serve.pia.settings import SchedulerName
from pyramid_serve.reasons import first_line

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
    "thresholding": False,
    "rescale_betas_zero_snr": False,
}
"""What the motion modules were trained with. A base model says "scaled_linear", which makes the motion flicker."""
_PLAIN_STEPS = {"skip_prk_steps": True}
"""PNDM without its Runge-Kutta steps, of which each takes several turns of the UNet."""


def new_scheduler(name: SchedulerName, config: Mapping[str, Any]) -> Any:
    """A scheduler for one video. config: the base model's ``scheduler_config.json``, of which the rest is kept."""
    import diffusers  # here, since it takes seconds to import

    needed = _TRAINED_WITH | (_PLAIN_STEPS if name == "pndm" else {})
    if name == "dpm++":  # without noise of its own at each step, which would not come from the video's seed
        needed |= {"algorithm_type": str(config.get("algorithm_type", "dpmsolver++")).removeprefix("sde-")}
    return getattr(diffusers, SCHEDULER_CLASSES[name]).from_config({**config, **needed})


def check_schedulers(config: Mapping[str, Any]) -> None:
    """``CheckpointError`` where a scheduler cannot be made of a base model's ``scheduler_config.json``."""
    for name in SCHEDULER_CLASSES:
        try:
            new_scheduler(name, config).set_timesteps(2)
        except Exception as error:  # diffusers raises any class
            raise CheckpointError(f"scheduler_config.json: cannot be used for {name}: {first_line(error)}") from error
