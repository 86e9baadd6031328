from pathlib import Path

from deployments.claims.config import ClaimsConfig
from deployments.http.config import HttpConfig
from tests.serve.http.http_at_hand import KEYS, events
from tests.serve.local_server import LocalServer, serve_locally


def test_events_tell_each_change_until_the_end(server: LocalServer) -> None:
    video_id = server.submit(seconds="5")
    told = list(events(server, video_id))
    assert {kind for kind, _ in told} == {"video"}
    videos = [video for _, video in told]
    assert all(list(video)[:13] == KEYS for video in videos)
    assert videos[-1] == server.client.get(f"/v1/videos/{video_id}").json()
    assert videos[-1]["status"] == "completed"
    done = [video["num_units_done"] for video in videos]
    assert done == sorted(done)
    assert len(set(done)) > 2


def test_events_of_a_finished_video_are_its_end(server: LocalServer, finished: str) -> None:
    assert [video["status"] for _, video in events(server, finished)] == ["completed"]


def test_a_client_that_knows_the_end_is_told_to_stop_asking(server: LocalServer, finished: str) -> None:
    path = f"/v1/videos/{finished}/events"
    with server.client.stream("GET", path) as answer:
        (revision,) = [line.partition(": ")[2] for line in answer.iter_lines() if line.startswith("id")]
    assert server.client.get(path, headers={"Last-Event-ID": revision}).status_code == 204


def test_events_tell_that_the_video_was_deleted(server: LocalServer) -> None:
    video_id = server.submit("hold")
    told = events(server, video_id)
    assert next(told)[0] == "video"
    server.client.delete(f"/v1/videos/{video_id}")
    assert list(told)[-1] == ("deleted", {"id": video_id})


def test_silent_events_are_kept_alive_and_tell_the_place_in_the_queue(tmp_path: Path) -> None:
    claims = ClaimsConfig(max_running=1)
    with serve_locally(str(tmp_path), claims=claims, http=HttpConfig(events_keep_alive_s=0.2)) as server:
        holding = server.submit("hold")
        server.until(holding, lambda video: video["num_units_done"] == 2)
        ahead, waiting = server.submit(), server.submit()
        with server.client.stream("GET", f"/v1/videos/{waiting}/events") as answer:
            assert any(line == ": still here" for line in answer.iter_lines())
        told = events(server, waiting)
        assert next(told)[1]["queue_position"] == 1
        server.client.delete(f"/v1/videos/{ahead}")
        assert next(told)[1]["queue_position"] == 0
        server.client.delete(f"/v1/videos/{holding}")
        assert list(told)[-1][1]["status"] == "completed"


def test_events_are_sent_in_the_form_that_browsers_and_proxies_expect(server: LocalServer, finished: str) -> None:
    answer = server.client.get(f"/v1/videos/{finished}/events")
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-accel-buffering"] == "no"
    fields, end = answer.text.split("\n")[:-2], answer.text[-2:]
    assert [line.partition(": ")[0] for line in fields] == ["event", "data", "id"]
    assert fields[0] == "event: video"
    assert fields[2].removeprefix("id: ").isdecimal()
    assert end == "\n\n"
