"""The command line against servers that answer nonsense: one line, no traceback, no file, no key to others."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from deployments import cli
from deployments.cli import server as http_client
from deployments.cli.server import Server, ServerError
from pyramid_serve.api import VideoRequest, new_record, resolve
from tests.serve.local_server import MODEL, whole

Answer = Callable[[socket.socket, str], None]
"""Answers a request on its connection; it is given the head of the request."""

VIDEO_ID = "video_" + "1" * 32
COMMANDS = [
    ["submit", "a ball"],
    ["submit", "a ball", "-o", "out.mp4"],
    ["status", VIDEO_ID],
    ["status", VIDEO_ID, "--json"],
    ["list"],
    ["cancel", VIDEO_ID],
    ["delete", VIDEO_ID],
    ["download", VIDEO_ID, "-o", "out.mp4"],
]


def video_object(**changes: Any) -> dict[str, Any]:
    spec = resolve(VideoRequest(prompt="a ball", seed=1), MODEL.capabilities, MODEL.name, limits=MODEL.limits)
    return {**new_record(spec).public(), "id": VIDEO_ID, "status": "completed", "progress": 100, **changes}


@contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """The URL of a server whose every connection has one request answered so."""
    listener = socket.create_server(("127.0.0.1", 0))

    def handle(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                received = connection.recv(65536)
                if not received:
                    return
                head += received
            answer(connection, head.decode("latin-1"))

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=handle, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def raw(content: bytes) -> Answer:
    return lambda connection, head: connection.sendall(content)


def response(body: bytes, *, status: str = "200 OK", kind: str = "application/json", headers: str = "") -> bytes:
    fixed = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    return (fixed + headers + "\r\n").encode() + body


def objects(content: object) -> Answer:
    return raw(response(json.dumps(content).encode()))


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


@pytest.fixture(autouse=True)
def _in_an_empty_folder_and_in_a_hurry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"_PATIENCE_S": 0.0, "_CALL_S": 1.0, "_IDLE_S": 0.5, "_PREVIEW_S": 1.0}.items():
        monkeypatch.setattr(http_client, name, value)


def check_one_line(capsys: pytest.CaptureFixture[str], command: str) -> str:
    captured = capsys.readouterr()
    assert captured.err.startswith(f"pyramid-serve {command}: "), captured.err
    assert captured.err.count("\n") == 1 and captured.err[:-1].isprintable(), captured.err
    assert len(captured.err) < 2000
    assert captured.out == ""
    return captured.err


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


# --- redirects ------------------------------------------------------------------------------------------------------


def test_another_server_gets_neither_the_key_nor_the_request(capsys: pytest.CaptureFixture[str]) -> None:
    heads: list[str] = []

    def note(connection: socket.socket, head: str) -> None:
        heads.append(head)
        connection.sendall(response(json.dumps(video_object()).encode()))

    for status in ("301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"):
        with answering(note) as other:
            target = other + "/v1/videos"
            with answering(raw(response(b"", status=status, headers=f"Location: {target}\r\n"))) as url:
                for command in COMMANDS:
                    assert cli.main([*command, "--url", url, "--api-key", "secret"]) == 2
                    said = check_one_line(capsys, command[0])
                    assert f"redirects to {other}; " in said and "secret" not in said
    assert heads == []


def test_a_redirect_within_the_server_is_followed_with_the_key(capsys: pytest.CaptureFixture[str]) -> None:
    heads: list[str] = []

    def move(connection: socket.socket, head: str) -> None:
        heads.append(head)
        path = head.split(" ")[1]
        if path.startswith("/new"):
            connection.sendall(response(json.dumps(video_object()).encode()))
        else:
            connection.sendall(response(b"", status="308 Permanent Redirect", headers=f"Location: /new{path}\r\n"))

    with answering(move) as url:
        assert cli.main(["submit", "a ball", "--url", url, "--api-key", "secret"]) == 0
    assert [head.split(" ")[:2] for head in heads] == [["POST", "/v1/videos"], ["POST", "/new/v1/videos"]]
    assert all("authorization: bearer secret" in head.lower() for head in heads)


def test_a_key_that_fits_in_no_header_is_refused_without_being_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("se\ncret", "se\u00e9cret"):
        assert cli.main(["list", "--api-key", key]) == 2
        assert "cret" not in check_one_line(capsys, "list")


# --- proxies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "socks5://127.0.0.1:1")
    monkeypatch.delenv("REQUEST_METHOD", raising=False)
    with answering(objects(video_object())) as url:
        port = url.rpartition(":")[2]
        for host in ("127.0.0.1", "localhost"):
            assert Server(f"http://{host}:{port}").get(VIDEO_ID)["id"] == VIDEO_ID


def test_a_proxy_of_the_environment_is_asked_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[str] = []

    def note(connection: socket.socket, head: str) -> None:
        heads.append(head)
        connection.sendall(response(json.dumps(video_object()).encode()))

    with answering(note) as proxy:
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("http_proxy", proxy)
        assert Server("http://videos.example:8000").get(VIDEO_ID)["id"] == VIDEO_ID
    assert heads[0].startswith(f"GET http://videos.example:8000/v1/videos/{VIDEO_ID} ")


def test_a_proxy_that_cannot_be_used_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for proxy in ("nonsense://host", "http://[::1", "socks5://127.0.0.1:1"):
        monkeypatch.setenv("http_proxy", proxy)
        assert cli.main(["list", "--url", "http://videos.example:8000"]) == 2
        check_one_line(capsys, "list")


# --- downloads ------------------------------------------------------------------------------------------------------

MP4 = whole(64, 64, 2)


def serving(content: Answer) -> Answer:
    """A server of a finished video, with this answer for its file."""

    def answer(connection: socket.socket, head: str) -> None:
        if "/content?" in head.partition("\r\n")[0]:
            content(connection, head)
        else:
            connection.sendall(response(json.dumps(video_object()).encode()))

    return answer


def endless(connection: socket.socket, head: str) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: video/mp4\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"10000\r\n" + b"a" * 65536 + b"\r\n")


def endless_trickle(connection: socket.socket, head: str) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: video/mp4\r\n\r\n")
    while True:
        connection.sendall(b"a")
        time.sleep(0.05)


def stuck(connection: socket.socket, head: str) -> None:
    connection.sendall(response(MP4, kind="video/mp4")[:-10])
    time.sleep(30)


BROKEN_FILES: dict[str, tuple[Answer, str]] = {
    "breaks off": (raw(response(MP4, kind="video/mp4")[:-10]), "broke off"),
    "breaks off without a length": (raw(b"HTTP/1.1 200 OK\r\n\r\n" + MP4[:-10]), "not whole"),
    "longer than its length": (
        raw(f"HTTP/1.1 200 OK\r\nContent-Length: {len(MP4) - 10}\r\n\r\n".encode() + MP4),
        "not whole",
    ),
    "a length beyond all bounds": (raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\na"), "more than"),
    "endless": (endless, "more than"),
    "an endless trickle": (endless_trickle, "hardly anything came"),
    "stuck": (stuck, "hardly anything came"),
    "empty": (raw(response(b"", kind="video/mp4")), "not whole"),
    "HTML": (raw(response(b"<html>", kind="text/html; charset=utf-8")), "sends text/html instead"),
    "JSON": (raw(response(b"{}")), "sends application/json instead"),
    "encoded": (raw(response(MP4, kind="video/mp4", headers="Content-Encoding: br\r\n")), "encoding"),
    "a broken chunk": (raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"), "broke off"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_file_that_does_not_come_whole_leaves_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client, "_MAX_FILE_BYTES", 20_000_000)
    answer, reason = BROKEN_FILES[name]
    (tmp_path / "there.mp4").write_bytes(b"before")
    with answering(serving(answer)) as url:
        for output in ("out.mp4", "there.mp4"):
            assert cli.main(["download", VIDEO_ID, "-o", output, "--url", url]) == 2
            assert reason in check_one_line(capsys, "download")
    assert [file.name for file in tmp_path.iterdir()] == ["there.mp4"]
    assert (tmp_path / "there.mp4").read_bytes() == b"before"


@pytest.mark.parametrize("is_chunked", [True, False])
def test_a_file_that_comes_whole_is_written(is_chunked: bool, tmp_path: Path) -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(MP4), MP4)
    content = chunked if is_chunked else response(MP4, kind="video/mp4")
    with answering(serving(raw(content))) as url:
        assert cli.main(["download", VIDEO_ID, "-o", "out.mp4", "--url", url]) == 0
    assert (tmp_path / "out.mp4").read_bytes() == MP4


def test_a_video_that_cannot_be_written_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "out.mp4").mkdir()
    with (
        answering(serving(raw(response(MP4, kind="video/mp4")))) as url,
        pytest.raises(ValueError, match=r"out\.mp4: cannot be written: Is a directory"),
    ):
        Server(url).download(VIDEO_ID, tmp_path / "out.mp4")
    assert [file.name for file in tmp_path.iterdir()] == ["out.mp4"]


def test_a_server_that_is_away_is_asked_again_with_the_same_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "_PATIENCE_S", 30.0)
    keys: list[str] = []

    def answer(connection: socket.socket, head: str) -> None:
        (key,) = (line for line in head.lower().split("\r\n") if line.startswith("idempotency-key: "))
        keys.append(key)
        if len(keys) == 1:
            return  # the answer is lost
        if len(keys) == 2:
            connection.sendall(response(b"{}", status="503 Service Unavailable"))
        else:
            connection.sendall(response(json.dumps(video_object()).encode()))

    with answering(answer) as url:
        assert Server(url).submit({"prompt": "a"})["id"] == VIDEO_ID
    assert len(keys) == 3 and len(set(keys)) == 1


def test_a_list_without_an_end_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(objects({"data": [], "has_more": True})) as url:
        assert list(Server(url).list(limit=10)) == []
    with answering(objects({"data": [video_object()] * 7, "has_more": True})) as url:
        assert len(list(Server(url).list(limit=10))) == 10


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:0", "http://a:99999", "http://a b", "http://[::1", "http://key@host"]
)
def test_a_url_that_leads_nowhere_is_refused(url: str) -> None:
    with pytest.raises(ServerError, match="must be like"):
        Server(url)


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
