"""A video that is interrupted after any step and goes on from its state has the bits of one that is not."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from pyramid_serve.families import UnitInput, UnitState
from pyramid_serve.pia.noise import SeededNoise
from pyramid_serve.pia.sampler import Conditioning, SamplingSettings, Steps, UNetRow, denoise
from pyramid_serve.pia.sampler_state import SamplerState
from pyramid_serve.pia.schedulers import SCHEDULER_CLASSES, new_scheduler, restore, scheduler_state
from pyramid_serve.pia.settings import FreeInit, MotionKind, SchedulerName, num_steps
from pyramid_serve.pia.whole import load_pipeline
from tests.unit.pia.golden import picture
from tests.unit.pia.models_at_hand import plan_of
from tests.unit.pia.tiny import SCHEDULER

NUM_STEPS = 6
WAYS: dict[str, dict[str, Any]] = {
    "guided": {},
    "not guided": {"guidance_scale": 1.0},
    "from the picture": {"strength": 0.7},
    "free init": {"free_init": FreeInit(num_iters=3)},
    "free init, fast": {"free_init": FreeInit(num_iters=3, use_fast_sampling=True)},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "as published": SCHEDULER,
    "linspace, third order": {**SCHEDULER, "timestep_spacing": "linspace", "solver_order": 3},
    "trailing, sigmas of Karras": {**SCHEDULER, "timestep_spacing": "trailing", "use_karras_sigmas": True},
}


def settings_of(scheduler: SchedulerName, **fields: Any) -> SamplingSettings:
    plain = {"num_inference_steps": NUM_STEPS, "guidance_scale": 7.5, **fields}
    return SamplingSettings(motion=MotionKind("animate", "large"), num_frames=8, scheduler=scheduler, **plain)


def predictions(rows: Sequence[UNetRow]) -> list[Tensor]:
    """As unlike each other and as little linear as those of a UNet, and quicker."""
    return [
        torch.tanh(
            row.sample[:4] + row.sample[4:5] * row.sample[5:] + torch.sin(row.timestep + row.prompt_embeds.sum())
        )
        for row in rows
    ]


def given() -> Conditioning:
    drawn = iter(torch.randn(4, 4, 6, 8, generator=torch.Generator().manual_seed(3)))
    prompt, negative, mean, std = drawn
    return Conditioning(prompt, negative, mean, std.abs())


def steps_of(settings: SamplingSettings, config: dict[str, Any], **resumed: Any) -> Steps:
    scheduler = new_scheduler(settings.scheduler, config)
    return denoise(given(), settings, scheduler=scheduler, noise=SeededNoise(5), **resumed)


def run(steps: Steps) -> tuple[Tensor, int]:
    """The latents, and how many steps it took."""
    count, responses = 0, None
    while True:
        try:
            responses = predictions(steps.send(responses))  # type: ignore[arg-type]
        except StopIteration as finished:
            return finished.value, count
        count += 1


def through_a_file(state: SamplerState) -> SamplerState:
    return SamplerState.of_tensors(safetensors.torch.load(safetensors.torch.save(state.as_tensors())))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scheduler", SCHEDULER_CLASSES)
def test_a_video_goes_on_after_any_step_with_the_same_bits(scheduler: SchedulerName, way: str, config: str) -> None:
    settings = settings_of(scheduler, **WAYS[way])
    spacing = CONFIGS[config].get("timestep_spacing", "leading")
    if settings.free_init is not None and spacing == "leading" and scheduler == "euler":
        pytest.skip("Euler has no sigma for the last timestep then; such a request is refused")
    states: list[SamplerState] = []
    whole, count = run(steps_of(settings, CONFIGS[config], on_step=lambda take: states.append(take())))
    planned = num_steps(scheduler, NUM_STEPS, strength=settings.strength, free_init=settings.free_init)
    assert len(states) == count == planned
    for num_done, state in enumerate(states, 1):
        again: list[SamplerState] = []
        resumed = steps_of(
            settings,
            CONFIGS[config],
            state=through_a_file(state),
            on_step=lambda take: again.append(take()),  # noqa: B023
        )
        latents, num_left = run(resumed)
        assert num_left == planned - num_done
        assert torch.equal(latents, whole)
        for one, other in zip(again, states[num_done:], strict=True):  # so that it may be interrupted again
            assert one.as_tensors().keys() == other.as_tensors().keys()
            assert all(map(torch.equal, one.as_tensors().values(), other.as_tensors().values()))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", SCHEDULER_CLASSES)
def test_a_state_has_everything_that_a_step_changes_in_a_scheduler(name: SchedulerName, config: str) -> None:
    schedulers = [new_scheduler(name, CONFIGS[config]) for _ in range(2)]
    for scheduler in schedulers:
        scheduler.set_timesteps(NUM_STEPS)
    stepped, fresh = schedulers
    latents = torch.randn(4, 8, 6, 8, generator=torch.Generator().manual_seed(1))
    for timestep in stepped.timesteps[:3]:
        latents = stepped.step(latents.cos(), timestep, stepped.scale_model_input(latents, timestep)).prev_sample
    restore(fresh, scheduler_state(stepped), device=torch.device("cpu"))
    differing = {key for key in vars(stepped) if not is_same(vars(stepped)[key], vars(fresh).get(key))}
    assert differing <= {"is_scale_input_called", "sigma_data"}  # whether it warns, and a constant


def is_same(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    return bool(repr(one) == repr(other))


def test_a_state_of_another_scheduler_is_refused() -> None:
    states: list[SamplerState] = []
    run(steps_of(settings_of("ddim"), SCHEDULER, on_step=lambda take: states.append(take())))
    with pytest.raises(ValueError, match="state: has no ets"):
        run(steps_of(settings_of("pndm"), SCHEDULER, state=states[1]))
    with pytest.raises(ValueError, match="state: has no 'latents'"):
        SamplerState.of_tensors({"iteration": torch.tensor(0), "step": torch.tensor(0)})


def test_the_unet_makes_the_same_video_from_any_state(tiny: Path) -> None:
    pipeline = load_pipeline(tiny, variant=None, dtype="float32", device="cpu")
    plan = plan_of(num_inference_steps=2, free_init={"num_iters": 2}, scheduler="pndm", num_frames=8)
    prompt, negative = pipeline.text.encode([plan.full_prompt, plan.negative_prompt])
    condition = pipeline.decode.encode_picture(picture(), height=plan.height, width=plan.width)
    states: list[UnitState] = []

    def make(**resumed: Any) -> Tensor:
        steps = pipeline.denoise.steps(UnitInput(plan, 0, prompt.tensors, negative.tensors, condition, (), **resumed))
        responses: Any = None
        while True:
            try:
                responses = pipeline.denoise.forward(steps.send(responses))
            except StopIteration as finished:
                latents: Tensor = finished.value
                return latents

    whole = make(on_step=lambda take: states.append(take()))
    assert [state.num_steps for state in states] == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(make(state=state), whole) for state in (states[1], states[4]))
