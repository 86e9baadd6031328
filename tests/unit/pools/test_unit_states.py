"""When states of units are taken, and as which bytes they go."""

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.pools.denoiser import DenoiserConfig
from deployments.pools.unit_states import StatePace, StateTaker, seal, unseal, work_of
from pyramid_serve.families import UnitState
from pyramid_serve.pia.family import PIAFamily
from tests.unit.pia.golden import CHECKPOINT
from tests.unit.pia.models_at_hand import plan_of, with_settings

PLAN = plan_of()
STATE = UnitState(
    3,
    {
        "latents": torch.randn(4, 2, 3, 5),
        "half": torch.randn(7).bfloat16(),
        "": torch.tensor(2),
        "num_steps": torch.ones(2),
    },
)


def config_of(source: Path = CHECKPOINT, **fields: Any) -> DenoiserConfig:
    return DenoiserConfig(source=str(source), device="cpu", **{"dtype": "float32", **fields})


def test_a_state_comes_back_as_it_was() -> None:
    shared = torch.randn(3)
    state = dataclasses.replace(STATE, tensors={**STATE.tensors, "one": shared, "other": shared, "part": shared[1:]})
    work = work_of(PLAN, 0, config_of())
    back = unseal(seal(state, work), work)
    assert back.num_steps == 3 and back.tensors.keys() == state.tensors.keys()
    for name, tensor in state.tensors.items():
        assert back.tensors[name].dtype == tensor.dtype and torch.equal(back.tensors[name], tensor)


def test_a_state_that_was_damaged_is_refused() -> None:
    work = work_of(PLAN, 0, config_of())
    sealed = seal(STATE, work)
    damaged = [sealed[:end] for end in (0, 1, 31, 32, 40, len(sealed) - 1)] + [sealed + b"x"]
    for place in range(0, len(sealed), 7):
        damaged.append(sealed[:place] + bytes([sealed[place] ^ 1]) + sealed[place + 1 :])
    for content in damaged:
        with pytest.raises(ValueError, match="state: damaged, or of another plan, model or release"):
            unseal(content, work)


def test_a_state_of_other_work_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sealed = seal(STATE, work_of(PLAN, 0, config_of()))
    assert unseal(sealed, work_of(PLAN.model_validate_json(PLAN.model_dump_json()), 0, config_of())).num_steps == 3
    others = [
        work_of(PLAN, 1, config_of()),
        work_of(PLAN.model_copy(update={"seed": 2}), 0, config_of()),
        work_of(plan_of(guidance_scale=7), 0, config_of()),
        work_of(PLAN, 0, config_of(dtype="bfloat16")),
        work_of(PLAN, 0, config_of(with_settings(tmp_path))),
    ]
    monkeypatch.setattr(PIAFamily, "state_version", "2")
    others.append(work_of(PLAN, 0, config_of()))
    for work in others:
        with pytest.raises(ValueError, match="of another plan, model or release"):
            unseal(sealed, work)


class Clock:
    """In place of the module ``time``."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("deployments.pools.unit_states.time", clock)
    return clock


def steps_at_which_a_state_is_taken(clock: Clock, taker: StateTaker, *, num_steps: int, seconds: float) -> list[int]:
    """Of so many steps, each taking a second and each state so many seconds."""
    taken = []
    for step in range(1, num_steps + 1):
        clock.now += 1.0

        def take(step: int = step) -> UnitState:
            clock.now += seconds
            return UnitState(step, {})

        taker.after_step(take)
        if (state := taker.pop()) is not None:
            taken.append(state.num_steps)
    return taken


def test_a_state_is_taken_every_so_many_seconds_from_the_first_step_on(clock: Clock) -> None:
    clock.now += 1000.0  # in the queue
    taker = StateTaker(StatePace(3.0, lambda: 1))
    assert steps_at_which_a_state_is_taken(clock, taker, num_steps=11, seconds=0.0) == [4, 7, 10]
    assert taker.pop() is None


def test_states_take_less_than_a_hundredth_of_the_time_however_many_units_there_are(clock: Clock) -> None:
    for num_units in (1, 4):
        taker = StateTaker(StatePace(3.0, lambda num=num_units: num))  # type: ignore[misc]
        taken = steps_at_which_a_state_is_taken(clock, taker, num_steps=300, seconds=0.2)
        assert taken[0] == 4
        assert all(after - before in (20 * num_units, 20 * num_units + 1) for before, after in pairwise(taken))
