"""Requests that wait for the end of their video: ``?wait=true`` and ``/sync``."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.serve.http.http_at_hand import check
from tests.serve.local_server import LocalServer, probe


def test_a_waiting_request_answers_with_the_finished_video(server: LocalServer) -> None:
    video = server.client.post("/v1/videos?wait=true", json={"prompt": "a"}).json()
    assert (video["status"], video["progress"]) == ("completed", 100)
    video = server.client.post("/v1/videos?wait=true", json={"prompt": "fail"}).json()
    assert (video["status"], video["error"]["code"]) == ("failed", "server_error")


def test_a_client_that_leaves_a_waiting_request_cancels_the_video(server: LocalServer) -> None:
    def newest() -> str:
        return str(server.client.get("/v1/videos?limit=1").json()["data"][0]["id"])

    before = server.submit(seconds="0.4")
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/v1/videos?wait=true", json={"prompt": "hold"}, timeout=0.5)
    deadline = time.monotonic() + 30
    while (video_id := newest()) == before:  # it may be accepted a moment after its client left
        assert time.monotonic() < deadline
    assert server.finish(video_id)["error"]["code"] == "cancelled"


def test_one_who_waits_for_the_video_of_another_does_not_cancel_it(server: LocalServer) -> None:
    headers = {"Idempotency-Key": "waited for twice"}
    video_id = server.client.post("/v1/videos", json={"prompt": "hold"}, headers=headers).json()["id"]
    server.until(video_id, lambda video: video["status"] == "in_progress")
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/v1/videos?wait=true", json={"prompt": "hold"}, headers=headers, timeout=0.5)
    time.sleep(0.2)
    assert server.client.get(f"/v1/videos/{video_id}").json()["status"] == "in_progress"
    server.client.delete(f"/v1/videos/{video_id}")


@pytest.mark.parametrize("way", ["json", "form"])
def test_a_request_for_the_file_is_answered_with_it(server: LocalServer, tmp_path: Path, way: str) -> None:
    if way == "json":
        answer = server.client.post("/v1/videos/sync", json={"prompt": "a", "seconds": 1})
    else:
        answer = server.client.post("/v1/videos/sync/", files={"prompt": (None, "a"), "seconds": (None, "1")})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")
    video_id = answer.headers["x-video-id"]
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert f"{video_id}.mp4" in answer.headers["content-disposition"]
    assert answer.content == server.client.get(f"/v1/videos/{video_id}/content").content
    (tmp_path / "video.mp4").write_bytes(answer.content)
    assert probe(tmp_path / "video.mp4") == (25, 128, 64)


def test_a_video_that_fails_is_an_error_with_its_id(server: LocalServer) -> None:
    answer = server.client.post("/v1/videos/sync", json={"prompt": "fail"})
    check(answer, 500, None, "it had to fail", answer.headers["x-video-id"])
    assert answer.json()["error"]["code"] == "server_error"
    assert answer.headers["x-should-retry"] == "false"
    assert server.client.get(f"/v1/videos/{answer.headers['x-video-id']}").json()["status"] == "failed"


@pytest.mark.parametrize(("method", "rest", "status"), [("POST", "/cancel", 422), ("DELETE", "", 404)])
@pytest.mark.parametrize("path", ["/v1/videos/sync", "/v1/videos?wait=true"])
def test_a_video_that_others_end_meanwhile(server: LocalServer, path: str, method: str, rest: str, status: int) -> None:
    headers = {"Idempotency-Key": f"{path} {method}"}
    video_id = server.client.post("/v1/videos", json={"prompt": "hold"}, headers=headers).json()["id"]
    with ThreadPoolExecutor(1) as waiting:
        answer = waiting.submit(httpx.post, f"{server.url}{path}", json={"prompt": "hold"}, headers=headers, timeout=30)
        server.until(video_id, lambda video: video["num_units_done"] == 2)
        time.sleep(0.2)
        server.client.request(method, f"/v1/videos/{video_id}{rest}")
    if status == 422 and "wait" in path:
        assert answer.result().json()["error"]["code"] == "cancelled"
    else:
        check(answer.result(), status, "video_id" if status == 404 else None, video_id)


def test_a_client_that_leaves_a_request_for_the_file_cancels_the_video(server: LocalServer) -> None:
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/v1/videos/sync", json={"prompt": "hold", "user": "who leaves"}, timeout=0.5)
    deadline = time.monotonic() + 30
    while (newest := server.client.get("/v1/videos?limit=1").json()["data"][0])["user"] != "who leaves":
        assert time.monotonic() < deadline
    assert server.finish(newest["id"])["error"]["code"] == "cancelled"


def test_a_request_for_the_file_honours_its_key(server: LocalServer) -> None:
    def post(prompt: str) -> httpx.Response:
        return server.client.post("/v1/videos/sync", json={"prompt": prompt}, headers={"Idempotency-Key": "the file"})

    first, again = post("once"), post("once")
    assert (again.content, again.headers["x-video-id"]) == (first.content, first.headers["x-video-id"])
    check(post("another"), 400, "Idempotency-Key")
