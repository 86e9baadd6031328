"""The warnings and errors of the replicas, told on the terminal of ``pyramid-serve up``.

Replicas write their records as lines of JSON to stderr, which Ray keeps in a file for each worker. What else is in
those files, such as Ray's own lines, is left there.
"""

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pyramid_serve.terminal import printable

Say = Callable[[str], None]

_LOOK_S = 0.5
_MAX_LINE_BYTES = 1 << 20
_MAX_READ_BYTES = 4 << 20
_MAX_CHARACTERS = 400
_WINDOW_S = 30.0
_MAX_LINES = 20
_MAX_KINDS = 500
_VARIABLE = re.compile(r"video_[0-9a-f]+|\b[0-9a-f]{8,}\b|\d+(\.\d+)?")


class Warned(NamedTuple):
    """A record of a replica, readable. ``kind`` is the same for records that differ in ids and numbers only."""

    kind: str
    line: str


def read_record(line: bytes) -> Warned | None:
    """A line of a replica's log, if it is a warning or an error in the form of ``logs.JsonFormatter``."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    level, message = record.get("level"), record.get("message")
    number = logging.getLevelNamesMapping().get(level) if isinstance(level, str) else None
    if number is None or number < logging.WARNING or not isinstance(message, str):
        return None
    video_id, error = _text(record, "video_id"), _last_words(_text(record, "error"))
    parts = (f"{level} {_text(record, 'logger')}: {message}", error and f": {error}", video_id and f" [{video_id}]")
    text = printable("".join(parts))
    clock = _text(record, "time").partition("T")[2][:8]
    return Warned(_VARIABLE.sub("#", text), printable(f"{clock} {_shortened(text)}".strip()))


def _last_words(traceback: str) -> str:
    """The last line of a traceback that says something: that of a group of errors ends in a frame of its own."""
    lines = (line.strip(" |+-") for line in reversed(traceback.splitlines()))
    return next(filter(None, lines), "")


class Throttle:
    """Passes on what is new, and counts what is much like a line that was told a while ago, or simply too much."""

    def __init__(self, say: Say, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._window_ends_at = 0.0
        self._num_said = 0
        self._told: dict[str, str] = {}
        self._num_similar: dict[str, int] = {}
        self._num_others = 0

    def tell(self, warned: Warned) -> None:
        self.look()
        if warned.kind in self._told:
            self._num_similar[warned.kind] = self._num_similar.get(warned.kind, 0) + 1
        elif self._num_said >= _MAX_LINES or len(self._told) >= _MAX_KINDS:
            self._num_others += 1
        else:
            self._num_said += 1
            self._told[warned.kind] = warned.line
            self._say(warned.line)

    def look(self) -> None:
        """Tell what was left out, once its time is over."""
        if self._clock() < self._window_ends_at:
            return
        self.flush()
        self._window_ends_at = self._clock() + _WINDOW_S

    def flush(self) -> None:
        """Tell at once what was left out, and begin anew."""
        for kind, number in self._num_similar.items():
            self._say(f"{self._told[kind]}  ({_lines(number, 'similar')} left out)")
        if self._num_others:
            self._say(f"{_lines(self._num_others, 'more')} left out; all are in the logs")
        # A kind that goes on is told once for each window, by how often it came.
        self._told = {kind: line for kind, line in self._told.items() if kind in self._num_similar}
        self._num_similar, self._num_said, self._num_others = {}, 0, 0


class Tail:
    """The lines that are added to the logs of the workers, each once."""

    def __init__(self, folder: Path) -> None:
        """``folder``: the ``logs`` of a Ray session."""
        self._folder = folder
        self._read: dict[Path, int] = {}
        self._rests: dict[Path, bytes] = {}

    def lines(self) -> Iterator[bytes]:
        """What is whole since the last look."""
        for path in sorted(self._folder.glob("worker-*.err")):
            try:
                with path.open("rb") as opened:
                    opened.seek(self._read.get(path, 0))
                    added = opened.read(_MAX_READ_BYTES)
            except OSError:
                continue  # gone, or to be read at the next look
            if not added:
                continue
            self._read[path] = self._read.get(path, 0) + len(added)
            *lines, rest = (self._rests.get(path, b"") + added).split(b"\n")
            self._rests[path] = rest[-_MAX_LINE_BYTES:]
            yield from lines


@contextmanager
def warnings_told(folder: Path, say: Say) -> Iterator[None]:
    """Tell what the replicas of a Ray session warn of while the block runs."""
    tail, throttle = Tail(folder), Throttle(say)
    is_over = threading.Event()

    def look() -> None:
        try:
            while True:
                was_over = is_over.wait(_LOOK_S)
                for line in tail.lines():
                    warned = read_record(line)
                    if warned is not None:
                        throttle.tell(warned)
                if was_over:
                    throttle.flush()
                    return
                throttle.look()
        except OSError:
            return  # nobody reads any more: the terminal is closed

    thread = threading.Thread(target=look, name="log_tail", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(2.0)


def _text(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    return value if isinstance(value, str) else ""


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 3] + "..."


def _lines(number: int, what: str) -> str:
    return f"{number} {what} line{'' if number == 1 else 's'}"
