import pytest

from deployments.telemetry.timelines import StageSeconds, handover_seconds, hidden_share, stage_seconds
from pyramid_serve.api import Stage, TimelineEntry, VideoRecord, new_record
from tests.unit.api.plans_at_hand import SMALL, plan_of


def entry(stage: Stage, unit: int | None, start: float, end: float, replica: str = "a") -> TimelineEntry:
    return TimelineEntry(stage=stage, unit=unit, start=1000 + start, end=1000 + end, replica=replica)


@pytest.mark.parametrize(
    ("denoise_of_unit_1", "share"), [((4, 6), 1.0), ((5, 9), 0.5), ((6, 7), 0.0), ((4.5, 5), 0.25), ((0, 20), 1.0)]
)
def test_hidden_decoding_is_that_during_the_denoising_of_later_units(
    denoise_of_unit_1: tuple[float, float], share: float
) -> None:
    timeline = [
        entry(Stage.DENOISE, 0, 0, 20),
        entry(Stage.DECODE, 0, 4, 6),
        entry(Stage.DENOISE, 1, *denoise_of_unit_1),
        entry(Stage.DECODE, 1, 9, 99),
    ]
    assert hidden_share(timeline) == pytest.approx(share)


def test_overlapping_units_are_counted_once() -> None:
    timeline = [
        entry(Stage.DECODE, 0, 0, 10),
        entry(Stage.DENOISE, 1, 0, 4),
        entry(Stage.DENOISE, 2, 2, 6),
        entry(Stage.DECODE, 2, 20, 30),
    ]
    assert hidden_share(timeline) == pytest.approx(0.6)


def test_a_single_unit_hides_nothing() -> None:
    assert hidden_share([entry(Stage.DENOISE, 0, 0, 1), entry(Stage.DECODE, 0, 1, 2)]) is None


def test_handovers_are_the_gaps_between_a_videos_units() -> None:
    times = [(0.0, 1.0), (1.5, 2.0), (2.25, 3.0)]
    timeline = [entry(Stage.DENOISE, unit, start, end) for unit, (start, end) in enumerate(times)]
    assert handover_seconds(timeline[::-1]) == pytest.approx(0.75)


def completed(*, unit_1_s: float) -> VideoRecord:
    timeline = (
        entry(Stage.ENCODE, None, 1, 1.5),
        entry(Stage.DENOISE, 0, 2, 4),
        entry(Stage.DECODE, 0, 4, 5),
        entry(Stage.SAVE, 0, 5, 5.25),
        entry(Stage.DENOISE, 1, 4.5, 4.5 + unit_1_s),
        entry(Stage.DECODE, 1, 9, 12),
        entry(Stage.SAVE, 1, 12, 12.25),
        entry(Stage.SAVE, None, 12.5, 13),
    )
    plan = plan_of(SMALL, seconds=0.4, size="128x64")
    return new_record(plan).changed(created_at=1000.0, completed_at=1014.0, timeline=timeline)


def test_the_seconds_of_stages_are_means_over_videos() -> None:
    assert stage_seconds([completed(unit_1_s=2.0), completed(unit_1_s=4.0)]) == StageSeconds(
        begin=1.0,
        encode=0.5,
        denoise=(2.0, 3.0),
        decode=(1.0, 3.0),
        save=(0.25, 0.25),
        handover=0.5,
        join=1.5,
    )


def test_a_unit_that_is_a_picture_takes_no_denoising() -> None:
    record = completed(unit_1_s=2.0)
    timeline = tuple(one for one in record.timeline if (one.stage, one.unit) != (Stage.DENOISE, 0))
    assert stage_seconds([record.changed(timeline=timeline)]).denoise == (0.0, 2.0)
