from pathlib import Path

from deployments.http.config import HttpConfig
from tests.serve.http.http_at_hand import check
from tests.serve.local_server import serve_locally


def test_a_key_is_asked_for_where_there_are_keys(tmp_path: Path) -> None:
    with serve_locally(str(tmp_path), http=HttpConfig(api_keys=("secret",))) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            check(server.client.get("/v1/videos", headers=headers), 401, "Authorization")
            check(server.client.post("/v1/videos", json={"prompt": "a"}, headers=headers), 401, "Authorization")
        assert server.client.get("/v1/videos", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert server.client.get("/healthz").status_code == 200
