from deployments.claims.messages import RunUpdate
from pyramid_serve.api import Stage, Status, TimelineEntry, VideoRecord, new_record
from tests.unit.claims.claims_at_hand import PLAN

ENTRY = TimelineEntry(stage=Stage.DECODE, unit=0, start=1.0, end=2.0, replica="r")


def record(**fields: object) -> VideoRecord:
    return new_record(PLAN).model_copy(update=fields)


def test_an_update_that_tells_nothing_new_changes_nothing() -> None:
    known = record(status=Status.IN_PROGRESS, num_steps_done=5, timeline=(ENTRY,), prompt_truncated_at=3)
    update = RunUpdate(num_steps_done=4, has_started=True, timeline=(ENTRY,), prompt_truncated_at=3)
    assert update.changes(known, now=1.0) == {}


def test_the_first_step_and_the_first_frame_are_dated() -> None:
    changes = RunUpdate(num_steps_done=1, num_units_done=1, has_started=True).changes(record(), now=7.0)
    assert changes == {
        "num_steps_done": 1,
        "num_units_done": 1,
        "status": Status.IN_PROGRESS,
        "started_at": 7.0,
        "first_frame_at": 7.0,
    }


def test_new_entries_follow_those_that_are_known() -> None:
    later = ENTRY.model_copy(update={"unit": 1})
    changes = RunUpdate(timeline=(ENTRY, later)).changes(record(timeline=(ENTRY,)), now=1.0)
    assert changes == {"timeline": (ENTRY, later)}
