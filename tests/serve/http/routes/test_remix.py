"""Videos with the settings of another one."""

from typing import Any

import pytest

from tests.serve.http.http_at_hand import UNKNOWN_ID, check, png
from tests.serve.local_server import LocalServer

SETTINGS: dict[str, Any] = {
    "seconds": "0.4",
    "size": "64x64",
    "seed": 7,
    "negative_prompt": "dark",
    "num_inference_steps": [3, 2, 1],
    "guidance_scale": 2.5,
}


def remix(server: LocalServer, video_id: str, body: dict[str, Any], **headers: str) -> Any:
    return server.client.post(f"/v1/videos/{video_id}/remix", json=body, headers=headers)


def test_a_remix_has_all_of_the_video_but_its_prompt(server: LocalServer) -> None:
    source = server.finish(server.submit("a ball", user="me", **SETTINGS))
    made = server.finish(remix(server, source["id"], {"prompt": "a cube"}).json()["id"])
    assert (made["prompt"], made["remixed_from_video_id"], made["status"]) == ("a cube", source["id"], "completed")
    names = [*SETTINGS, "model", "num_frames", "video_num_inference_steps", "video_guidance_scale", "prompt_suffix"]
    assert [made[name] for name in names] == [source[name] for name in names]
    assert made["user"] is None, "whom the first was for says nothing of this one"
    assert source["remixed_from_video_id"] is None


@pytest.mark.parametrize(("given", "is_same"), [(8, False), (-1, False), (7, True)])
def test_a_remix_may_have_another_seed(server: LocalServer, given: int, is_same: bool) -> None:
    source = server.submit("a ball", **SETTINGS)
    made = remix(server, source, {"prompt": "a ball", "seed": given}).json()
    assert (made["seed"] == 7) is is_same
    assert given == -1 or made["seed"] == given


def test_a_remix_has_the_picture_of_the_video(server: LocalServer) -> None:
    answer = server.client.post(
        "/v1/videos", data={"prompt": "a ball"}, files={"input_reference": ("a.png", png(128, 64), "image/png")}
    )
    source = answer.json()["id"]
    made = remix(server, source, {"prompt": "a cube"}).json()
    assert made["has_input_reference"] is True
    pictures = [server.store.files.fetch(video_id, "input.png") for video_id in (source, made["id"])]  # type: ignore[arg-type]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "prompt", "required"),
        ({"prompt": " "}, "prompt", "blank"),
        ({"prompt": "x" * 501}, "prompt", "500"),
        ({"prompt": "a", "seed": 2**64}, "seed", "less than"),
        ({"prompt": "a", "size": "64x64"}, "size", "cannot be changed"),
        ({"prompt": "a", "model": "tiny"}, "model", "cannot be changed"),
        ({"prompt": "a", "num_inference_steps": 3}, "num_inference_steps", "cannot be changed"),
    ],
)
def test_what_a_remix_cannot_be_is_refused(server: LocalServer, body: dict[str, Any], param: str, said: str) -> None:
    check(remix(server, server.submit("a ball"), body), 400, param, said)


def test_a_remix_of_no_video_is_not_found(server: LocalServer) -> None:
    check(remix(server, UNKNOWN_ID, {"prompt": "a"}), 404, "video_id")
    check(remix(server, "nothing", {"prompt": "a"}), 404, "video_id")


def test_the_same_key_gives_the_same_remix(server: LocalServer) -> None:
    source, other = server.submit("a ball"), server.submit("a ball")
    key = {"Idempotency-Key": f"remix-{source}"}
    first = remix(server, source, {"prompt": "a cube", "seed": -1}, **key).json()
    again = remix(server, source, {"prompt": "a cube", "seed": -1}, **key).json()
    assert (again["id"], again["seed"]) == (first["id"], first["seed"])
    for video_id, body in (
        (source, {"prompt": "a cone", "seed": -1}),
        (other, {"prompt": "a cube", "seed": -1}),
        (source, {"prompt": "a cube"}),
    ):
        check(remix(server, video_id, body, **key), 400, "Idempotency-Key", first["id"])


@pytest.mark.parametrize("route", ["edits", "characters"])
def test_what_this_server_does_not_have_says_so(server: LocalServer, route: str) -> None:
    answer = server.client.post(f"/v1/videos/{route}", json={"prompt": "a"})
    check(answer, 501, None, route)
