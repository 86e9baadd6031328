"""Warnings and errors of the replicas, for the terminal of ``pyramid-serve up``.

Replicas write log records as lines of JSON to stderr, which Ray stores in a file for each worker. Other lines in those
files, such as Ray's own, are ignored.
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
    """A log record of a replica as a readable line. Records that differ only in ids and numbers have the same kind."""

    kind: str
    line: str


def read_record(line: bytes) -> Warned | None:
    """The warning or error in a line of a log, if it has one in the form of ``logs.JsonFormatter``; else None."""
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
    """The last line of a traceback with text in it; the traceback of an exception group ends with a frame around it."""
    lines = (line.strip(" |+-") for line in reversed(traceback.splitlines()))
    return next(filter(None, lines), "")


class Throttle:
    """Passes new lines on, and counts those that repeat an earlier line or exceed the limit of a window of time."""

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
        """At the end of a window of time, say how many lines were left out."""
        if self._clock() < self._window_ends_at:
            return
        self.flush()
        self._window_ends_at = self._clock() + _WINDOW_S

    def flush(self) -> None:
        """Say how many lines were left out, and begin a new count."""
        for kind, number in self._num_similar.items():
            self._say(f"{self._told[kind]}  ({_lines(number, 'similar')} left out)")
        if self._num_others:
            self._say(f"{_lines(self._num_others, 'more')} left out; all are in the logs")
        # A kind that continues is reported once per window, by its count.
        self._told = {kind: line for kind, line in self._told.items() if kind in self._num_similar}
        self._num_similar, self._num_said, self._num_others = {}, 0, 0


class Tail:
    """The lines that are added to the logs of the workers, each of them once."""

    def __init__(self, folder: Path) -> None:
        """folder: the ``logs`` folder of a Ray session."""
        self._folder = folder
        self._read: dict[Path, int] = {}
        self._rests: dict[Path, bytes] = {}

    def lines(self) -> Iterator[bytes]:
        """The lines that were completed since the last call."""
        for path in sorted(self._folder.glob("worker-*.err")):
            try:
                with path.open("rb") as opened:
                    opened.seek(self._read.get(path, 0))
                    added = opened.read(_MAX_READ_BYTES)
            except OSError:
                continue  # it is gone, or can be read next time
            if not added:
                continue
            self._read[path] = self._read.get(path, 0) + len(added)
            *lines, rest = (self._rests.get(path, b"") + added).split(b"\n")
            self._rests[path] = rest[-_MAX_LINE_BYTES:]
            yield from lines


@contextmanager
def warnings_told(folder: Path, say: Say) -> Iterator[None]:
    """Pass on the warnings of the replicas of a Ray session while the block runs."""
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
            return  # the terminal is closed

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
