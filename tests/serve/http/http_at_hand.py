"""What the tests of the HTTP server send, and what they check of every answer."""

import io
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
from PIL import Image

from tests.serve.local_server import LocalServer

UNKNOWN_ID = "video_" + "0" * 32

HEAD = b"POST /v1/videos HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"

KEYS = [
    "id",
    "object",
    "model",
    "status",
    "progress",
    "created_at",
    "completed_at",
    "expires_at",
    "prompt",
    "size",
    "seconds",
    "remixed_from_video_id",
    "error",
]


def check(answer: httpx.Response, status: int, param: str | None, *said: str) -> None:
    """The answer is an error in the contract's form."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["param"] == param, body
    for text in (body["error"]["message"], body["error"]["type"], body["error"]["code"]):
        assert isinstance(text, str) and text
    for text in said:
        assert text in body["error"]["message"], body


def send(server: LocalServer, request: bytes, *, timeout_s: float = 10.0) -> bytes:
    """What a server answers to bytes, after which the client stays silent."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=timeout_s) as connection:
        connection.sendall(request)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
            if received.partition(b"\r\n\r\n")[2].endswith(b"}"):
                break
        return received


def png(width: int, height: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(content, format="PNG")
    return content.getvalue()


def events(server: LocalServer, video_id: str, **headers: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with server.client.stream("GET", f"/v1/videos/{video_id}/events", headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        fields: dict[str, str] = {}
        for line in answer.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif "data" in fields:
                yield fields["event"], json.loads(fields["data"])
                fields = {}
