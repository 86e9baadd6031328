"""Bodies that cannot be read."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deployments.http.body import BodyLimits
from deployments.http.config import HttpConfig
from tests.serve.http.http_at_hand import HEAD, check, send
from tests.serve.local_server import LocalServer, serve_locally

FORM = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--b--\r\n'

JSON = "application/json"


@pytest.mark.parametrize(
    ("content_type", "body", "status", "param"),
    [
        (JSON, b"", 400, None),
        (JSON, b"{", 400, None),
        (JSON, b'{"prompt": "a"', 400, None),
        (JSON, b'{"prompt": "a"} and more', 400, None),
        (JSON, b"null", 400, None),
        (JSON, b'["prompt"]', 400, None),
        (JSON, b'"prompt"', 400, None),
        (JSON, b"{'prompt': 'a'}", 400, None),
        (JSON, b'{"prompt": "\xff"}', 400, None),
        (JSON, '{"prompt": "a"}'.encode("utf-16"), 400, None),
        (JSON, b'{"prompt": "a", "seed": NaN}', 400, None),
        (JSON, b'{"prompt": "a", "seed": 1, "seed": 2}', 400, "seed"),
        (JSON, b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, None),
        (JSON, b"[" * 100_000, 400, None),
        (JSON, b'{"a":' * 50_000, 400, None),
        (JSON + "; charset=latin-1", b'{"prompt": "a"}', 415, "Content-Type"),
        ("", b'{"prompt": "a"}', 415, "Content-Type"),
        ("text/plain", b'{"prompt": "a"}', 415, "Content-Type"),
        ("application/x-www-form-urlencoded", b"prompt=a", 415, "Content-Type"),
        ("nonsense", b"a", 415, "Content-Type"),
        ("multipart/form-data", FORM, 400, "Content-Type"),
        ("multipart/form-data; boundary=", FORM, 400, "Content-Type"),
        ("multipart/form-data; boundary=" + "b" * 300, FORM, 400, None),
        ("multipart/form-data; boundary=other", FORM, 400, None),
        ("multipart/form-data; boundary=b", b"", 400, None),
        ("multipart/form-data; boundary=b", FORM[:-4], 400, None),
        ("multipart/form-data; boundary=b", FORM[:-9], 400, None),
        ("multipart/form-data; boundary=b", b"--b--\r\n", 400, "prompt"),
        ("multipart/form-data; boundary=b", b"--b\r\n\r\na\r\n--b--\r\n", 400, None),
        ("multipart/form-data; boundary=b", FORM.replace(b'; name="prompt"', b""), 400, None),
        ("multipart/form-data; boundary=b", FORM.replace(b"form-data;", b"attachment;"), 400, None),
        ("multipart/form-data; boundary=b", FORM.replace(b"\r\na\r\n", b"\r\n\xff\r\n"), 400, "prompt"),
        ("multipart/form-data; boundary=b", FORM.replace(b'"prompt"', b'"prompt"; filename="a"'), 400, "prompt"),
        ("multipart/form-data; boundary=b", FORM[:-7] + FORM, 400, "prompt"),
        ("multipart/form-data; boundary=b", FORM[:-7] * 200 + FORM, 400, None),
        (JSON, b'{"prompt": "' + b"a" * 700_000 + b'"}', 413, None),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(
    server: LocalServer, content_type: str, body: bytes, status: int, param: str | None
) -> None:
    answer = server.client.post("/v1/videos", content=body, headers={"Content-Type": content_type})
    check(answer, status, param)


def test_a_compressed_body_is_refused(server: LocalServer) -> None:
    headers = {"Content-Type": JSON, "Content-Encoding": "gzip"}
    check(server.client.post("/v1/videos", content=b"\x1f\x8b", headers=headers), 415, "Content-Encoding")


def test_a_chunked_body_that_is_too_large_is_refused_before_it_ends(server: LocalServer) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 500_000_000:
            sent += 65536
            yield b" " * 65536
            time.sleep(0.001)

    # It may go on sending after the answer.
    with httpx.Client(base_url=server.url, timeout=20) as client, contextlib.suppress(httpx.WriteError):
        check(client.post("/v1/videos", content=endless(), headers={"Content-Type": JSON}), 413, None)
    assert sent < 500_000_000


@pytest.mark.parametrize(
    "request_bytes",
    [
        HEAD + b'Content-Length: 100\r\n\r\n{"prompt": ',
        HEAD + b"Content-Length: 100\r\n\r\n",
        HEAD + b'Transfer-Encoding: chunked\r\n\r\nb\r\n{"prompt": \r\n',
    ],
)
def test_a_body_that_does_not_go_on_is_timed_out(tmp_path: Path, request_bytes: bytes) -> None:
    limits = BodyLimits(idle_timeout_s=0.5, timeout_s=2.0)
    with serve_locally(str(tmp_path), http=HttpConfig(body=limits)) as impatient:
        answer = send(impatient, request_bytes)
    assert answer.startswith(b"HTTP/1.1 408 "), answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"].startswith("body: ")


def test_a_body_of_unknown_length_is_refused_as_soon_as_it_is_too_large(server: LocalServer) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"20000\r\n" + b" " * 0x20000 + b"\r\n")
        connection.sendall(b"80000\r\n" + b" " * 0x80000)  # the end is not sent
        started = time.monotonic()
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
        assert time.monotonic() - started < server.app.state.door.config.body.discard_timeout_s / 2


def test_a_body_that_arrives_too_slowly_is_timed_out(tmp_path: Path) -> None:
    limits = BodyLimits(idle_timeout_s=0.5, min_bytes_per_s=1000.0)
    with serve_locally(str(tmp_path), http=HttpConfig(body=limits)) as impatient:
        host, port = impatient.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=0.1) as connection:
            connection.sendall(HEAD + b"Content-Length: 100000\r\n\r\n")
            answer = b""
            for _ in range(30):  # 3 s of a byte each 0.1 s, of which none is idle
                connection.sendall(b" ")
                with contextlib.suppress(TimeoutError):
                    answer += connection.recv(65536)
                if answer:
                    break
    assert answer.startswith(b"HTTP/1.1 408 "), answer


def test_the_total_of_all_bodies_must_allow_one() -> None:
    with pytest.raises(ValueError, match="max_total_bytes=1: must be at least max_bytes, which is 2"):
        BodyLimits(max_bytes=2, max_total_bytes=1)


def test_a_declared_length_that_is_too_large_is_refused_without_the_body(server: LocalServer) -> None:
    assert send(server, HEAD + b"Content-Length: 99999999999\r\n\r\n{").startswith(b"HTTP/1.1 413 ")


def test_a_client_that_breaks_off_harms_nobody(server: LocalServer) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for _ in range(5):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
    assert server.client.get("/healthz").status_code == 200
