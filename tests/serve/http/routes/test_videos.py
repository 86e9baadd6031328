"""Videos as clients see them: asked for, listed, cancelled, deleted."""

import base64
import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.serve.http.http_at_hand import KEYS, check, events, png
from tests.serve.local_server import LocalServer, serve_locally


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
