import pytest
import torch
from diffusers.pipelines.free_init_utils import FreeInitMixin

from pyramid_serve.pia.free_init import low_pass_filter, mix
from pyramid_serve.pia.settings import FreeInit, steps_of_iterations

SHAPE = (6, 5, 8)


@pytest.mark.parametrize("method", ["butterworth", "ideal", "gaussian"])
@pytest.mark.parametrize(("order", "spatial", "temporal"), [(4, 0.25, 0.25), (2, 0.5, 0.3), (1, 1.0, 0.1), (4, 0, 0.5)])
def test_a_filter_is_that_of_diffusers(method: str, order: int, spatial: float, temporal: float) -> None:
    settings = FreeInit(
        method=method, order=order, spatial_stop_frequency=spatial, temporal_stop_frequency=temporal  # type: ignore[arg-type]
    )  # fmt: skip
    expected = FreeInitMixin()._get_free_init_freq_filter(SHAPE, "cpu", method, order, spatial, temporal)
    torch.testing.assert_close(low_pass_filter(settings, SHAPE), expected, rtol=0, atol=1e-7)


def test_a_filter_is_made_once_for_a_shape_and_a_setting() -> None:
    assert low_pass_filter(FreeInit(), SHAPE) is low_pass_filter(FreeInit(num_iters=5), SHAPE)
    assert low_pass_filter(FreeInit(), SHAPE) is not low_pass_filter(FreeInit(order=2), SHAPE)


def test_frequencies_are_mixed_as_diffusers_does() -> None:
    low, high = torch.randn(4, *SHAPE), torch.randn(4, *SHAPE)
    passed = low_pass_filter(FreeInit(), SHAPE)
    expected = FreeInitMixin()._apply_freq_filter(low, high, passed)
    torch.testing.assert_close(mix(low, high, passed), expected, rtol=0, atol=1e-6)


def test_fast_sampling_takes_more_steps_from_time_to_time() -> None:
    assert steps_of_iterations(6, FreeInit(num_iters=3, use_fast_sampling=True)) == [2, 4, 6]
    assert steps_of_iterations(1, FreeInit(num_iters=3, use_fast_sampling=True)) == [1, 1, 1]
    assert steps_of_iterations(6, FreeInit(num_iters=3)) == [6, 6, 6]
    assert steps_of_iterations(6, None) == [6]


def test_a_frequency_next_to_zero_lets_nothing_pass() -> None:
    for low in (1e-170, 1e-310):
        assert not low_pass_filter(FreeInit(spatial_stop_frequency=low), (4, 4, 4)).any()
        assert not low_pass_filter(FreeInit(temporal_stop_frequency=low), (4, 4, 4)).any()
