import time
from pathlib import Path

from deployments.http.config import HttpConfig
from deployments.http.keys import WRONG_KEY_PAUSE_S
from tests.serve.http.http_at_hand import check
from tests.serve.local_server import serve_locally


def test_a_key_is_asked_for_where_there_are_keys(tmp_path: Path) -> None:
    with serve_locally(str(tmp_path), http=HttpConfig(api_keys=("secret",))) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            check(server.client.get("/v1/videos", headers=headers), 401, "Authorization")
            check(server.client.post("/v1/videos", json={"prompt": "a"}, headers=headers), 401, "Authorization")
        assert server.client.get("/v1/videos", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert server.client.get("/healthz").status_code == 200


def test_the_page_asks_for_a_key_only_where_there_are_keys(tmp_path: Path) -> None:
    with serve_locally(str(tmp_path), http=HttpConfig(api_keys=("secret",))) as server:
        document = server.client.get("/openapi.json").json()
        assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            for operation in operations.values():
                assert ("security" in operation) == path.startswith("/v1/")
    with serve_locally(str(tmp_path)) as server:
        text = server.client.get("/openapi.json").text
        assert "securitySchemes" not in text
        assert '"security"' not in text


def test_a_key_of_a_folder_is_asked_for_as_others_are(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "alice").write_text("hers\n")
    with serve_locally(str(tmp_path / "videos"), http=HttpConfig(api_keys_folder=tmp_path / "keys")) as server:
        assert server.client.get("/v1/models").status_code == 401
        assert server.client.get("/v1/models", headers={"Authorization": "Bearer hers"}).status_code == 200
        assert "securitySchemes" in server.client.get("/openapi.json").text


def test_a_wrong_key_does_not_hold_up_the_others(tmp_path: Path) -> None:
    with serve_locally(str(tmp_path), http=HttpConfig(api_keys=("secret",))) as server:
        started = time.monotonic()
        assert server.client.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert time.monotonic() - started >= WRONG_KEY_PAUSE_S
        started = time.monotonic()
        assert server.client.get("/v1/models").status_code == 401  # without a key nothing was guessed
        assert server.client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert time.monotonic() - started < WRONG_KEY_PAUSE_S
