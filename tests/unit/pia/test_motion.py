import pytest

from pyramid_serve.pia.motion import affinities
from pyramid_serve.pia.settings import MotionKind


def test_a_scale_of_diffusers_is_a_mode_and_a_motion_and_back() -> None:
    assert [MotionKind.of_scale(scale).scale for scale in range(9)] == list(range(9))
    assert MotionKind.of_scale(5) == ("loop", "large")


def test_style_goes_by_names_although_its_numbers_differ_between_implementations() -> None:
    small, large = (affinities(MotionKind("style", motion), 16) for motion in ("small", "large"))
    assert (small[0], small[-1], large[-1]) == (0.5, 0.3, 0.2)


def test_the_last_value_repeats_where_a_video_is_longer_than_its_list() -> None:
    assert affinities(MotionKind("animate", "small"), 8) == [1.0, 0.9, 0.85, 0.85, 0.85, 0.8, 0.8, 0.8]


def test_a_video_shorter_than_its_list_has_the_beginning_of_it() -> None:
    assert affinities(MotionKind("animate", "large"), 8) == [1.0, 0.8, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7]


@pytest.mark.parametrize("num_frames", [8, 15, 16, 24, 32])
@pytest.mark.parametrize("motion", ["small", "moderate", "large"])
def test_a_loop_ends_where_it_began_at_every_length(num_frames: int, motion: str) -> None:
    values = affinities(MotionKind("loop", motion), num_frames)  # type: ignore[arg-type]
    assert len(values) == num_frames and values[0] == values[-1] == 1.0
    assert min(values) == pytest.approx({"small": 0.8, "moderate": 0.75, "large": 0.5}[motion], abs=0.06)
