from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from deployments.claims.config import ClaimsConfig
from tests.serve.http.http_at_hand import check
from tests.serve.local_server import serve_locally


def test_a_full_queue_is_told_with_when_to_try_again(tmp_path: Path) -> None:
    with serve_locally(str(tmp_path), claims=ClaimsConfig(max_running=1, max_queued=2)) as server:
        holding = server.submit("hold")
        server.until(holding, lambda video: video["num_units_done"] == 2)
        waiting = [server.submit(), server.submit()]
        positions = [server.client.get(f"/v1/videos/{video_id}").json()["queue_position"] for video_id in waiting]
        assert positions == [0, 1]
        answer = server.client.post("/v1/videos", json={"prompt": "a"})
        check(answer, 429, None)
        assert int(answer.headers["retry-after"]) >= 1
        server.client.delete(f"/v1/videos/{holding}")
        assert {server.finish(video_id)["status"] for video_id in waiting} == {"completed"}


def test_200_requests_at_once_are_each_finished_or_told_to_come_again(tmp_path: Path) -> None:
    claims = ClaimsConfig(max_running=8, max_queued=60)
    with serve_locally(str(tmp_path), unit_seconds=0.02, claims=claims) as server:
        holding = [server.submit("hold") for _ in range(8)]  # so no place comes free meanwhile
        for video_id in holding:
            server.until(video_id, lambda video: video["status"] == "in_progress")

        def post_four(_: int) -> list[httpx.Response]:
            with httpx.Client(base_url=server.url, timeout=60) as client:
                return [client.post("/v1/videos", json={"prompt": "a", "seconds": "0.4"}) for _ in range(4)]

        with ThreadPoolExecutor(50) as clients:
            answers = [answer for four in clients.map(post_four, range(50)) for answer in four]
        accepted = [answer.json()["id"] for answer in answers if answer.status_code == 200]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert (len(accepted), len(refused)) == (60, 140)
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        for video_id in holding:
            server.client.delete(f"/v1/videos/{video_id}")
        assert {server.finish(video_id, timeout_s=60)["status"] for video_id in accepted} == {"completed"}
