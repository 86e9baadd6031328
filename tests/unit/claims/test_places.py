import time

import pytest

from deployments.claims import places
from deployments.claims.places import NOWHERE, Places
from deployments.claims.queue import StepRate
from pyramid_serve.api import VideoRecord, new_record
from tests.unit.claims.claims_at_hand import PLAN


def test_one_that_comes_stands_behind_all_others_without_a_look_at_them(monkeypatch: pytest.MonkeyPatch) -> None:
    records: dict[str, VideoRecord] = {}
    found = Places(records, StepRate())

    def add() -> str:
        record = new_record(PLAN)
        records[record.id] = record
        return record.id

    first = sorted(add() for _ in range(3))  # ids of the same millisecond come in any order
    assert [found.of(video_id).position for video_id in first] == [0, 1, 2]
    monkeypatch.setattr(found, "_kept_s", 10.0)
    monkeypatch.setattr(places, "places_of", None)  # so nothing is computed anew
    later = [add() for _ in range(2)]
    assert [found.of(video_id).position for video_id in later] == [3, 4]
    assert found.all().keys() == records.keys()
    assert found.of("video_" + 32 * "0") == NOWHERE


def test_the_places_of_few_are_always_new() -> None:
    first, second = sorted([new_record(PLAN), new_record(PLAN)], key=lambda record: record.id)
    records = {first.id: first, second.id: second}
    found = Places(records, StepRate())
    assert found.of(second.id).position == 1
    del records[first.id]
    soon = time.monotonic() + places._MAX_KEPT_S / 2  # a busy machine may interrupt the look
    while found.of(second.id).position != 0:
        assert time.monotonic() < soon
        time.sleep(0.01)
