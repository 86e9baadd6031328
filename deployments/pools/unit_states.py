"""States of units: when a denoiser takes them, and the bytes as which it hands them out and takes them up again."""

import hashlib
import json
import time
from collections.abc import Callable

import safetensors.torch
import torch

from deployments.pools.model_config import ModelConfig
from pyramid_serve.api import Plan
from pyramid_serve.families import UnitState

_MAX_SHARE = 0.01
"""Of the compute thread's time, for taking states."""
_DIGEST_BYTES = 32
_NUM_STEPS = "num_steps"
_PREFIX = "state."


class StatePace:
    """How often the units of a replica hand out a state: each after so many seconds, and all of them together in less
    than a hundredth of the time.
    """

    def __init__(self, interval_s: float, num_units: Callable[[], int]) -> None:
        """num_units: how many units the replica has now."""
        self._interval_s = interval_s
        self._num_units = num_units
        self._cost_s = 0.0

    def interval_s(self) -> float:
        """Between two states of one unit."""
        return max(self._interval_s, self._num_units() * self._cost_s / _MAX_SHARE)

    def took(self, seconds: float) -> None:
        """A state was taken in this time."""
        self._cost_s = seconds


class StateTaker:
    """Takes states of one unit. ``after_step`` is for the compute thread, ``pop`` for any other."""

    def __init__(self, pace: StatePace) -> None:
        self._pace = pace
        self._last: float | None = None
        self._state: UnitState | None = None

    def after_step(self, take: Callable[[], UnitState]) -> None:
        """Take the state there if it is time to. The time counts from the unit's first step."""
        now = time.monotonic()
        if self._last is None:
            self._last = now
        elif now - self._last >= self._pace.interval_s():
            self._state = take()
            self._last = time.monotonic()
            self._pace.took(self._last - now)

    def pop(self) -> UnitState | None:
        """The newest state, once."""
        state, self._state = self._state, None
        return state


def work_of(plan: Plan, unit: int, config: ModelConfig) -> bytes:
    """What a replica goes on from states of: the same unit of the same plan, made in the same way."""
    made = {
        "plan": plan.model_dump(mode="json"),
        "unit": unit,
        "version": config.model_family.state_version,
        "source": config.source,
        "variant": config.variant,
        "dtype": config.precision.name,
        "device": config.torch_device.type,
    }
    return json.dumps(made, sort_keys=True).encode()


def seal(state: UnitState, work: bytes) -> bytes:
    """A state as bytes that ``unseal`` takes for the same work alone."""
    tensors = {_PREFIX + name: each.clone() for name, each in state.tensors.items()}  # shared memory would be refused
    content = safetensors.torch.save({_NUM_STEPS: torch.tensor(state.num_steps), **tensors})
    return _digest(work, content) + content


def unseal(sealed: bytes, work: bytes) -> UnitState:
    """The state. Raises ``ValueError`` for one of other work, and for bytes that are damaged."""
    digest, content = sealed[:_DIGEST_BYTES], sealed[_DIGEST_BYTES:]
    if digest != _digest(work, content):
        raise ValueError("state: damaged, or of another plan, model or release")
    tensors = safetensors.torch.load(content)
    num_steps = int(tensors.pop(_NUM_STEPS))
    return UnitState(num_steps, {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()})


def _digest(work: bytes, content: bytes) -> bytes:
    hashed = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    hashed.update(len(work).to_bytes(8) + work)
    hashed.update(content)
    return hashed.digest()
