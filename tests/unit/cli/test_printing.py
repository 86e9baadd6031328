from typing import Any

import pytest

from deployments.cli.printing import (
    DEFAULT_URL,
    duration,
    frames_of,
    outlook_of,
    reason_of,
    say,
    state_of,
    status_of,
    url_option,
)


def video(**changes: Any) -> dict[str, Any]:
    return {
        "status": "in_progress",
        "progress": 40,
        "error": None,
        "queue_position": None,
        "eta_seconds": None,
        "num_frames": 49,
        "size": "128x64",
        **changes,
    }


@pytest.mark.parametrize(("seconds", "num_decimals", "text"), [(12.4, 0, "12 s"), (12.44, 1, "12.4 s"), (0, 0, "0 s")])
def test_a_duration_is_told_in_seconds(seconds: float, num_decimals: int, text: str) -> None:
    assert duration(seconds, num_decimals=num_decimals) == text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "in progress, 40% done"),
        ({"eta_seconds": 0.2}, "in progress, 40% done, about 1 s left"),
        ({"status": "queued", "progress": 0, "queue_position": 0}, "queued, 0% done, next in the queue"),
        (
            {"status": "queued", "progress": 0, "queue_position": 3, "eta_seconds": 61.7},
            "queued, 0% done, 3 ahead in the queue, about 62 s left",
        ),
        ({"status": "completed"}, "completed"),
        ({"status": "failed", "error": {"code": "server_error", "message": "no\x1b"}}, "failed: no\ufffd"),
        ({"status": "failed"}, "failed: no reason given"),
        ({"status": "failed", "error": {"code": "cancelled", "message": "stopped"}}, "cancelled"),
    ],
)
def test_a_state_is_told_in_words(changes: dict[str, Any], text: str) -> None:
    assert state_of(video(**changes)) == text


def test_a_cancelled_video_is_told_apart_from_a_failed_one() -> None:
    assert status_of(video(status="failed", error={"code": "cancelled", "message": ""})) == "cancelled"
    assert status_of(video(status="failed", error={"code": "server_error", "message": ""})) == "failed"


def test_what_is_not_known_is_not_told() -> None:
    assert outlook_of(video()) == ""
    assert reason_of(video()) == "no reason given"


def test_frames_are_told_with_a_size_that_cannot_control_the_terminal() -> None:
    assert frames_of(video()) == "49 frames of 128x64"
    assert frames_of(video(size="\x1b[2J")) == "49 frames of \ufffd[2J"


def test_a_suggested_command_names_the_server_unless_it_is_the_default_one() -> None:
    assert url_option(DEFAULT_URL) == ""
    assert url_option("http://videos.example") == " --url http://videos.example"


def test_lines_are_kept_and_controls_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    say("one\ntwo\x1b[31m")
    assert capsys.readouterr().out == "one\ntwo\ufffd[31m\n"
