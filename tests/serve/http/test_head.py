from collections.abc import Iterator

import pytest

from tests.serve.local_server import LocalServer, serve_locally


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with serve_locally(str(tmp_path_factory.mktemp("storage")), unit_seconds=0.05) as server:
        yield server


@pytest.fixture(scope="module")
def finished(server: LocalServer) -> str:
    """The id of a finished video of 4 units."""
    return str(server.finish(server.submit())["id"])


HEADED = [
    *("/", "/healthz", "/readyz", "/docs", "/openapi.json", "/docs/assets/swagger-ui.css", "/v1/models"),
    *("/v1/models/tiny", "/v1/videos?limit=1", "/v1/videos/ID", "/v1/videos/ID/content", "/v1/videos/ID/stream"),
    *("/v1/videos/ID/content?variant=thumbnail", "/v1/videos/ID/events", "/v1/videos/nobody"),
]


@pytest.mark.parametrize("path", HEADED)
def test_the_head_of_an_answer_is_that_of_get_without_the_body(server: LocalServer, finished: str, path: str) -> None:
    path = path.replace("ID", finished)
    head, whole = server.client.head(path), server.client.get(path)
    assert (head.status_code, head.content) == (whole.status_code, b"")
    assert whole.content
    for name in whole.headers.keys() - {"date", "transfer-encoding", "x-request-id"}:
        assert head.headers[name] == whole.headers[name], name


@pytest.mark.parametrize("rest", ["stream", "events"])
def test_the_head_of_a_video_that_is_being_made_waits_for_nothing(server: LocalServer, rest: str) -> None:
    video_id = server.submit("hold")
    server.until(video_id, lambda video: video["num_units_done"] == 2)
    path = f"/v1/videos/{video_id}/{rest}"
    head = server.client.head(path, timeout=5)
    with server.client.stream("GET", path) as answer:
        for name in answer.headers.keys() - {"date", "transfer-encoding", "x-request-id"}:
            assert head.headers[name] == answer.headers[name]
    assert "content-length" not in head.headers
    server.client.delete(f"/v1/videos/{video_id}")


def test_paths_may_end_in_a_slash(server: LocalServer, finished: str) -> None:
    assert server.client.post("/v1/videos/", json={"prompt": "a", "seconds": "0.04"}).status_code == 200
    assert (
        server.client.post("/v1/videos/", files={"prompt": (None, "a"), "seconds": (None, "0.04")}).status_code == 200
    )
    for path in HEADED:
        if "?" not in path and "assets" not in path:
            path = path.replace("ID", finished)
            with_slash, without = server.client.get(f"{path.rstrip('/')}/"), server.client.get(path)
            assert with_slash.status_code == without.status_code, path
            assert not with_slash.history
    assert server.client.get("/v1/videos//").status_code == 404
    assert server.client.delete("/v1/videos/").status_code == 405
