from deployments.local.chart import timeline_chart
from pyramid_serve.api import Stage, TimelineEntry


def entry(stage: Stage, unit: int | None, start: float, end: float, replica: str = "a") -> TimelineEntry:
    return TimelineEntry(stage=stage, unit=unit, start=1000 + start, end=1000 + end, replica=replica)


def test_a_chart_shows_which_unit_was_where_when() -> None:
    timeline = [
        entry(Stage.ENCODE, None, 0, 1),
        entry(Stage.DENOISE, 0, 1, 4),
        entry(Stage.DENOISE, 1, 4, 7),
        entry(Stage.DECODE, 0, 4, 6),
        entry(Stage.DECODE, 1, 7, 9),
        entry(Stage.SAVE, None, 9, 10),
    ]
    lines = timeline_chart(timeline, width=len("text encoder") + 2 + 20).splitlines()
    assert lines[1:] == [
        "text encoder  ==..................",
        "denoiser      ..000000111111......",
        "decoder       ........0000..1111..",
        "save          ..................==",
    ]
    assert lines[0] == " " * 14 + "|0 s      |5 s      |10 s"


def test_replicas_of_one_stage_have_a_row_each() -> None:
    timeline = [entry(Stage.DENOISE, 10, 0, 1, "x"), entry(Stage.DENOISE, 11, 0, 2, "y"), entry(Stage.DECODE, 3, 0, 1)]
    lines = timeline_chart(timeline, width=32).splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["denoiser", "x"], ["denoiser", "y"]]
    assert "aaaaaaaaaa" in lines[1] and "b" * 20 in lines[2]
    assert lines[3].startswith("decoder  ")


def test_the_briefest_work_is_seen() -> None:
    timeline = [entry(Stage.DENOISE, 0, 0, 1000), entry(Stage.DECODE, 5, 1000, 1000)]
    assert timeline_chart(timeline, width=40).splitlines()[-1].endswith("5")


def test_no_timeline_is_said_to_be_none() -> None:
    assert timeline_chart([]) == "no timeline"
