"""Limits that requests share: what is past one is refused at once, and what is beside it is answered."""

import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from deployments.http.body import BodyLimits
from deployments.http.config import HttpConfig
from tests.serve.http.http_at_hand import HEAD, UNKNOWN_ID, check, send
from tests.serve.local_server import LocalServer, serve_locally


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    body = BodyLimits(max_bytes=1000, max_total_bytes=1500, max_uploads=2, idle_timeout_s=5.0)
    http = HttpConfig(body=body, max_streams=1, max_waits=1, max_downloads=1)
    with serve_locally(str(tmp_path_factory.mktemp("videos")), http=http) as server:
        yield server


def half_sent(server: LocalServer, num_bytes: int) -> socket.socket:
    """A connection on which so many bytes of a body came, and no more do."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n" + b" " * num_bytes)
    time.sleep(0.2)
    return connection


def check_refused(answer: httpx.Response, code: str) -> None:
    check(answer, 429, None)
    assert answer.json()["error"]["code"] == code
    assert answer.headers["retry-after"]


def eventually(server: LocalServer, path: str, status: int) -> None:
    deadline = time.monotonic() + 10
    while server.client.get(path).status_code != status:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("path", ["events", "stream"])
def test_viewers_past_the_limit_are_refused_until_one_leaves(server: LocalServer, path: str) -> None:
    held = server.submit("hold")
    with server.client.stream("GET", f"/v1/videos/{held}/{path}") as first:
        assert first.status_code == 200
        for other in ("events", "stream"):
            check_refused(server.client.get(f"/v1/videos/{held}/{other}"), "too_many_streams")
        assert server.client.get("/healthz").status_code == 200
        assert server.client.get(f"/v1/videos/{held}").status_code == 200
    eventually(server, f"/v1/videos/{UNKNOWN_ID}/events", 404)
    server.client.post(f"/v1/videos/{held}/cancel")


def test_requests_that_wait_past_the_limit_are_refused_and_make_no_video(server: LocalServer) -> None:
    num_videos = len(server.client.get("/v1/videos").json()["data"])
    with server.app.state.door.waits.take():
        check_refused(server.client.post("/v1/videos?wait=true", json={"prompt": "a ball"}), "too_many_waits")
        check_refused(server.client.post("/v1/videos/sync", json={"prompt": "a ball"}), "too_many_waits")
    assert len(server.client.get("/v1/videos").json()["data"]) == num_videos
    assert server.client.post("/v1/videos?wait=true", json={"prompt": "a ball"}).status_code == 200


def test_downloads_past_the_limit_are_refused(server: LocalServer) -> None:
    video_id = server.submit()
    server.finish(video_id)
    with server.app.state.door.downloads.take():
        check_refused(server.client.get(f"/v1/videos/{video_id}/content"), "too_many_downloads")
    assert server.client.get(f"/v1/videos/{video_id}/content").status_code == 200
    assert server.client.get(f"/v1/videos/{video_id}/content").status_code == 200


def test_uploads_past_the_limit_are_refused_while_probes_are_answered(server: LocalServer) -> None:
    with closing(half_sent(server, 1)), closing(half_sent(server, 1)):
        check_refused(server.client.post("/v1/videos", json={"prompt": "a ball"}), "too_many_uploads")
        assert server.client.get("/healthz").status_code == 200
        assert server.client.get("/readyz").status_code == 200
    time.sleep(0.2)
    server.submit()


def test_all_uploads_together_hold_no_more_bytes_than_they_may(server: LocalServer) -> None:
    with closing(half_sent(server, 900)):
        answer = send(server, HEAD + b"Content-Length: 1000\r\n\r\n" + b" " * 700)
        assert answer.startswith(b"HTTP/1.1 429 "), answer
        assert b"together may hold 1500 bytes" in answer
        server.submit()  # a small one fits beside it


def test_a_body_that_is_too_large_is_not_discarded_where_there_is_no_room_for_it(server: LocalServer) -> None:
    started = time.monotonic()
    assert send(server, HEAD + b"Content-Length: 1501\r\n\r\n{").startswith(b"HTTP/1.1 413 ")
    assert time.monotonic() - started < 2.0


def test_the_places_of_broken_connections_are_free_again(server: LocalServer, tmp_path: Path) -> None:
    for _ in range(5):
        half_sent(server, 700).close()
    time.sleep(0.2)
    server.submit()
