import pytest

from tests.unit.api.plans_at_hand import record_of


def test_the_units_of_a_plan_are_counted_through() -> None:
    plan = record_of(seconds=1, num_inference_steps=2, video_num_inference_steps=1).plan
    assert (plan.num_units, plan.num_frames, plan.num_steps) == (4, 25, 6 + 3 * 3)
    assert [plan.unit(unit).num_frames for unit in range(4)] == [1, 8, 8, 8]
    assert [plan.num_frames_before(unit) for unit in range(5)] == [0, 1, 9, 17, 25]
    assert [plan.num_steps_before(unit) for unit in range(5)] == [0, 6, 9, 12, 15]


@pytest.mark.parametrize("number", [-1, 4])
def test_a_unit_that_the_video_does_not_have_is_named(number: int) -> None:
    with pytest.raises(IndexError, match=rf"unit={number}: must be from 0 to 3"):
        record_of(seconds=1).plan.unit(number)


def test_a_picture_that_is_a_unit_conditions_no_other() -> None:
    plan = record_of(seconds=1, input_reference=b"png").plan
    assert plan.has_picture and not plan.is_conditioned_on_picture
    apart = tuple(run.model_copy(update={"is_picture": False}) for run in plan.units)
    assert plan.model_copy(update={"units": apart}).is_conditioned_on_picture
    assert not record_of(seconds=1).plan.is_conditioned_on_picture
