"""What the server says that it does."""

from tests.serve.http.http_at_hand import check
from tests.serve.local_server import LocalServer


def test_the_queue_is_told(server: LocalServer) -> None:
    held = server.submit("hold", seconds="1")
    server.until(held, lambda video: video["status"] == "in_progress")
    status = server.client.get("/v1/status")
    assert status.headers["cache-control"] == "no-store"
    assert status.json()["object"] == "status"
    assert status.json()["queue"]["num_in_progress"] >= 1
    server.client.post(f"/v1/videos/{held}/cancel")
    check(server.client.get("/v1/status?all=1"), 400, "all")
