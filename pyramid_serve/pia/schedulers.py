"""The schedulers of diffusers as PIA needs them: linear betas, offset 1, no clipping, whatever the base model says.

A scheduler keeps the state of one video, so each video has its own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

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

_COUNTS = ("_step_index", "counter", "lower_order_nums")
_TENSORS = ("cur_sample",)
_LISTS = ("ets", "model_outputs")
"""What steps change in a scheduler of these classes; each has some of them, and DDIM none."""


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


def scheduler_state(scheduler: Any) -> dict[str, Tensor]:
    """What a scheduler remembers of the steps since its ``set_timesteps``. ``restore`` reads it."""
    own, state = vars(scheduler), {}
    for name in _COUNTS:
        if own.get(name) is not None:
            state[name] = torch.tensor(own[name])
    for name in _TENSORS:
        if own.get(name) is not None:
            state[name] = own[name]
    for name in _LISTS:
        if name in own:
            state[name] = torch.tensor(len(own[name]))
            state |= {f"{name}.{index}": each for index, each in enumerate(own[name]) if each is not None}
    return state


def restore(scheduler: Any, state: Mapping[str, Tensor], *, device: torch.device) -> None:
    """Let a scheduler remember what another of its class did, after the same ``set_timesteps``.

    Raises ``ValueError`` for the state of another class.
    """
    own = vars(scheduler)
    if missing := [name for name in _LISTS if name in own and name not in state]:
        raise ValueError(f"state: has no {missing[0]} of the scheduler")
    for name in _COUNTS:
        if name in own:
            setattr(scheduler, name, int(state[name]) if name in state else None)
    for name in _TENSORS:
        if name in own:
            setattr(scheduler, name, state[name].to(device) if name in state else None)
    for name in _LISTS:
        if name in own:
            entries = (state.get(f"{name}.{index}") for index in range(int(state[name])))
            setattr(scheduler, name, [None if each is None else each.to(device) for each in entries])
