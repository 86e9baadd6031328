"""The timeline of a video as text: which unit was where, when."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from pyramid_serve.api import Stage, TimelineEntry

_DEPLOYMENTS = {
    Stage.ENCODE: "text encoder",
    Stage.PICTURE: "picture",
    Stage.DENOISE: "denoiser",
    Stage.DECODE: "decoder",
    Stage.SAVE: "save",
}
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_WHOLE = "="
_NOTHING = "."
_LABEL_CHARACTERS = 9


def timeline_chart(timeline: Sequence[TimelineEntry], *, width: int = 100) -> str:
    """Rows of ``width`` characters, one for each replica at each stage. Characters stand for units, letters from 10 on.

    If a replica worked on several units in the time of one character, the last of them is shown. ``=`` is work on the
    whole video.
    """
    timeline = [entry for entry in timeline if isinstance(entry.stage, Stage)]  # a later server may have others
    if not timeline:
        return "no timeline"
    begin = min(entry.start for entry in timeline)
    end = max(entry.end for entry in timeline)
    rows: dict[tuple[Stage, str], list[TimelineEntry]] = defaultdict(list)
    for entry in sorted(timeline, key=lambda entry: entry.start):
        assert isinstance(entry.stage, Stage)
        rows[entry.stage, entry.replica].append(entry)
    order = list(_DEPLOYMENTS)
    names = {key: f"{_DEPLOYMENTS[key[0]]} {key[1]}" if _is_shared(rows, key) else _DEPLOYMENTS[key[0]] for key in rows}
    margin = max(map(len, names.values()))
    columns = max(width - margin - 2, 20)
    seconds_a_column = max(end - begin, 1e-3) / columns
    lines = [f"{'':{margin}}  {_axis(end - begin, columns)}"]
    for key in sorted(rows, key=lambda key: (order.index(key[0]), key[1])):
        cells = [_NOTHING] * columns
        for entry in rows[key]:
            first = min(int((entry.start - begin) / seconds_a_column), columns - 1)
            last = max(min(int((entry.end - begin) / seconds_a_column), columns), first + 1)
            cells[first:last] = [_symbol(entry.unit)] * (last - first)
        lines.append(f"{names[key]:{margin}}  {''.join(cells)}")
    return "\n".join(lines)


def _is_shared(rows: Iterable[tuple[Stage, str]], key: tuple[Stage, str]) -> bool:
    """Whether several replicas worked at the stage, so that rows need their names."""
    return sum(stage is key[0] for stage, _ in rows) > 1


def _symbol(unit: int | None) -> str:
    return _WHOLE if unit is None else _DIGITS[unit % len(_DIGITS)]


def _axis(seconds: float, columns: int) -> str:
    """Labels of seconds along the rows, at round distances."""
    seconds = max(seconds, 1e-3)
    distances = (digit * 10.0**power for power in range(-3, 12) for digit in (1, 2, 5))
    distance = next(distance for distance in distances if distance / seconds * columns >= _LABEL_CHARACTERS)
    axis = [" "] * (columns + _LABEL_CHARACTERS)
    for index in range(int(seconds / distance) + 1):
        label = f"|{index * distance:.4g} s"
        at = int(index * distance / seconds * columns)
        axis[at : at + len(label)] = label
    return "".join(axis[: columns + _LABEL_CHARACTERS]).rstrip()
