"""What ``pyramid-serve up`` tells of the replicas' warnings."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from deployments.local.log_tail import Tail, Throttle, Warned, read_record, warnings_told
from deployments.telemetry.logs import JsonFormatter


def record_line(level: int = logging.WARNING, message: str = "a call was lost", **fields: Any) -> bytes:
    """A line as a replica writes it."""
    record = logging.LogRecord(
        "deployments.claims.deployment", level, __file__, 1, message, None, fields.pop("exc_info", None)
    )
    record.__dict__.update(fields)
    return JsonFormatter("abc123").format(record).encode()


def read(line: bytes) -> str:
    warned = read_record(line)
    assert warned is not None
    return warned.line


def test_a_warning_is_one_readable_line() -> None:
    line = read(record_line(video_id="video_" + "1" * 32))
    clock, _, text = line.partition(" ")
    assert len(clock) == 8 and clock.count(":") == 2
    assert text == f"WARNING deployments.claims.deployment: a call was lost [video_{'1' * 32}]"


def test_an_error_tells_the_last_line_of_its_traceback() -> None:
    try:
        raise ValueError("it does not fit")
    except ValueError as error:
        line = read(record_line(logging.ERROR, "attempt failed", exc_info=(ValueError, error, error.__traceback__)))
    assert line.endswith("ERROR deployments.claims.deployment: attempt failed: ValueError: it does not fit")


def test_what_others_wrote_controls_no_terminal() -> None:
    line = read(record_line(message="\x1b[31mred\r\nERROR \u202efake\x07\x9b"))
    assert line.isprintable() and "red" in line


@pytest.mark.parametrize(
    "line",
    [
        record_line(logging.INFO),
        b"(raylet) worker died",
        b"",
        b"\xff\xfe",
        b"[1]",
        b"1",
        b"[" * 100_000,
        b"{}",
        b'{"level": "WARNING"}',
        b'{"level": "WARNING", "message": 1}',
        b'{"level": ["WARNING"], "message": "a"}',
        b'{"level": "LOUD", "message": "a"}',
    ],
)
def test_what_is_no_warning_of_ours_is_left_in_the_log(line: bytes) -> None:
    assert read_record(line) is None


def test_a_record_with_odd_fields_is_told_without_them() -> None:
    content = {"level": "ERROR", "message": "a" * 5000, "replica": 1, "time": None, "video_id": [], "error": {}}
    line = read(json.dumps(content).encode())
    assert line.startswith("ERROR : aaa") and len(line) == 400


def test_each_line_is_read_once_and_only_when_it_is_whole(tmp_path: Path) -> None:
    log, other = tmp_path / "worker-1.err", tmp_path / "worker-2.err"
    (tmp_path / "raylet.err").write_text("not a worker\n")
    tail = Tail(tmp_path)
    assert list(tail.lines()) == []
    log.write_text("one\ntw")
    assert list(tail.lines()) == [b"one"]
    with log.open("a") as opened:
        opened.write("o\n")
    other.write_text("three\n")
    assert list(tail.lines()) == [b"two", b"three"]
    assert list(tail.lines()) == []


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_similar_lines_are_told_once_and_then_counted() -> None:
    said: list[str] = []
    clock = Clock()
    throttle = Throttle(said.append, clock=clock)
    for index in range(1000):
        warned = read_record(record_line(message=f"call {index} was lost", video_id=f"video_{index:032x}"))
        assert warned is not None
        throttle.tell(warned)
    assert len(said) == 1 and "call 0 was lost" in said[0]
    clock.now += 30.0
    throttle.look()
    assert len(said) == 2 and said[1].endswith("(999 similar lines left out)")
    clock.now += 30.0
    throttle.look()
    assert len(said) == 2


def test_a_flood_of_different_lines_is_cut_off() -> None:
    said: list[str] = []
    clock = Clock()
    throttle = Throttle(said.append, clock=clock)
    for index in range(1000):
        throttle.tell(Warned(kind=f"kind {index}", line=f"line {index}"))
    assert len(said) == 20
    clock.now += 30.0
    throttle.look()
    assert said[20:] == ["980 more lines left out; all are in the logs"]
    throttle.tell(Warned(kind="new", line="new"))
    assert said[-1] == "new"


def test_what_comes_last_is_told_on_leaving(tmp_path: Path) -> None:
    said: list[str] = []
    with warnings_told(tmp_path, said.append), (tmp_path / "worker-1.err").open("wb") as log:
        log.write(record_line() + b"\n" + record_line(logging.INFO) + b"\n" + record_line() + b"\n")
    assert len(said) == 2 and said[1].endswith("(1 similar line left out)")


def test_a_terminal_that_is_gone_is_no_error(tmp_path: Path) -> None:
    def say(_: str) -> None:
        raise OSError("Input/output error")

    with warnings_told(tmp_path, say):
        (tmp_path / "worker-1.err").write_bytes(record_line() + b"\n")


def test_an_error_of_several_tasks_tells_what_the_last_of_them_says() -> None:
    try:
        raise ExceptionGroup("tasks", [ValueError("it does not fit")])
    except ExceptionGroup as error:
        line = read(record_line(logging.ERROR, "attempt failed", exc_info=(type(error), error, error.__traceback__)))
    assert line.endswith("attempt failed: ValueError: it does not fit")
