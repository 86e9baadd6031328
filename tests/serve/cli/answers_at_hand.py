"""Servers that answer whatever a test wants."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from pyramid_serve.api import VideoRequest, new_record
from tests.serve.local_server import MODEL

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
    plan = MODEL.plan(VideoRequest(prompt="a ball", seed=1))
    return {**new_record(plan).public(), "id": VIDEO_ID, "status": "completed", "progress": 100, **changes}


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


def check_one_line(capsys: pytest.CaptureFixture[str], command: str) -> str:
    captured = capsys.readouterr()
    assert captured.err.startswith(f"pyramid-serve {command}: "), captured.err
    assert captured.err.count("\n") == 1 and captured.err[:-1].isprintable(), captured.err
    assert len(captured.err) < 2000
    assert captured.out == ""
    return captured.err
