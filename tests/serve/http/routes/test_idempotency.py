import base64
import contextlib
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.serve.http.http_at_hand import check
from tests.serve.local_server import LocalServer
from tests.unit.media.pictures_at_hand import DISPLAY_P3_COLORANTS, exif, file_of, gradient, orientation, rgb_profile


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


@pytest.mark.parametrize("path", ["/v1/videos?wait=true", "/v1/videos/sync"])
def test_a_connection_that_breaks_loses_no_video_of_a_key(server: LocalServer, path: str) -> None:
    headers, request = {"Idempotency-Key": f"broken {path}"}, {"prompt": "a ball", "seconds": "2", "user": path}
    with contextlib.suppress(httpx.ReadTimeout):
        server.client.post(path, json=request, headers=headers, timeout=0.05)
    answer = server.client.post(path, json=request, headers=headers)
    assert answer.status_code == 200
    video_id = answer.headers.get("x-video-id") or answer.json()["id"]
    assert server.client.get(f"/v1/videos/{video_id}").json()["status"] == "completed"
