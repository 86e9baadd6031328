"""The command line against servers that answer nonsense: one line, no traceback, no file."""

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from deployments import cli
from tests.serve.cli.answers_at_hand import (
    COMMANDS,
    VIDEO_ID,
    Answer,
    answering,
    check_one_line,
    objects,
    raw,
    response,
    video_object,
)

pytestmark = pytest.mark.usefixtures("in_a_hurry")


def trickle(connection: socket.socket, head: str) -> None:
    for character in response(b'{"a": ' + b" " * 10_000 + b"1}"):
        connection.sendall(bytes([character]))
        time.sleep(0.05)


def trickling_head(connection: socket.socket, head: str) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.sendall(b"X-More: 1\r\n")
        time.sleep(0.05)


def silence(connection: socket.socket, head: str) -> None:
    time.sleep(30)


def redirect_to_itself(connection: socket.socket, head: str) -> None:
    path = head.split(" ")[1]
    connection.sendall(response(b"", status="307 Temporary Redirect", headers=f"Location: {path}\r\n"))


NONSENSE: dict[str, Answer] = {
    "garbage": raw(bytes(range(256)) * 10),
    "nothing": raw(b""),
    "half a status line": raw(b"HTTP/1.1 2"),
    "half a head": raw(b"HTTP/1.1 200 OK\r\nContent-"),
    "a huge head": raw(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 1_000_000),
    "half a body": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"),
    "a broken chunk": raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n"),
    "half a chunk": raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\n{"),
    "two lengths": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{} "),
    "a negative length": raw(b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\n{}"),
    "no gzip": raw(response(b"{}", headers="Content-Encoding: gzip\r\n")),
    "HTML": raw(response(b"<html>hello</html>", kind="text/html")),
    "no UTF-8": raw(response(b'{"id": "\xff\xfe"}')),
    "an empty object": objects({}),
    "a list": objects([video_object()]),
    "a number": objects(1),
    "null": objects(None),
    "text": objects("completed"),
    "NaN": raw(response(b'{"id": NaN, "deleted": NaN}')),
    "endless numbers": raw(response(b'{"progress": ' + b"9" * 10_000 + b"}")),
    "infinity": raw(response(b'{"progress": 1e999}')),
    "deep nesting": raw(response(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")),
    "some nesting": raw(
        response(json.dumps(video_object()).encode()[:-1] + b', "a": ' + b"[" * 400 + b"]" * 400 + b"}")
    ),
    "a huge answer": raw(response(b'{"a": "' + b"a" * 40_000_000 + b'"}')),
    "wrong types": objects({**video_object(), "id": 7, "data": 1, "deleted": "yes"}),
    "a page of nonsense": objects({"data": [{}], "has_more": True, "id": {}, "deleted": []}),
    "an error": raw(response(b'{"error": {"message": "no \\u001b[31m"}}', status="400 Bad Request")),
    "an odd error": raw(response(b'{"error": ["\\u001b[31m"]}', status="500 \x1b[31mOh")),
    "an error of HTML": raw(response(b"<html>", status="404 Not Found", kind="text/html")),
    "an unknown status": raw(response(b"{}", status="599 What")),
    "no such status": raw(b"HTTP/1.1 99999 What\r\n\r\n"),
    "a redirect to itself": redirect_to_itself,
    "a redirect to nowhere": raw(response(b"", status="302 Found", headers="Location: http://[::1\r\n")),
    "a redirect to another scheme": raw(response(b"", status="302 Found", headers="Location: file:///etc/passwd\r\n")),
    "a redirect without a place": raw(response(b"", status="302 Found")),
    "a slow trickle": trickle,
    "a head without end": trickling_head,
    "silence": silence,
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_one_line_for_every_command(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.05)))
    slow = name in ("a slow trickle", "a head without end", "silence")
    with answering(NONSENSE[name]) as url:
        for command in COMMANDS[2:3] if slow else COMMANDS:
            assert cli.main([*command, "--url", url]) == 2, command
            check_one_line(capsys, command[0])
            assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["id", "status", "progress", "created_at", "expires_at", "prompt", "size", "error"])
@pytest.mark.parametrize("value", [..., [], {}, True, -1, 10**30, "\x1b[2J"])
def test_a_video_with_an_odd_key_never_is_a_traceback(key: str, value: Any, capsys: pytest.CaptureFixture[str]) -> None:
    video = video_object(**{key: value})
    if value is ...:
        del video[key]
    page = {"data": [video], "has_more": False}
    for command, content in (("status", video), ("list", page), ("cancel", video)):
        with answering(objects(content)) as url:
            status = cli.main([command, *([] if command == "list" else [VIDEO_ID]), "--url", url])
        captured = capsys.readouterr()
        assert status in (0, 2)
        assert (captured.out + captured.err).replace("\n", "").isprintable()


def test_what_controls_a_terminal_is_never_printed(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "red\x1b]0;title\x07\x9b31m\x7f\u202etxt\u2066\u2028\r\nERROR fake"
    entries = [
        {"stage": stage, "unit": 0, "start": 1.0, "end": 2.0, "replica": f"{evil}{index}"}
        for stage in ("denoise", "decode")
        for index in range(2)
    ]
    failed = {"status": "failed", "error": {"code": evil, "message": evil}}
    for changes in ({}, failed):
        video = video_object(id=evil, prompt=evil, size=evil, model=evil, timeline=entries, **changes)
        page = {"data": [video], "has_more": False}
        for command, content in ((["status", "x"], video), (["list"], page), (["cancel", "x"], video)):
            with answering(objects(content)) as url:
                cli.main([*command, "--url", url])
        with answering(objects(video)) as url:
            cli.main(["submit", "a", "--url", url])
            cli.main(["submit", "a", "--wait", "--url", url])
            cli.main(["status", "x", "--json", "--url", url])
    captured = capsys.readouterr()
    assert "red" in captured.out and "red" in captured.err
    for text in (captured.out, captured.err):
        assert text.replace("\n", "").isprintable()
        assert not any(line.startswith("ERROR fake") for line in text.splitlines())


@pytest.mark.parametrize("start", [0, 1.5, 1e9, 253_402_214_400])
@pytest.mark.parametrize("end", [0, 5e-324, 1e9, 253_402_214_400])
def test_a_timeline_of_any_times_is_shown(start: float, end: float, capsys: pytest.CaptureFixture[str]) -> None:
    entries = [
        {"stage": stage, "unit": unit, "start": first, "end": last, "replica": "a"}
        for stage in ("encode", "denoise", "decode", "save")
        for unit, first, last in ((None, 1.0, 2.0), (0, start, end), (10**9, end, start))
    ]
    with answering(objects(video_object(timeline=entries))) as url:
        assert cli.main(["status", VIDEO_ID, "--url", url]) == 0
    assert "Which unit was where, when:" in capsys.readouterr().out


def test_a_timeline_without_an_end_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    entry = {"stage": "decode", "unit": 1, "start": 1.0, "end": 2.0, "replica": "a"}
    with answering(objects(video_object(timeline=[entry] * 100_000))) as url:
        assert cli.main(["status", VIDEO_ID, "--url", url]) == 2
    assert "timeline" in check_one_line(capsys, "status")
