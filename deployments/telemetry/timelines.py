"""What a timeline says about a video as a whole."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pyramid_serve.api import Stage, TimelineEntry, VideoRecord

Interval = tuple[float, float]
Timeline = Iterable[TimelineEntry]


@dataclass(frozen=True)
class StageSeconds:
    """How long each stage took, in seconds, as means over videos of one plan."""

    begin: float
    """From the acceptance of a video to the encoding of its prompts."""
    encode: float
    """Both prompts, those that were cached among them."""
    denoise: tuple[float, ...]
    """Of each unit, from its first step to the end of its last."""
    decode: tuple[float, ...]
    """Of each unit."""
    save: tuple[float, ...]
    """Of each unit: making its fragment of the stream and writing it."""
    handover: float
    """From the end of a unit at the denoiser to the first step of the next."""
    join: float
    """Putting ``video.mp4`` together, and what follows until the video is completed."""


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


def stage_seconds(records: Sequence[VideoRecord]) -> StageSeconds:
    """The seconds of each stage of completed videos of one plan; 0 for a unit that is a given picture."""
    units = range(records[0].plan.num_units)

    def mean(stage: Stage, unit: int | None) -> float:
        return statistics.mean(
            sum(entry.end - entry.start for entry in _entries(record, stage, unit)) for record in records
        )

    begin = [_entries(record, Stage.ENCODE, None)[0].start - record.created_at for record in records]
    join = [(record.completed_at or 0.0) - _entries(record, Stage.SAVE, None)[0].start for record in records]
    return StageSeconds(
        begin=statistics.mean(begin),
        encode=mean(Stage.ENCODE, None),
        denoise=tuple(mean(Stage.DENOISE, unit) for unit in units),
        decode=tuple(mean(Stage.DECODE, unit) for unit in units),
        save=tuple(mean(Stage.SAVE, unit) for unit in units),
        handover=statistics.mean(handover_seconds(record.timeline) for record in records) / max(len(units) - 1, 1),
        join=statistics.mean(join),
    )


def handover_seconds(timeline: Timeline) -> float:
    """The time between the end of each unit at a denoiser and the first step of the next, summed."""
    units = sorted((entry for entry in timeline if entry.stage is Stage.DENOISE), key=lambda entry: entry.unit or 0)
    return sum(max(later.start - earlier.end, 0.0) for earlier, later in pairwise(units))


def _entries(record: VideoRecord, stage: Stage, unit: int | None) -> list[TimelineEntry]:
    return [entry for entry in record.timeline if entry.stage is stage and entry.unit == unit]


def _overlap(interval: Interval, others: Iterable[Interval]) -> float:
    """Seconds of an interval that are covered by the others."""
    covered, reached = 0.0, interval[0]
    for start, end in sorted(others):
        start, end = max(start, reached), min(end, interval[1])
        if end > start:
            covered += end - start
            reached = end
    return covered
