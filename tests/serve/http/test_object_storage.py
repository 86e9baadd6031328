"""The app over an object storage, as clients see it."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.claims.config import ClaimsConfig
from pyramid_serve.storage import VideoStore
from tests.faulty_proxy import FaultyProxy, faulty_proxy
from tests.object_storage import bucket_at, client, reached_at
from tests.serve.http.http_at_hand import check, events, png
from tests.serve.local_server import LocalServer, probe, serve_locally


@pytest.fixture(scope="module")
def proxy(s3_endpoint: str) -> Iterator[FaultyProxy]:
    with faulty_proxy(s3_endpoint) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def root(s3_endpoint: str, proxy: FaultyProxy) -> Iterator[str]:
    with bucket_at(s3_endpoint) as root, reached_at(proxy.url):
        yield f"{root}/videos of an app"


@pytest.fixture(scope="module")
def server(root: str) -> Iterator[LocalServer]:
    with serve_locally(root, unit_seconds=0.02) as server:
        yield server


@pytest.fixture(params=[pytest.param(0.0, id="well", marks=pytest.mark.slow), pytest.param(0.15, id="badly")])
def share(request: pytest.FixtureRequest, proxy: FaultyProxy) -> Iterator[float]:
    """How many of the requests to the storage go wrong."""
    proxy.share, proxy.wait_s = request.param, 0.1
    yield request.param
    proxy.share = 0.0


def test_a_video_is_made_streamed_listed_sent_and_deleted(server: LocalServer, share: float, tmp_path: Path) -> None:
    files = {"input_reference": ("in.png", png(100, 50), "image/png")}
    headers = {"Idempotency-Key": f"once {share}"}
    answers = [
        server.client.post("/v1/videos", data={"prompt": "a ball"}, files=files, headers=headers) for _ in range(2)
    ]
    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
    video_id = answers[0].json()["id"]
    assert answers[1].json()["id"] == video_id
    path = f"/v1/videos/{video_id}"
    streamed = server.client.get(f"{path}/stream")
    assert list(events(server, video_id))[-1][1]["status"] == "completed"
    content = server.client.get(f"{path}/content")
    (tmp_path / "video.mp4").write_bytes(content.content)
    assert probe(tmp_path / "video.mp4")[0] == 25
    (tmp_path / "stream.mp4").write_bytes(streamed.content)
    assert probe(tmp_path / "stream.mp4")[0] == 25
    part = server.client.get(f"{path}/content", headers={"Range": "bytes=4-11"})
    assert (part.status_code, part.content) == (206, content.content[4:12])
    previews = [server.client.get(f"{path}/content?variant=thumbnail") for _ in range(2)]
    assert previews[0].status_code == 200 and previews[0].content == previews[1].content
    assert video_id in [video["id"] for video in server.client.get("/v1/videos").json()["data"]]
    assert server.client.get("/readyz").status_code == 200
    assert server.client.delete(path).status_code == 200
    check(server.client.get(path), 404, "video_id")
    check(server.client.get(f"{path}/content"), 404, "video_id")
    again = server.client.post("/v1/videos", data={"prompt": "a ball"}, files=files, headers=headers)
    assert again.json()["id"] != video_id
    server.client.delete(f"/v1/videos/{again.json()['id']}")


@pytest.mark.slow
def test_pages_follow_each_other_on_an_object_storage(server: LocalServer) -> None:
    made = [server.submit(seconds="0.4") for _ in range(3)]
    for video_id in made:
        server.finish(video_id)
    listed: list[str] = []
    page = server.client.get("/v1/videos?limit=2").json()
    while True:
        listed += [video["id"] for video in page["data"]]
        if not page["has_more"]:
            break
        page = server.client.get(f"/v1/videos?limit=2&after={page['last_id']}").json()
    assert listed[:3] == made[::-1]
    for video_id in made:
        assert server.client.delete(f"/v1/videos/{video_id}").status_code == 200


def test_a_deleted_video_leaves_nothing_in_the_bucket(root: str, s3_endpoint: str, server: LocalServer) -> None:
    finished, cancelled = server.submit(), server.submit("hold")
    server.finish(finished)
    server.until(cancelled, lambda video: video["num_units_done"] == 2)
    for video_id in (finished, cancelled):
        assert server.client.delete(f"/v1/videos/{video_id}").status_code == 200
    bucket, _, folder = root.removeprefix("s3://").partition("/")

    def left() -> list[str]:
        found = client(s3_endpoint).list_objects_v2(Bucket=bucket, Prefix=f"{folder}/").get("Contents", [])
        return [entry["Key"] for entry in found if finished in entry["Key"] or cancelled in entry["Key"]]

    deadline = time.monotonic() + 5
    while left() and time.monotonic() < deadline:
        time.sleep(0.1)  # until a late writer has seen that the video is gone
    assert left() == []


@pytest.mark.slow
def test_two_apps_on_one_bucket_answer_for_each_others_videos(bucket: str) -> None:
    claims = ClaimsConfig(app_lease_s=4.0, sweep_interval_s=0.2)
    with serve_locally(bucket, claims=claims, app="one") as one, serve_locally(bucket, claims=claims, app="two") as two:
        made = [server.submit() for server in (one, two) * 4]
        for server in (one, two):
            for video_id in made:
                video = server.finish(video_id)
                assert (video["status"], video["attempts"]) == ("completed", 1)
            assert [video["id"] for video in server.client.get("/v1/videos").json()["data"]] == made[::-1]
        held = two.submit("hold")
        assert one.client.post(f"/v1/videos/{held}/cancel").json()["error"]["code"] == "cancelled"
        for video_id in (*made, held):
            assert one.client.delete(f"/v1/videos/{video_id}").status_code == 200
        assert two.client.get("/v1/videos").json()["data"] == []
    assert VideoStore(bucket).holds.terms() == {}
