"""The videos API as its clients see it, with real claims and storage and invented videos behind it."""

import base64
import contextlib
import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from deployments.claims.config import ClaimsConfig
from deployments.http.app import HttpConfig
from deployments.http.schema import VIDEO_EXAMPLE
from pyramid_serve.api import VideoRequest
from tests.serve.http.test_bad_requests import check, png
from tests.serve.local_server import LocalServer, fragment, probe, serve_locally
from tests.unit.media.pictures_at_hand import DISPLAY_P3_COLORANTS, exif, file_of, gradient, orientation, rgb_profile

KEYS = [
    "id",
    "object",
    "model",
    "status",
    "progress",
    "created_at",
    "completed_at",
    "expires_at",
    "prompt",
    "size",
    "seconds",
    "remixed_from_video_id",
    "error",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with serve_locally(str(tmp_path_factory.mktemp("storage")), unit_seconds=0.05) as server:
        yield server


# --- the video object -----------------------------------------------------------------------------------------------


def test_a_video_goes_from_queued_to_completed(server: LocalServer) -> None:
    answer = server.client.post("/v1/videos", json={"prompt": "a ball", "seconds": "1", "size": "128x64", "seed": 7})
    video = answer.json()
    assert answer.headers["content-type"] == "application/json"
    assert list(video)[:13] == KEYS
    assert video["object"] == "video"
    assert video["status"] in ("queued", "in_progress")
    assert (video["prompt"], video["size"], video["seconds"], video["model"]) == ("a ball", "128x64", "1", "tiny")
    assert video["error"] is video["completed_at"] is video["expires_at"] is video["remixed_from_video_id"] is None
    assert abs(video["created_at"] - time.time()) < 5
    progress: list[int] = []

    def is_completed(now: dict[str, Any]) -> bool:
        progress.append(now["progress"])
        return bool(now["status"] == "completed")

    finished = server.until(video["id"], is_completed)
    assert progress == sorted(progress)
    assert finished["progress"] == 100
    assert finished["completed_at"] >= finished["created_at"]
    assert finished["expires_at"] > finished["completed_at"]
    assert (finished["num_frames"], finished["seed"], finished["num_units_done"]) == (25, 7, 4)


def test_json_and_a_form_ask_for_the_same_video(server: LocalServer) -> None:
    settings = {
        "prompt": "ein Ball, größer",
        "negative_prompt": "",
        "seconds": "0.4",
        "size": "64x64",
        "seed": 7,
        "num_inference_steps": [3, 2, 1],
        "video_num_inference_steps": 2,
        "guidance_scale": 2.5,
        "video_guidance_scale": 3,
        "user": "größer",
        "metadata": {"scene": "12", "größe": "[1]", "a[0].b": ""},
    }
    form: list[tuple[str, Any]] = [
        ("prompt", (None, "ein Ball, größer")),
        ("negative_prompt", (None, "")),
        ("seconds", (None, "0.4")),
        ("size", (None, "64x64")),
        ("seed", (None, "7")),
        *(("num_inference_steps[]", (None, text)) for text in "321"),
        ("video_num_inference_steps", (None, "[2, 2, 2]")),
        ("guidance_scale", (None, "2.5")),
        ("video_guidance_scale", (None, "3")),
        ("user", (None, "größer")),
        ("metadata[scene]", (None, "12")),
        ("metadata[größe]", (None, "[1]")),
        ("metadata[a[0].b]", (None, "")),
    ]
    videos = [
        server.client.post("/v1/videos", json=settings).json(),
        server.client.post("/v1/videos", files=form).json(),
    ]
    for name in settings.keys() | {"num_frames"}:
        assert videos[0][name] == videos[1][name]
    assert videos[0]["num_inference_steps"] == [3, 2, 1]
    assert videos[0]["video_num_inference_steps"] == [2, 2, 2]


def test_other_names_of_the_same_ask_for_the_same_in_json_and_a_form(server: LocalServer) -> None:
    fields: dict[str, Any] = {
        "prompt": "a",
        "width": 64,
        "height": 64,
        "num_frames": 10,
        "fps": 24,
        "seed": 2**64 - 1,
        "linear_guidance_alpha": 0.25,
        "linear_guidance_minimum": 3,
        "metadata": {"a": "b"},
    }
    form = {name: (None, str(value)) for name, value in fields.items()} | {"metadata": (None, '{"a": "b"}')}
    for answer in (server.client.post("/v1/videos", json=fields), server.client.post("/v1/videos/", files=form)):
        assert answer.status_code == 200, answer.text
        video = answer.json()
        assert (video["size"], video["num_frames"], video["seconds"], video["seed"]) == ("64x64", 9, "0.38", 2**64 - 1)
        assert (video["linear_guidance_alpha"], video["linear_guidance_minimum"]) == (0.25, 3)
        assert (video["video_guidance_scale"], video["metadata"]) == (None, {"a": "b"})


def test_user_and_metadata_are_in_every_answer(server: LocalServer) -> None:
    kept = {"user": "me", "metadata": {"scene": "12"}}
    video_id = server.submit(seconds="0.4", **kept)
    videos = [
        server.finish(video_id),
        server.client.get("/v1/videos?limit=1").json()["data"][0],
        *(video for _, video in events(server, video_id)),
    ]
    for video in videos:
        assert {name: video[name] for name in kept} == kept
    video_id = server.submit(seconds="0.4")
    assert [server.finish(video_id)[name] for name in kept] == [None, None]


@pytest.mark.parametrize("seed", [-1, "-1"])
def test_a_drawn_seed_is_told(server: LocalServer, seed: int | str) -> None:
    seeds = {server.finish(server.submit(seconds="0.04", seed=seed))["seed"] for _ in range(3)}
    assert len(seeds) > 1
    assert min(seeds) >= 0


@pytest.mark.parametrize("way", ["file", "url", "url in a form", "object in a form"])
def test_a_picture_comes_as_a_file_or_a_data_url(server: LocalServer, way: str) -> None:
    picture = png(200, 100)
    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    forms: dict[str, dict[str, Any]] = {
        "file": {"input_reference": ("a.png", picture, "image/png")},
        "url in a form": {"input_reference[image_url]": (None, url)},
        "object in a form": {"input_reference": (None, json.dumps({"image_url": url}))},
    }
    if way == "url":
        answer = server.client.post("/v1/videos", json={"prompt": "a", "input_reference": {"image_url": url}})
    else:
        answer = server.client.post("/v1/videos", files={"prompt": (None, "a"), **forms[way]})
    assert answer.status_code == 200, answer.text
    assert answer.json()["has_input_reference"] is True


def test_a_form_with_no_file_chosen_has_no_picture(server: LocalServer) -> None:
    body = (
        b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n'
        b'--b\r\nContent-Disposition: form-data; name="input_reference"; filename=""\r\n\r\n\r\n--b--\r\n'
    )
    answer = server.client.post("/v1/videos", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert answer.json()["has_input_reference"] is False


def test_a_failed_video_says_why(server: LocalServer) -> None:
    video = server.finish(server.submit("fail"))
    assert video["status"] == "failed"
    assert video["error"] == {"code": "server_error", "message": "it had to fail"}
    check(server.client.get(f"/v1/videos/{video['id']}/content"), 409, "video_id", "it had to fail")
    check(server.client.get(f"/v1/videos/{video['id']}/stream"), 409, "video_id", "it had to fail")


def test_clients_are_told_when_to_poll_until_the_end(server: LocalServer) -> None:
    answer = server.client.post("/v1/videos", json={"prompt": "a"})
    assert 100 <= int(answer.headers["openai-poll-after-ms"]) <= 5000
    video_id = answer.json()["id"]
    server.finish(video_id)
    assert "openai-poll-after-ms" not in server.client.get(f"/v1/videos/{video_id}").headers


# --- lists ----------------------------------------------------------------------------------------------------------


def test_pages_hold_every_video_once(tmp_path: Path) -> None:
    with serve_locally(str(tmp_path)) as server:
        assert server.client.get("/v1/videos").json() == {
            "object": "list",
            "data": [],
            "first_id": None,
            "last_id": None,
            "has_more": False,
        }
        ids = [server.submit() for _ in range(5)]
        for order, expected in (("asc", ids), ("desc", ids[::-1])):
            found: list[str] = []
            after: dict[str, str] = {}
            while True:
                page = server.client.get("/v1/videos", params={"limit": 2, "order": order, **after}).json()
                found += [video["id"] for video in page["data"]]
                assert page["first_id"] == page["data"][0]["id"]
                assert page["last_id"] == page["data"][-1]["id"]
                after = {"after": page["last_id"]}
                if not page["has_more"]:
                    break
            assert found == expected
        assert list(page["data"][0])[:13] == KEYS
        none = server.client.get("/v1/videos?limit=0").json()
        assert (none["data"], none["has_more"]) == ([], True)


def test_the_model_is_listed_with_what_it_can_do(server: LocalServer) -> None:
    models = server.client.get("/v1/models").json()
    assert models["object"] == "list"
    (model,) = models["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("tiny", "model", "pyramid-serve")
    assert model["sizes"] == ["128x64", "64x64"]
    assert model["max_num_frames"] == 121
    assert server.client.get("/v1/models/tiny").json() == model


# --- cancel and delete ----------------------------------------------------------------------------------------------


def test_a_running_video_can_be_cancelled(server: LocalServer) -> None:
    video_id = server.submit("hold")
    server.until(video_id, lambda video: video["num_units_done"] == 2)
    cancelled = server.client.post(f"/v1/videos/{video_id}/cancel").json()
    assert (cancelled["status"], cancelled["error"]["code"]) == ("failed", "cancelled")
    assert server.client.get(f"/v1/videos/{video_id}").json() == cancelled
    assert server.client.post(f"/v1/videos/{video_id}/cancel").json() == cancelled


@pytest.mark.parametrize("prompt", ["hold", "a ball"])
def test_a_deleted_video_is_gone(server: LocalServer, prompt: str) -> None:
    video_id = server.submit(prompt)
    server.until(video_id, lambda video: video["num_units_done"] >= 2)
    answer = server.client.delete(f"/v1/videos/{video_id}")
    assert answer.json() == {"id": video_id, "object": "video.deleted", "deleted": True}
    for rest in ("", "/content", "/stream", "/events"):
        check(server.client.get(f"/v1/videos/{video_id}{rest}"), 404, "video_id")
    check(server.client.delete(f"/v1/videos/{video_id}"), 404, "video_id")


# --- content --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(server: LocalServer) -> str:
    """The id of a finished video of 4 units."""
    return str(server.finish(server.submit())["id"])


def test_the_file_of_a_finished_video_plays(server: LocalServer, finished: str, tmp_path: Path) -> None:
    answer = server.client.get(f"/v1/videos/{finished}/content")
    assert answer.headers["content-type"] == "video/mp4"
    assert int(answer.headers["content-length"]) == len(answer.content)
    (tmp_path / "video.mp4").write_bytes(answer.content)
    assert probe(tmp_path / "video.mp4") == (25, 128, 64)


@pytest.mark.parametrize(("variant", "size"), [("thumbnail", (128, 64)), ("spritesheet", (640, 320))])
def test_previews_are_webp_pictures(server: LocalServer, finished: str, variant: str, size: tuple[int, int]) -> None:
    answers = [server.client.get(f"/v1/videos/{finished}/content?variant={variant}") for _ in range(2)]
    assert answers[0].headers["content-type"] == "image/webp"
    picture = Image.open(io.BytesIO(answers[0].content))
    assert (picture.format, picture.size) == ("WEBP", size)
    assert answers[0].content == answers[1].content


def test_an_unfinished_video_has_no_content_yet(server: LocalServer) -> None:
    video_id = server.submit("hold")
    for variant in ("video", "thumbnail", "spritesheet"):
        check(server.client.get(f"/v1/videos/{video_id}/content?variant={variant}"), 409, "video_id")
    server.client.delete(f"/v1/videos/{video_id}")


@pytest.mark.parametrize("rest", ["content", "stream"])
@pytest.mark.parametrize(
    ("asked", "span"),
    [
        ("bytes=0-", slice(0, None)),
        ("Bytes=0-9", slice(0, 10)),
        ("BYTES=-5", slice(-5, None)),
        ("bytes=5-1000", slice(5, 1001)),
        ("bytes=0-0", slice(0, 1)),
        ("bytes=10-19", slice(10, 20)),
        ("bytes=10-", slice(10, None)),
        ("bytes=-5", slice(-5, None)),
        ("bytes=10-999999999", slice(10, None)),
    ],
)
def test_a_range_can_be_had(server: LocalServer, finished: str, asked: str, span: slice, rest: str) -> None:
    path = f"/v1/videos/{finished}/{rest}"
    video = server.client.get(path).content
    answer = server.client.get(path, headers={"Range": asked})
    assert answer.status_code == 206
    assert answer.content == video[span]
    assert answer.headers["accept-ranges"] == "bytes"
    first, last, _ = span.indices(len(video))
    assert answer.headers["content-range"] == f"bytes {first}-{last - 1}/{len(video)}"
    assert int(answer.headers["content-length"]) == len(answer.content)


@pytest.mark.parametrize("rest", ["content", "stream"])
@pytest.mark.parametrize("asked", ["bytes=5-2", "frames=0-1", "bytes=0-1,4-5", "bytes=a-b", "bytes=-"])
def test_what_is_no_range_is_ignored(server: LocalServer, finished: str, asked: str, rest: str) -> None:
    assert server.client.get(f"/v1/videos/{finished}/{rest}", headers={"Range": asked}).status_code == 200


@pytest.mark.parametrize("rest", ["content", "stream"])
@pytest.mark.parametrize("asked", ["bytes=999999999-", "bytes=-0"])
def test_a_range_beyond_the_end_is_refused(server: LocalServer, finished: str, asked: str, rest: str) -> None:
    answer = server.client.get(f"/v1/videos/{finished}/{rest}", headers={"Range": asked})
    check(answer, 416, "Range")
    assert answer.headers["content-range"].startswith("bytes */")


@pytest.mark.parametrize("rest", ["content", "stream"])
def test_an_unchanged_file_is_not_sent_again(server: LocalServer, finished: str, rest: str) -> None:
    path = f"/v1/videos/{finished}/{rest}"
    etag = server.client.get(path).headers["etag"]
    assert server.client.get(path, headers={"If-None-Match": etag}).status_code == 304
    assert server.client.get(path, headers={"If-None-Match": '"other"'}).status_code == 200
    ranged = {"Range": "bytes=0-1", "If-Range": '"other"'}
    assert server.client.get(path, headers=ranged).status_code == 200
    assert server.client.get(path, headers={"Range": "bytes=0-1", "If-Range": etag}).status_code == 206


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
    for name in whole.headers.keys() - {"date", "transfer-encoding"}:
        assert head.headers[name] == whole.headers[name], name


@pytest.mark.parametrize("rest", ["stream", "events"])
def test_the_head_of_a_video_that_is_being_made_waits_for_nothing(server: LocalServer, rest: str) -> None:
    video_id = server.submit("hold")
    server.until(video_id, lambda video: video["num_units_done"] == 2)
    path = f"/v1/videos/{video_id}/{rest}"
    head = server.client.head(path, timeout=5)
    with server.client.stream("GET", path) as answer:
        for name in answer.headers.keys() - {"date", "transfer-encoding"}:
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


# --- stream ---------------------------------------------------------------------------------------------------------


def without_padding(stream: bytes) -> bytes:
    """A stream of MP4 boxes without those that hold nothing."""
    kept, at = b"", 0
    while at < len(stream):
        size = int.from_bytes(stream[at : at + 4])
        if stream[at + 4 : at + 8] != b"free":
            kept += stream[at : at + size]
        at += size
    return kept


def expected_stream(num_units: int) -> bytes:
    return b"".join(fragment(128, 64, unit) for unit in range(num_units))


def test_the_stream_begins_before_a_third_of_the_units_is_made(tmp_path: Path) -> None:
    with serve_locally(str(tmp_path), unit_seconds=0.2) as server:
        video_id = server.submit(seconds="5")
        ranged = {"Range": "bytes=10-20"}  # which is not to be had yet
        with server.client.stream("GET", f"/v1/videos/{video_id}/stream", headers=ranged) as answer:
            assert answer.status_code == 200
            assert answer.headers["content-type"] == "video/mp4"
            assert answer.headers["accept-ranges"] == "none"
            chunks = answer.iter_raw()
            first = next(chunks)
            num_done = server.client.get(f"/v1/videos/{video_id}").json()["num_units_done"]
            while len(first) < 32768:  # the network may cut anywhere
                first += next(chunks)
            streamed = first + b"".join(chunks)
    assert num_done < 16 / 3
    assert without_padding(streamed) == expected_stream(16)
    assert len(first) % 32768 == 0, "browsers play whole blocks only"


def test_every_viewer_sees_the_same_bytes_at_any_time(server: LocalServer, tmp_path: Path) -> None:
    video_id = server.submit(seconds="2.7")
    path = f"{server.url}/v1/videos/{video_id}/stream"
    with ThreadPoolExecutor(8) as viewers:
        early = [viewers.submit(httpx.get, path, timeout=30) for _ in range(4)]
        server.until(video_id, lambda video: video["num_units_done"] >= 4)
        late = [viewers.submit(httpx.get, path, timeout=30) for _ in range(4)]
        streams = {viewer.result().content for viewer in early + late}
    server.finish(video_id)
    streams.add(server.client.get(path).content)
    (stream,) = streams
    for asked, span in (
        ("0-99999", slice(100_000)),
        ("32767-32768", slice(32767, 32769)),
        ("100000-", slice(10**5, None)),
    ):
        assert server.client.get(path, headers={"Range": f"bytes={asked}"}).content == stream[span]
    assert without_padding(stream) == expected_stream(9)
    (tmp_path / "stream.mp4").write_bytes(stream)
    assert probe(tmp_path / "stream.mp4") == (65, 128, 64)


def test_a_viewer_who_leaves_stops_nothing(server: LocalServer) -> None:
    video_id = server.submit(seconds="2")
    with server.client.stream("GET", f"/v1/videos/{video_id}/stream") as answer:
        next(answer.iter_raw())
    assert server.finish(video_id)["status"] == "completed"


def test_the_stream_of_a_video_that_fails_is_broken_off(server: LocalServer) -> None:
    video_id = server.submit("hold")
    with (
        server.client.stream("GET", f"/v1/videos/{video_id}/stream") as answer,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        for _ in answer.iter_raw():
            server.client.post(f"/v1/videos/{video_id}/cancel")


# --- events ---------------------------------------------------------------------------------------------------------


def events(server: LocalServer, video_id: str, **headers: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with server.client.stream("GET", f"/v1/videos/{video_id}/events", headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        fields: dict[str, str] = {}
        for line in answer.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif "data" in fields:
                yield fields["event"], json.loads(fields["data"])
                fields = {}


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
            assert any(line.startswith(":") for line in answer.iter_lines())
        told = events(server, waiting)
        assert next(told)[1]["queue_position"] == 1
        server.client.delete(f"/v1/videos/{ahead}")
        assert next(told)[1]["queue_position"] == 0
        server.client.delete(f"/v1/videos/{holding}")
        assert list(told)[-1][1]["status"] == "completed"


# --- a request that waits -------------------------------------------------------------------------------------------


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


# --- a request for the file -----------------------------------------------------------------------------------------


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


# --- idempotency ----------------------------------------------------------------------------------------------------


def test_requests_with_one_key_make_one_video(server: LocalServer) -> None:
    def post(_: int) -> str:
        answer = httpx.post(
            f"{server.url}/v1/videos", json={"prompt": "once"}, headers={"Idempotency-Key": "one"}, timeout=30
        )
        return str(answer.json()["id"])

    with ThreadPoolExecutor(8) as clients:
        ids = set(clients.map(post, range(8)))
    assert len(ids) == 1
    (video_id,) = ids
    server.finish(video_id)
    assert post(0) == video_id


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": -1},
        {"width": 64, "height": 64, "num_frames": 49},
        {"linear_guidance_alpha": 1},
        {"user": "me", "metadata": {"a": "b"}},
    ],
)
def test_a_key_with_the_same_request_is_the_same_video(server: LocalServer, fields: dict[str, Any]) -> None:
    headers = {"Idempotency-Key": f"the same {sorted(fields)}"}
    answers = [server.client.post("/v1/videos", json={"prompt": "a"} | fields, headers=headers) for _ in range(2)]
    assert answers[0].json()["id"] == answers[1].json()["id"]


def test_a_key_knows_a_jpeg_with_metadata_again(server: LocalServer) -> None:
    options = {"exif": b"Exif\0\0" + exif(orientation(6)), "icc_profile": rgb_profile(DISPLAY_P3_COLORANTS)}
    files: Any = {
        "prompt": (None, "a"),
        "input_reference": ("a.jpg", file_of(gradient(), "JPEG", dpi=(72, 72), **options)),
    }
    headers = {"Idempotency-Key": "a photo"}
    answers = [server.client.post("/v1/videos", files=files, headers=headers) for _ in range(2)]
    assert answers[0].json()["id"] == answers[1].json()["id"]


def test_a_key_knows_a_request_in_other_words(server: LocalServer) -> None:
    ways: list[dict[str, Any]] = [
        {"size": "64x64", "seconds": "2"},
        {"width": 64, "height": "64", "num_frames": 49},
        {"size": "64*64", "num_frames": 48, "fps": 24, "seed": -1},
    ]
    headers = {"Idempotency-Key": "in other words"}
    answers = [server.client.post("/v1/videos", json={"prompt": "a"} | way, headers=headers) for way in ways]
    assert len({answer.json()["id"] for answer in answers}) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "other"},
        {"seed": 3},
        {"seconds": "0.4"},
        {"num_frames": 9},
        {"linear_guidance_alpha": 1},
        {"user": "another"},
        {"metadata": {"a": "c"}},
        {"input_reference": "blue"},
    ],
)
def test_a_key_of_another_request_is_refused(server: LocalServer, change: dict[str, Any]) -> None:
    def picture(color: str) -> dict[str, str]:
        content = io.BytesIO()
        Image.new("RGB", (64, 64), color).save(content, format="PNG")
        return {"image_url": f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"}

    fields = {"prompt": "a", "input_reference": picture("red")}
    if "input_reference" in change:
        change = {"input_reference": picture("blue")}
    headers = {"Idempotency-Key": f"key of {sorted(change)}"}
    first = server.client.post("/v1/videos", json=fields, headers=headers)
    assert server.client.post("/v1/videos", json=fields, headers=headers).json()["id"] == first.json()["id"]
    check(server.client.post("/v1/videos", json=fields | change, headers=headers), 400, "Idempotency-Key")


# --- limits and probes ----------------------------------------------------------------------------------------------


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


def test_a_key_is_asked_for_where_there_are_keys(tmp_path: Path) -> None:
    with serve_locally(str(tmp_path), http=HttpConfig(api_keys=("secret",))) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            check(server.client.get("/v1/videos", headers=headers), 401, "Authorization")
            check(server.client.post("/v1/videos", json={"prompt": "a"}, headers=headers), 401, "Authorization")
        assert server.client.get("/v1/videos", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert server.client.get("/healthz").status_code == 200


def test_probes_answer(server: LocalServer) -> None:
    for path in ("/healthz", "/readyz"):
        assert server.client.get(path).json() == {"status": "ok"}
    assert server.client.get("/").json()["docs"] == f"{server.url}/docs"
    assert server.client.get("/docs").status_code == 200


def test_the_openapi_document_has_every_route_with_examples(server: LocalServer) -> None:
    document = server.client.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/videos",
        "/v1/videos/sync",
        "/v1/videos/{video_id}",
        "/v1/videos/{video_id}/cancel",
        "/v1/videos/{video_id}/content",
        "/v1/videos/{video_id}/stream",
        "/v1/videos/{video_id}/events",
        "/v1/models",
        "/v1/models/{model}",
        "/healthz",
        "/readyz",
    }
    body = document["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "multipart/form-data"}
    for example in body["application/json"]["examples"].values():
        answer = server.client.post("/v1/videos", json=example["value"] | {"seconds": "0.4"})
        assert answer.status_code == 200, answer.text
    assert "HTTPValidationError" not in json.dumps(document)
    assert [path for path, operations in document["paths"].items() if "422" in json.dumps(operations)] == [
        "/v1/videos/sync"
    ]


def test_the_openapi_document_tells_the_limits_of_this_server(server: LocalServer) -> None:
    document = server.client.get("/openapi.json").json()
    for path in ("/v1/videos", "/v1/videos/sync"):
        for body in document["paths"][path]["post"]["requestBody"]["content"].values():
            fields = body["schema"]["properties"]
            assert set(fields) == set(VideoRequest.model_fields)
            assert fields["prompt"]["maxLength"] == fields["negative_prompt"]["maxLength"] == 500
            assert fields["model"]["enum"] == ["tiny"]
            assert fields["size"]["enum"] == ["128x64", "64x64"]
            assert (fields["width"]["enum"], fields["height"]["enum"]) == ([64, 128], [64])
            assert fields["num_frames"]["maximum"] == 121
            assert "at most 5.042" in fields["seconds"]["description"]
            assert fields["fps"]["enum"] == [24]
            assert (fields["seed"]["minimum"], fields["seed"]["maximum"]) == (-1, 2**64 - 1)
            steps = fields["num_inference_steps"]["oneOf"]
            assert steps[0]["maximum"] == steps[1]["items"]["maximum"] == 100
            assert fields["metadata"]["maxProperties"] == 16


def test_every_field_of_a_video_is_in_the_openapi_document(server: LocalServer) -> None:
    schema = server.client.get("/openapi.json").json()["components"]["schemas"]["Video"]
    video = server.finish(server.submit(seconds="0.04"))
    assert list(schema["properties"]) == list(video)
    assert list(VIDEO_EXAMPLE) == list(video)


# --- load -----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("path", ["/v1/videos?wait=true", "/v1/videos/sync"])
def test_a_connection_that_breaks_loses_no_video_of_a_key(server: LocalServer, path: str) -> None:
    headers, request = {"Idempotency-Key": f"broken {path}"}, {"prompt": "a ball", "seconds": "2", "user": path}
    with contextlib.suppress(httpx.ReadTimeout):
        server.client.post(path, json=request, headers=headers, timeout=0.05)
    answer = server.client.post(path, json=request, headers=headers)
    assert answer.status_code == 200
    video_id = answer.headers.get("x-video-id") or answer.json()["id"]
    assert server.client.get(f"/v1/videos/{video_id}").json()["status"] == "completed"
