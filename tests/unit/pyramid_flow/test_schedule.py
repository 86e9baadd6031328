import pytest
import torch

from pyramid_serve.pyramid_flow.noise import block_noise
from pyramid_serve.pyramid_flow.schedule import enter_stage, stage


def test_starts_are_the_published_ones() -> None:
    assert [stage(i).start for i in range(3)] == pytest.approx([1.0, 0.80024, 0.50075], abs=1e-5)


def test_a_stage_runs_from_its_own_noise_level_1_to_0() -> None:
    assert stage(1).sigmas(3) == pytest.approx([1.0, 0.5005, 0.001, 0.0])
    assert stage(1).timesteps(2) == pytest.approx([744.0, 386.358])
    assert stage(2).sigmas(1) == [1.0, 0.0]
    assert stage(2).timesteps(1) == [386.0]


def test_zero_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="num_steps=0"):
        stage(0).timesteps(0)


@pytest.mark.parametrize("index", [1, 2])
def test_entering_a_stage_gives_independent_noise_at_that_stages_start(index: int) -> None:
    # At the end of the stage before, latents are (1 - end) clean + end noise. Let the clean part be 0: what is left
    # must be white noise of the standard deviation at which the next stage starts.
    ended = torch.randn(64, 8, 32, 32) * stage(index - 1).end
    entered = enter_stage(ended, block_noise(torch.randn(64, 8, 64, 64)), index)
    assert entered.std().item() == pytest.approx(stage(index).start, rel=0.01)
    beside = (entered[..., ::2] * entered[..., 1::2]).mean() / entered.var()
    assert abs(beside.item()) < 0.01


def test_entering_a_stage_leaves_its_argument_alone() -> None:
    latents = torch.randn(16, 1, 4, 4)
    before = latents.clone()
    enter_stage(latents, torch.randn(16, 1, 8, 8), 1)
    assert torch.equal(latents, before)
