"""Wrong fields, as JSON and as a form: the right status, the form of an error, the field named."""

import json
from typing import Any

import pytest

from tests.serve.http.http_at_hand import check
from tests.serve.local_server import LocalServer

WRONG_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "prompt", "is required"),
    ({"prompt": ""}, "prompt", "must not be blank"),
    ({"prompt": " \n\t"}, "prompt", "must not be blank"),
    ({"prompt": "nul\0"}, "prompt", "without control characters"),
    ({"prompt": "red \x1b[31m"}, "prompt", "has U+001B at character 5"),
    ({"prompt": "back\rto the start"}, "prompt", "has U+000D"),
    ({"prompt": "delete \x7f"}, "prompt", "has U+007F"),
    ({"prompt": "C1 \x9b31m"}, "prompt", "has U+009B"),
    ({"prompt": "a", "negative_prompt": "the other \u202eway round"}, "negative_prompt", "has U+202E"),
    ({"prompt": "a", "prompt_suffix": "\u2066"}, "prompt_suffix", "has U+2066"),
    ({"prompt": "a", "user": "\x07"}, "user", "has U+0007"),
    ({"prompt": "a", "user": "x" * 513}, "user", "at most 512"),
    ({"prompt": "x" * 501}, "prompt", "501 characters, at most 500"),
    ({"prompt": "a", "negative_prompt": "x" * 501}, "negative_prompt", "at most 500"),
    ({"prompt": "a", "prompt_suffix": "x" * 501}, "prompt_suffix", "at most 500"),
    ({"prompt": "a", "seconds": "soon"}, "seconds", "'soon'"),
    ({"prompt": "a", "seconds": "0"}, "seconds", "greater than 0"),
    ({"prompt": "a", "seconds": "-4"}, "seconds", "greater than 0"),
    ({"prompt": "a", "seconds": "6"}, "seconds", "at most 121 (5.04 s)"),
    ({"prompt": "a", "seconds": "1e9"}, "seconds", "3600"),
    ({"prompt": "a", "seconds": "nan"}, "seconds", "nan"),
    ({"prompt": "a", "seconds": "inf"}, "seconds", "inf"),
    ({"prompt": "a", "seconds": ""}, "seconds", "number"),
    ({"prompt": "a", "num_frames": "0"}, "num_frames", "greater than or equal to 1"),
    ({"prompt": "a", "num_frames": "161"}, "num_frames", "at most 121 (5.04 s)"),
    ({"prompt": "a", "num_frames": "4.5"}, "num_frames", "integer"),
    ({"prompt": "a", "num_frames": "many"}, "num_frames", "integer"),
    ({"prompt": "a", "num_frames": "49", "seconds": "4"}, "num_frames", "contradicts seconds=4"),
    ({"prompt": "a", "fps": "30"}, "fps", "must be 24"),
    ({"prompt": "a", "fps": "fast"}, "fps", "number"),
    ({"prompt": "a", "fps": "nan"}, "fps", "finite"),
    ({"prompt": "a", "size": "1280x720"}, "size", "this model makes 128x64, 64x64"),
    ({"prompt": "a", "size": "64x128"}, "size", "this model makes"),
    ({"prompt": "a", "size": "128"}, "size", "WIDTHxHEIGHT"),
    ({"prompt": "a", "size": "128**64"}, "size", "WIDTHxHEIGHT"),
    ({"prompt": "a", "size": "1280*720"}, "size", "1280x720: this model makes 128x64, 64x64"),
    ({"prompt": "a", "width": "1280", "height": "720"}, "width", "height=720: this model makes 128x64, 64x64"),
    ({"prompt": "a", "width": "128"}, "height", "is required with width=128"),
    ({"prompt": "a", "height": "64"}, "width", "is required with height=64"),
    ({"prompt": "a", "width": "0", "height": "64"}, "width", "greater than or equal to 1"),
    ({"prompt": "a", "width": "wide", "height": "64"}, "width", "integer"),
    ({"prompt": "a", "width": "64", "height": "64", "size": "128x64"}, "width", "height=64: contradicts size=128x64"),
    ({"prompt": "a", "size": "-128x64"}, "size", "WIDTHxHEIGHT"),
    ({"prompt": "a", "size": "0x64"}, "size", "WIDTHxHEIGHT"),
    ({"prompt": "a", "size": "128x64\n"}, "size", "WIDTHxHEIGHT"),
    ({"prompt": "a", "size": "999999999x64"}, "size", "WIDTHxHEIGHT"),
    ({"prompt": "a", "size": "१२८x६४"}, "size", "WIDTHxHEIGHT"),
    ({"prompt": "a", "seed": "-2"}, "seed", "greater than or equal to -1"),
    ({"prompt": "a", "seed": str(2**64)}, "seed", "less than or equal to 18446744073709551615"),
    ({"prompt": "a", "seed": "1.5"}, "seed", "integer"),
    ({"prompt": "a", "seed": "9" * 5000}, "seed", ""),
    ({"prompt": "a", "num_inference_steps": "0"}, "num_inference_steps", "greater than or equal to 1"),
    ({"prompt": "a", "num_inference_steps": "101"}, "num_inference_steps", "at most 100"),
    ({"prompt": "a", "num_inference_steps": "ten"}, "num_inference_steps", "whole number"),
    ({"prompt": "a", "num_inference_steps": "1,2"}, "num_inference_steps", "3 stages"),
    ({"prompt": "a", "num_inference_steps": "[1,2,3,4]"}, "num_inference_steps", "3 stages"),
    ({"prompt": "a", "video_num_inference_steps": "[1,2,-3]"}, "video_num_inference_steps", "greater than"),
    ({"prompt": "a", "video_num_inference_steps": "2.5"}, "video_num_inference_steps", "number"),
    ({"prompt": "a", "guidance_scale": "-1"}, "guidance_scale", "greater than or equal to 0"),
    ({"prompt": "a", "guidance_scale": "101"}, "guidance_scale", "less than or equal to 100"),
    ({"prompt": "a", "guidance_scale": "much"}, "guidance_scale", "number"),
    ({"prompt": "a", "video_guidance_scale": "nan"}, "video_guidance_scale", "nan"),
    ({"prompt": "a", "linear_guidance_alpha": "-1"}, "linear_guidance_alpha", "greater than or equal to 0"),
    ({"prompt": "a", "linear_guidance_minimum": "101"}, "linear_guidance_minimum", "less than or equal to 100"),
    (
        {"prompt": "a", "linear_guidance_alpha": "0.5", "video_guidance_scale": "5"},
        "linear_guidance_alpha",
        "contradicts video_guidance_scale=5",
    ),
    (
        {"prompt": "a", "linear_guidance_minimum": "2", "video_guidance_scale": "5"},
        "linear_guidance_minimum",
        "contradicts video_guidance_scale=5",
    ),
    ({"prompt": "a", "metadata": "words"}, "metadata", "must be"),
    ({"prompt": "a", "input_reference": "picture.png"}, "input_reference", ""),
    ({"prompt": "a", "n": "2"}, "n", "unknown field; known are prompt"),
    ({"prompt": "a", "Prompt": "b"}, "Prompt", "unknown field"),
]


@pytest.mark.parametrize(("fields", "param", "said"), WRONG_FIELDS)
def test_a_wrong_field_is_named_in_json(server: LocalServer, fields: dict[str, Any], param: str, said: str) -> None:
    check(server.client.post("/v1/videos", json=fields), 400, param, param, said)


@pytest.mark.parametrize(("fields", "param", "said"), WRONG_FIELDS)
def test_a_wrong_field_is_named_in_a_form(server: LocalServer, fields: dict[str, Any], param: str, said: str) -> None:
    form = {name: (None, value) for name, value in fields.items()} or {"size": (None, "128x64")}
    check(server.client.post("/v1/videos", files=form), 400, param, param, said)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": True}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "a", "\ud800": 1}, "\\ud800"),
        ({"prompt": "a", "model": 3}, "model"),
        ({"prompt": "a", "size": 128}, "size"),
        ({"prompt": "a", "size": [128, 64]}, "size"),
        ({"prompt": "a", "size": "\ud800"}, "size"),
        ({"prompt": "a", "fps": True}, "fps"),
        ({"prompt": "a", "width": True, "height": 64}, "width"),
        ({"prompt": "a", "num_frames": [49]}, "num_frames"),
        ({"prompt": "a", "user": 7}, "user"),
        ({"prompt": "a", "user": "\ud800"}, "user"),
        ({"prompt": "a", "metadata": []}, "metadata"),
        ({"prompt": "a", "metadata": '{"a": "b"}'}, "metadata"),
        ({"prompt": "a", "metadata": {"a": 1}}, "metadata"),
        ({"prompt": "a", "metadata": {"a": None}}, "metadata"),
        ({"prompt": "a", "metadata": {"a": {"b": "c"}}}, "metadata"),
        ({"prompt": "a", "metadata": {"a": "\ud800"}}, "metadata"),
        ({"prompt": "a", "metadata": {"\ud800": "a"}}, "metadata"),
        ({"prompt": "a", "metadata": {"a": "\x1b"}}, "metadata"),
        ({"prompt": "a", "metadata": {"\u202e": "a"}}, "metadata"),
        ({"prompt": "a", "metadata": {"": "a"}}, "metadata"),
        ({"prompt": "a", "metadata": {"k" * 65: "a"}}, "metadata"),
        ({"prompt": "a", "metadata": {"a": "v" * 513}}, "metadata"),
        ({"prompt": "a", "metadata": {str(number): "a" for number in range(17)}}, "metadata"),
        ({"prompt": "a", "linear_guidance_alpha": True}, "linear_guidance_alpha"),
        ({"prompt": "a", "seconds": True}, "seconds"),
        ({"prompt": "a", "seconds": [1]}, "seconds"),
        ({"prompt": "a", "seconds": 10**400}, "seconds"),
        ({"prompt": "a", "seed": True}, "seed"),
        ({"prompt": "a", "seed": [1]}, "seed"),
        ({"prompt": "a", "seed": 1e30}, "seed"),
        ({"prompt": "a", "num_inference_steps": True}, "num_inference_steps"),
        ({"prompt": "a", "num_inference_steps": [True, 1, 1]}, "num_inference_steps"),
        ({"prompt": "a", "num_inference_steps": []}, "num_inference_steps"),
        ({"prompt": "a", "num_inference_steps": [[1, 1], 1, 1]}, "num_inference_steps"),
        ({"prompt": "a", "num_inference_steps": {"0": 1}}, "num_inference_steps"),
        ({"prompt": "a", "guidance_scale": False}, "guidance_scale"),
        ({"prompt": "a", "guidance_scale": {}}, "guidance_scale"),
        ({"prompt": "a", "input_reference": 3}, "input_reference"),
        ({"prompt": "a", "input_reference": []}, "input_reference"),
        ({"prompt": "a", "input_reference": {}}, "input_reference"),
        ({"prompt": "a", "input_reference": {"image_url": None}}, "input_reference"),
        ({"prompt": "a", "input_reference": {"file_id": "file-1"}}, "input_reference"),
        ({"prompt": "a", "input_reference": {"image_url": "http://example.com/a.png"}}, "input_reference"),
        ({"prompt": "a", "input_reference": {"image_url": "file:///etc/passwd"}}, "input_reference"),
        ({"prompt": "a", "input_reference": {"image_url": "data:image/png,raw"}}, "input_reference"),
        ({"prompt": "a", "input_reference": {"image_url": "data:text/html;base64,AAAA"}}, "input_reference"),
        ({"prompt": "a", "input_reference": {"image_url": "data:image/png;base64,A===A"}}, "input_reference"),
        ({"prompt": "a", "input_reference": {"image_url": "data:image/png;base64,ü"}}, "input_reference"),
        ({"prompt": "a", "input_reference": {"image_url": "data:image/png;base64,"}}, "input_reference"),
        ({"prompt": "a", "input_reference": {"image_url": "data:image/png;base64,AAAA"}}, "input_reference"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(server: LocalServer, fields: dict[str, Any], param: str) -> None:
    body = json.dumps(fields).encode()
    check(server.client.post("/v1/videos", content=body, headers={"Content-Type": "application/json"}), 400, param)


@pytest.mark.parametrize(("fields", "param", "said"), WRONG_FIELDS)
def test_a_wrong_value_is_said_once(server: LocalServer, fields: dict[str, Any], param: str, said: str) -> None:
    message = server.client.post("/v1/videos", json=fields).json()["error"]["message"]
    came = repr(fields.get(param, ""))[1:-1]
    if len(came) > 3:  # shorter ones are in other words too
        assert message.count(came[:57]) <= 1, message
    assert message.count("\n") == 0


@pytest.mark.parametrize(
    "parts",
    [
        {"metadata[a]": "b", "metadata": '{"c": "d"}'},
        {"metadata": '{"a": "b", "a": "c"}'},
        {"metadata": "[1]"},
        {"metadata": "["},
        {"metadata[a][b]": "c"},
        {"metadata[a": "c"},
        {"metadata[]": "c"},
        {"metadata[" + "k" * 65 + "]": "c"},
        {"metadata[a]": "v" * 513},
        {f"metadata[{number}]": "a" for number in range(17)},
    ],
)
def test_wrong_metadata_of_a_form_is_refused(server: LocalServer, parts: dict[str, str]) -> None:
    form: Any = {"prompt": (None, "a"), **{name: (None, value) for name, value in parts.items()}}
    check(server.client.post("/v1/videos", files=form), 400, "metadata", "metadata")


def test_a_key_of_metadata_given_twice_is_refused(server: LocalServer) -> None:
    form: Any = [("prompt", (None, "a")), ("metadata[a]", (None, "b")), ("metadata[a]", (None, "b"))]
    check(server.client.post("/v1/videos", files=form), 400, "metadata", "metadata[a]: given more than once")


@pytest.mark.parametrize("model", ["sora-2", "", "TINY", "tiny\n"])
@pytest.mark.parametrize("path", ["/v1/videos", "/v1/videos/sync"])
def test_a_video_of_another_model_is_not_found(server: LocalServer, path: str, model: str) -> None:
    for body in ({"json": {"prompt": "a", "model": model}}, {"files": {"prompt": (None, "a"), "model": (None, model)}}):
        answer = server.client.post(path, **body)  # type: ignore[arg-type]
        check(answer, 404, "model", "this server has 'tiny'")
        assert answer.json()["error"]["code"] == "model_not_found"


def test_control_characters_of_a_name_are_not_sent_back(server: LocalServer) -> None:
    answer = server.client.post("/v1/videos", json={"prompt": "a", "\x1b[31m": "b"})
    check(answer, 400, "\\x1b[31m", "\\x1b[31m: unknown field")
