from collections.abc import Sequence
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from pyramid_serve.pyramid_flow.noise import SeededNoise
from pyramid_serve.pyramid_flow.pack import ClipSequence
from pyramid_serve.pyramid_flow.sampler import UnitSteps, denoise_unit, run_units
from pyramid_serve.pyramid_flow.settings import LinearGuidance, SamplingSettings
from pyramid_serve.pyramid_flow.shapes import LatentShape
from tests.unit.pyramid_flow.transformers_at_hand import largest_difference, random_prompt, tiny_transformers

SHAPE = LatentShape(4, 16, 24)
SETTINGS = SamplingSettings(num_inference_steps=(3, 2, 1), video_num_inference_steps=(1, 1, 1))


def unit_steps(*, unit: int = 0, seed: int = 0, settings: SamplingSettings = SETTINGS) -> UnitSteps:
    torch.manual_seed(seed)
    prompt, negative = random_prompt(), random_prompt(3)
    history = torch.randn(16, unit, 16, 24)
    return denoise_unit(prompt, negative, history, settings=settings, noise=SeededNoise(seed, SHAPE))


def test_guidance_goes_from_the_negative_to_the_positive_and_beyond() -> None:
    def predict(sequences: Sequence[ClipSequence]) -> list[Tensor]:
        negative, positive = sequences
        assert negative.prompt.prompt_embeds.shape[0] == 3
        return [torch.zeros_like(negative.clips[-1]), torch.ones_like(positive.clips[-1])]

    one_step = SamplingSettings((1, 1, 1), (1, 1, 1), guidance_scale=5.0)
    steps = unit_steps(settings=one_step)
    first = next(steps)
    second = steps.send(predict(first))
    # One Euler step of a stage goes from sigma 1 to 0 along the guided prediction: here 5 everywhere. What the second
    # stage starts from is that, upsampled and renoised.
    ended = first[0].clips[-1] - 5.0
    mean_of_blocks = torch.nn.functional.avg_pool2d(second[0].clips[-1], 2)
    alpha = (mean_of_blocks / ended).median()
    assert torch.allclose(mean_of_blocks, alpha * ended, atol=1e-4)


def test_guidance_of_one_leaves_the_negative_out() -> None:
    settings = SamplingSettings((1, 1, 1), (1, 1, 1), guidance_scale=1.0)
    (only,) = next(unit_steps(settings=settings))
    assert only.prompt.prompt_embeds.shape[0] == 6


def test_each_stage_takes_its_own_number_of_steps_and_timesteps() -> None:
    steps, timesteps = unit_steps(), []
    try:
        sequences = next(steps)
        while True:
            timesteps.append((sequences[1].timestep, tuple(sequences[1].clips[-1].shape[2:])))
            sequences = steps.send([torch.zeros_like(s.clips[-1]) for s in sequences])
    except StopIteration as finished:
        assert finished.value.shape == (16, 1, 16, 24)
    low, middle, full = (4, 6), (8, 12), (16, 24)
    assert [size for _, size in timesteps] == [low] * 3 + [middle] * 2 + [full]
    assert [t for t, _ in timesteps] == pytest.approx([1000, 872.128, 744.256, 744, 386.358, 386])


def test_units_run_side_by_side_equal_each_alone() -> None:
    for model in tiny_transformers():
        plans = [{"unit": 0, "seed": 1}, {"unit": 3, "seed": 2}, {"unit": 1, "seed": 3}]
        alone = [run_units(model, [unit_steps(**plan)])[0] for plan in plans]
        assert largest_difference(run_units(model, [unit_steps(**plan) for plan in plans]), alone) <= 1e-5


def test_the_same_inputs_give_the_same_bits() -> None:
    model = tiny_transformers()[1]
    a, b = (run_units(model, [unit_steps(unit=2)])[0] for _ in range(2))
    assert torch.equal(a, b)


def test_linear_guidance_falls_to_its_minimum() -> None:
    settings = SamplingSettings(guidance_scale=7.0, linear_guidance=LinearGuidance(alpha=0.5, minimum=2.0))
    assert [settings.guidance_of(unit) for unit in (0, 1, 4, 30)] == [7.0, 6.5, 5.0, 2.0]
    assert [SamplingSettings().guidance_of(unit) for unit in (0, 1, 30)] == [7.0, 5.0, 5.0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_inference_steps", (20, 20)),
        ("num_inference_steps", (0, 1, 1)),
        ("num_inference_steps", (2.5, 1, 1)),
        ("num_inference_steps", (True, 1, 1)),
        ("num_inference_steps", ("4", 1, 1)),
        ("num_inference_steps", "456"),
        ("num_inference_steps", 20),
        ("num_inference_steps", None),
        ("video_num_inference_steps", (1, 1, 2000)),
        ("video_num_inference_steps", (float("nan"), 1, 1)),
        ("guidance_scale", -1.0),
        ("guidance_scale", "7"),
        ("guidance_scale", True),
        ("guidance_scale", None),
        ("guidance_scale", 10**400),
        ("video_guidance_scale", float("nan")),
        ("video_guidance_scale", float("inf")),
        ("linear_guidance", 0.5),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field}="):
        SamplingSettings(**{field: value})


def test_guidance_of_zero_is_off_for_every_unit() -> None:
    settings = SamplingSettings(guidance_scale=0.0, video_guidance_scale=5.0)
    assert {settings.guidance_of(unit) for unit in range(3)} == {1.0}
    assert len(next(unit_steps(unit=1, settings=settings))) == 1
    on = SamplingSettings(guidance_scale=5.0, video_guidance_scale=0.0)
    assert len(next(unit_steps(unit=1, settings=on))) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 101, "1", True, None])
@pytest.mark.parametrize("field", ["alpha", "minimum"])
def test_linear_guidance_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^linear_guidance.{field}="):
        LinearGuidance(**{field: value})


def test_numbers_of_numpy_are_numbers() -> None:
    given: Any = SamplingSettings(
        num_inference_steps=tuple(numpy.array([3, 2, 1])),
        video_num_inference_steps=[1, 1, numpy.int32(1)],  # type: ignore[arg-type]
        guidance_scale=numpy.float32(4),  # type: ignore[arg-type]
        video_guidance_scale=numpy.int64(2),  # type: ignore[arg-type]
    )
    assert given == SamplingSettings((3, 2, 1), (1, 1, 1), 4.0, 2.0)
    assert {type(number) for number in given.num_inference_steps} == {int}
