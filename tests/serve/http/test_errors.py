"""Wrong ids, queries, headers and methods: each is answered in the form of an error."""

import json

import pytest

from tests.serve.http.http_at_hand import UNKNOWN_ID, check, send
from tests.serve.local_server import LocalServer


@pytest.mark.parametrize(
    "video_id",
    [
        "x",
        "video_",
        "video_123",
        "video_" + "g" * 32,
        "VIDEO_" + "0" * 32,
        "video_" + "0" * 33,
        UNKNOWN_ID,
        "..",
        "../../etc",
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e%2fsecret",
        "..%5c..%5csecret",
        "video_%00",
        "%ff%fe",
        "video_" + "0" * 5000,
        "*",
        "%7B%7D",
        UNKNOWN_ID + "%0a",
    ],
)
@pytest.mark.parametrize(
    ("method", "rest"),
    [
        ("GET", ""),
        ("DELETE", ""),
        ("POST", "/cancel"),
        ("GET", "/content"),
        ("GET", "/stream"),
        ("GET", "/events"),
    ],
)
def test_an_unknown_id_is_not_found(server: LocalServer, video_id: str, method: str, rest: str) -> None:
    # As raw bytes, for a client would tidy up the path.
    answer = send(server, f"{method} /v1/videos/{video_id}{rest} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    assert status == 404, answer
    assert json.loads(body)["error"]["param"] == "video_id"


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=-1", "limit"),
        ("limit=101", "limit"),
        ("limit=ten", "limit"),
        ("limit=", "limit"),
        ("limit=1.5", "limit"),
        ("limit=1&limit=2", "limit"),
        ("after=x", "after"),
        ("after=", "after"),
        ("after=../../etc", "after"),
        ("order=up", "order"),
        ("order=", "order"),
        ("order=ASC", "order"),
        ("before=x", "before"),
        ("page=2", "page"),
    ],
)
def test_a_wrong_query_of_the_list_is_named(server: LocalServer, query: str, param: str) -> None:
    check(server.client.get(f"/v1/videos?{query}"), 400, param, param)


@pytest.mark.parametrize(
    ("path", "param"),
    [
        (f"/v1/videos/{UNKNOWN_ID}/content?variant=audio", "variant"),
        (f"/v1/videos/{UNKNOWN_ID}/content?variant=", "variant"),
        (f"/v1/videos/{UNKNOWN_ID}/content?format=gif", "format"),
        (f"/v1/videos/{UNKNOWN_ID}?full=1", "full"),
        ("/v1/models?limit=1", "limit"),
    ],
)
def test_a_wrong_query_is_named(server: LocalServer, path: str, param: str) -> None:
    check(server.client.get(path), 400, param, param)


def test_a_wrong_query_of_a_new_video_is_named(server: LocalServer) -> None:
    check(server.client.post("/v1/videos?wait=perhaps", json={"prompt": "a"}), 400, "wait")
    check(server.client.post("/v1/videos?prompt=a", json={"prompt": "a"}), 400, "prompt")


@pytest.mark.parametrize("key", ["", "k" * 256])
def test_a_wrong_idempotency_key_is_named(server: LocalServer, key: str) -> None:
    answer = server.client.post("/v1/videos", json={"prompt": "a"}, headers={"Idempotency-Key": key})
    check(answer, 400, "Idempotency-Key")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/videos", "GET, HEAD, POST"),
        ("DELETE", "/v1/videos", "GET, HEAD, POST"),
        ("DELETE", "/v1/videos/", "GET, HEAD, POST"),
        ("PATCH", f"/v1/videos/{UNKNOWN_ID}", "DELETE, GET, HEAD"),
        ("POST", f"/v1/videos/{UNKNOWN_ID}", "DELETE, GET, HEAD"),
        ("POST", f"/v1/videos/{UNKNOWN_ID}/content", "GET, HEAD"),
        ("GET", f"/v1/videos/{UNKNOWN_ID}/cancel", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("POST", "/docs", "GET, HEAD"),
        ("POST", "/docs/assets/swagger-ui.css", "GET, HEAD"),
    ],
)
def test_another_method_is_not_allowed(server: LocalServer, method: str, path: str, allowed: str) -> None:
    answer = server.client.request(method, path)
    check(answer, 405, None, allowed)
    assert answer.headers["allow"] == allowed


@pytest.mark.parametrize("path", ["/v1", "/v1/video", "/v2/videos", f"/v1/videos/{UNKNOWN_ID}/remixes", "/.env"])
def test_another_path_is_not_found(server: LocalServer, path: str) -> None:
    check(server.client.get(path), 404, None, "no such path")


def test_another_model_is_not_found(server: LocalServer) -> None:
    answer = server.client.get("/v1/models/sora-2")
    check(answer, 404, "model", "'tiny'")
    assert answer.json()["error"]["code"] == "model_not_found"
