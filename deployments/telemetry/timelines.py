"""What a timeline says about a video as a whole."""

from collections.abc import Iterable

from pyramid_serve.api import Stage, TimelineEntry

Interval = tuple[float, float]
Timeline = Iterable[TimelineEntry]


def hidden_share(timeline: Timeline) -> float | None:
    """The share of the decoding time, without the last unit, during which a later unit was denoised.

    None for a video of one unit.
    """
    timeline = list(timeline)
    decodes = [entry for entry in timeline if entry.stage is Stage.DECODE and entry.unit is not None]
    last_unit = max((entry.unit or 0 for entry in decodes), default=0)
    total = hidden = 0.0
    for decode in decodes:
        if decode.unit is None or decode.unit == last_unit:
            continue
        later = [
            (entry.start, entry.end)
            for entry in timeline
            if entry.stage is Stage.DENOISE and entry.unit is not None and entry.unit > decode.unit
        ]
        total += decode.end - decode.start
        hidden += _overlap((decode.start, decode.end), later)
    return hidden / total if total else None


def _overlap(interval: Interval, others: Iterable[Interval]) -> float:
    """Seconds of an interval that are covered by the others."""
    covered, reached = 0.0, interval[0]
    for start, end in sorted(others):
        start, end = max(start, reached), min(end, interval[1])
        if end > start:
            covered += end - start
            reached = end
    return covered
