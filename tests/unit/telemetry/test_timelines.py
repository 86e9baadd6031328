import pytest

from deployments.telemetry.timelines import hidden_share
from pyramid_serve.api import Stage, TimelineEntry


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
