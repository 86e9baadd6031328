"""The order of videos and how long they take. No clock: every time is passed in."""

import pytest

from deployments.claims.queue import StepRate, next_up, num_steps_of, places_of, retry_after_s
from pyramid_serve.api import Status, VideoRecord, new_record, new_video_id
from tests.unit.claims.claims_at_hand import PLAN

NUM_STEPS = num_steps_of(new_record(PLAN))


def record_at(created_at: float, **fields: object) -> VideoRecord:
    return new_record(PLAN).model_copy(update={"id": new_video_id(created_at), **fields})


def by_id(*records: VideoRecord) -> dict[str, VideoRecord]:
    return {record.id: record for record in records}


def in_progress(created_at: float, **fields: object) -> VideoRecord:
    return record_at(created_at, status=Status.IN_PROGRESS, owner="a", started_at=100.0, **fields)


def test_the_oldest_are_handed_out_first_whatever_order_they_are_known_in() -> None:
    old, middle, young = (record_at(seconds) for seconds in (1.0, 2.0, 3.0))
    ready = next_up(by_id(young, old, middle), running=(), max_running=2, now=10.0)
    assert ready == [old.id, middle.id]


def test_those_that_run_or_have_an_owner_take_a_place_and_are_not_handed_out_again() -> None:
    owned, handed_out, first, second = record_at(1.0, owner="a"), record_at(2.0), record_at(3.0), record_at(4.0)
    records = by_id(owned, handed_out, first, second)
    assert next_up(records, running={handed_out.id}, max_running=3, now=10.0) == [first.id]
    assert next_up(records, running={handed_out.id}, max_running=1, now=10.0) == []


def test_a_video_that_has_failed_waits_for_its_time() -> None:
    record = record_at(1.0, not_before=20.0)
    assert next_up(by_id(record), running=(), max_running=1, now=19.9) == []
    assert next_up(by_id(record), running=(), max_running=1, now=20.0) == [record.id]


def test_a_place_counts_the_older_ones_that_wait() -> None:
    running, first, second = in_progress(1.0), record_at(2.0), record_at(3.0)
    records = by_id(second, running, first)
    assert [places_of(records, rate=None, now=110.0)[record.id].position for record in (running, first, second)] == [
        None,
        0,
        1,
    ]


def test_a_video_that_waits_is_done_when_all_older_ones_are() -> None:
    running, first, second = in_progress(1.0, num_steps_done=NUM_STEPS - 10), record_at(2.0), record_at(3.0)
    records = by_id(running, first, second)
    assert places_of(records, rate=2.0, now=110.0)[first.id].eta_seconds == (10 + NUM_STEPS) / 2
    assert places_of(records, rate=2.0, now=110.0)[second.id].eta_seconds == (10 + 2 * NUM_STEPS) / 2
    assert places_of(records, rate=None, now=110.0)[second.id].eta_seconds is None


def test_a_video_in_progress_goes_on_at_its_own_speed() -> None:
    half = in_progress(1.0, num_steps_done=NUM_STEPS // 2, num_units_done=PLAN.num_units // 2)
    done = (half.num_steps_done / NUM_STEPS + half.num_units_done / PLAN.num_units) / 2
    eta_seconds = places_of(by_id(half), rate=None, now=130.0)[half.id].eta_seconds
    assert eta_seconds == pytest.approx(30.0 * (1 - done) / done)


def test_a_video_that_has_just_begun_goes_by_the_speed_of_all() -> None:
    begun = in_progress(1.0)
    assert places_of(by_id(begun), rate=2.0, now=130.0)[begun.id].eta_seconds == NUM_STEPS / 2


@pytest.mark.parametrize(("rate", "seconds"), [(None, 5), (NUM_STEPS / 30.0, 30), (1e9, 1), (1e-9, 120)])
def test_a_full_queue_says_when_to_come_again(rate: float | None, seconds: int) -> None:
    assert retry_after_s(by_id(record_at(1.0)), rate=rate) == seconds


def test_a_queue_in_which_none_waits_says_five_seconds() -> None:
    assert retry_after_s(by_id(in_progress(1.0)), rate=1.0) == 5


def test_the_rate_is_that_of_the_last_minute() -> None:
    rate = StepRate()
    assert rate.per_second(now=0.0) is None
    rate.count(1000, now=0.0)
    assert rate.per_second(now=1.0) is None
    rate.count(20, now=50.0)
    assert rate.per_second(now=60.0) == 1020 / 60
    rate.count(10, now=70.0)
    assert rate.per_second(now=100.0) == 30 / 50
    assert rate.per_second(now=1000.0) is None


def test_there_is_no_rate_where_nothing_is_done() -> None:
    rate = StepRate()
    rate.count(0, now=0.0)
    rate.count(0, now=1.0)
    assert rate.per_second(now=2.0) is None


def test_of_videos_that_are_suspected_one_is_handed_out_at_a_time() -> None:
    suspects = [record_at(at).model_copy(update={"num_losses": 2}) for at in (1.0, 2.0)]
    other = record_at(3.0)
    records = by_id(*suspects, other)
    assert next_up(records, running=(), max_running=9, now=10.0) == [suspects[0].id, other.id]
    assert next_up(records, running={suspects[0].id}, max_running=9, now=10.0) == [other.id]


def test_a_clock_that_is_set_back_does_not_keep_a_video_waiting() -> None:
    record = record_at(1.0).model_copy(update={"not_before": 5000.0})
    assert next_up(by_id(record), running=(), max_running=1, now=4990.0) == []
    assert next_up(by_id(record), running=(), max_running=1, now=1000.0) == [record.id]
