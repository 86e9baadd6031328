"""Requests that are wrong, each in its own way: the right status, the contract's form, the field named."""

import base64
import contextlib
import io
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from deployments.http.app import HttpConfig
from deployments.http.body import BodyLimits
from tests.serve.local_server import LocalServer, serve_locally
from tests.unit.media.pictures_at_hand import file_of

UNKNOWN_ID = "video_" + "0" * 32
BODY = BodyLimits(max_bytes=600_000, discard_timeout_s=1.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    root = tmp_path_factory.mktemp("storage")
    Path(root, "videos").mkdir()
    (root.parent / "secret").write_text("not to be read")
    with serve_locally(str(root), http=HttpConfig(body=BODY)) as server:
        yield server


def check(answer: httpx.Response, status: int, param: str | None, *said: str) -> None:
    """The answer is an error in the contract's form."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["param"] == param, body
    for text in (body["error"]["message"], body["error"]["type"], body["error"]["code"]):
        assert isinstance(text, str) and text
    for text in said:
        assert text in body["error"]["message"], body


# --- fields, as JSON and as a form ----------------------------------------------------------------------------------

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


# --- bodies ---------------------------------------------------------------------------------------------------------

FORM = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--b--\r\n'
JSON = "application/json"


@pytest.mark.parametrize(
    ("content_type", "body", "status", "param"),
    [
        (JSON, b"", 400, None),
        (JSON, b"{", 400, None),
        (JSON, b'{"prompt": "a"', 400, None),
        (JSON, b'{"prompt": "a"} and more', 400, None),
        (JSON, b"null", 400, None),
        (JSON, b'["prompt"]', 400, None),
        (JSON, b'"prompt"', 400, None),
        (JSON, b"{'prompt': 'a'}", 400, None),
        (JSON, b'{"prompt": "\xff"}', 400, None),
        (JSON, '{"prompt": "a"}'.encode("utf-16"), 400, None),
        (JSON, b'{"prompt": "a", "seed": NaN}', 400, None),
        (JSON, b'{"prompt": "a", "seed": 1, "seed": 2}', 400, "seed"),
        (JSON, b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, None),
        (JSON, b"[" * 100_000, 400, None),
        (JSON, b'{"a":' * 50_000, 400, None),
        (JSON + "; charset=latin-1", b'{"prompt": "a"}', 415, "Content-Type"),
        ("", b'{"prompt": "a"}', 415, "Content-Type"),
        ("text/plain", b'{"prompt": "a"}', 415, "Content-Type"),
        ("application/x-www-form-urlencoded", b"prompt=a", 415, "Content-Type"),
        ("nonsense", b"a", 415, "Content-Type"),
        ("multipart/form-data", FORM, 400, "Content-Type"),
        ("multipart/form-data; boundary=", FORM, 400, "Content-Type"),
        ("multipart/form-data; boundary=" + "b" * 300, FORM, 400, None),
        ("multipart/form-data; boundary=other", FORM, 400, None),
        ("multipart/form-data; boundary=b", b"", 400, None),
        ("multipart/form-data; boundary=b", FORM[:-4], 400, None),
        ("multipart/form-data; boundary=b", FORM[:-9], 400, None),
        ("multipart/form-data; boundary=b", b"--b--\r\n", 400, "prompt"),
        ("multipart/form-data; boundary=b", b"--b\r\n\r\na\r\n--b--\r\n", 400, None),
        ("multipart/form-data; boundary=b", FORM.replace(b'; name="prompt"', b""), 400, None),
        ("multipart/form-data; boundary=b", FORM.replace(b"form-data;", b"attachment;"), 400, None),
        ("multipart/form-data; boundary=b", FORM.replace(b"\r\na\r\n", b"\r\n\xff\r\n"), 400, "prompt"),
        ("multipart/form-data; boundary=b", FORM.replace(b'"prompt"', b'"prompt"; filename="a"'), 400, "prompt"),
        ("multipart/form-data; boundary=b", FORM[:-7] + FORM, 400, "prompt"),
        ("multipart/form-data; boundary=b", FORM[:-7] * 200 + FORM, 400, None),
        (JSON, b'{"prompt": "' + b"a" * 700_000 + b'"}', 413, None),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(
    server: LocalServer, content_type: str, body: bytes, status: int, param: str | None
) -> None:
    answer = server.client.post("/v1/videos", content=body, headers={"Content-Type": content_type})
    check(answer, status, param)


def test_a_compressed_body_is_refused(server: LocalServer) -> None:
    headers = {"Content-Type": JSON, "Content-Encoding": "gzip"}
    check(server.client.post("/v1/videos", content=b"\x1f\x8b", headers=headers), 415, "Content-Encoding")


def test_a_chunked_body_that_is_too_large_is_refused_before_it_ends(server: LocalServer) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 500_000_000:
            sent += 65536
            yield b" " * 65536
            time.sleep(0.001)

    # It may go on sending after the answer.
    with httpx.Client(base_url=server.url, timeout=20) as client, contextlib.suppress(httpx.WriteError):
        check(client.post("/v1/videos", content=endless(), headers={"Content-Type": JSON}), 413, None)
    assert sent < 500_000_000


def send(server: LocalServer, request: bytes, *, timeout_s: float = 10.0) -> bytes:
    """What a server answers to bytes, after which the client stays silent."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=timeout_s) as connection:
        connection.sendall(request)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
            if received.partition(b"\r\n\r\n")[2].endswith(b"}"):
                break
        return received


HEAD = b"POST /v1/videos HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "request_bytes",
    [
        HEAD + b'Content-Length: 100\r\n\r\n{"prompt": ',
        HEAD + b"Content-Length: 100\r\n\r\n",
        HEAD + b'Transfer-Encoding: chunked\r\n\r\nb\r\n{"prompt": \r\n',
    ],
)
def test_a_body_that_does_not_go_on_is_timed_out(tmp_path: Path, request_bytes: bytes) -> None:
    limits = BodyLimits(idle_timeout_s=0.5, timeout_s=2.0)
    with serve_locally(str(tmp_path), http=HttpConfig(body=limits)) as impatient:
        answer = send(impatient, request_bytes)
    assert answer.startswith(b"HTTP/1.1 408 "), answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"].startswith("body: ")


def test_a_declared_length_that_is_too_large_is_refused_without_the_body(server: LocalServer) -> None:
    assert send(server, HEAD + b"Content-Length: 99999999999\r\n\r\n{").startswith(b"HTTP/1.1 413 ")


def test_a_client_that_breaks_off_harms_nobody(server: LocalServer) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for _ in range(5):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
    assert server.client.get("/healthz").status_code == 200


# --- pictures -------------------------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(content, format="PNG")
    return content.getvalue()


def png_bomb(width: int, height: int) -> bytes:
    """A small PNG file that says it is huge."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 100_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


BROKEN_PICTURES = {
    "empty": b"",
    "text": b"no picture at all",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "pdf": b"%PDF-1.4\n",
    "cut short": png(64, 64)[:60],
    "only its signature": b"\x89PNG\r\n\x1a\n",
    "wrong checksum": png(64, 64)[:40] + b"xxxx" + png(64, 64)[44:],
    "a bomb": png_bomb(60_000, 60_000),
    "too many pixels": png(1200, 900),
    "too narrow to fill a frame": png(100_000, 1),
    "no pixels": png_bomb(0, 0),
    "a jpeg cut short": b"\xff\xd8\xff\xe0\x00\x10JFIF",
    "a gif cut short": b"GIF89a\x01\x00",
    "an avif that is none": b"\0\0\0\x18ftypavif\0\0\0\0avifmif1" + bytes(40),
    "a heic that is none": b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(40),
    "floats above 1": file_of(Image.new("F", (64, 64), 7.0), "TIFF"),
    "floats that are no numbers": file_of(Image.new("F", (64, 64), float("nan")), "TIFF"),
}


@pytest.mark.parametrize("name", BROKEN_PICTURES)
@pytest.mark.parametrize("way", ["file", "url"])
def test_a_broken_or_huge_picture_is_refused(server: LocalServer, name: str, way: str) -> None:
    picture = BROKEN_PICTURES[name]
    if way == "file":
        files: Any = {"prompt": (None, "a"), "input_reference": ("a.png", picture, "image/png")}
        answer = server.client.post("/v1/videos", files=files)
    else:
        url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        answer = server.client.post("/v1/videos", json={"prompt": "a", "input_reference": {"image_url": url}})
    check(answer, 400, "input_reference", "input_reference")


def test_a_picture_of_too_many_bytes_is_refused(server: LocalServer) -> None:
    files: Any = {"prompt": (None, "a"), "input_reference": ("a.png", png(64, 64) + b"\0" * 200_000, "image/png")}
    check(server.client.post("/v1/videos", files=files), 413, "input_reference", "at most 200000")


@pytest.mark.parametrize("name", ["input_reference[file_id]", "input_reference[]", "input_reference[image_url][0]"])
def test_other_parts_of_a_picture_are_refused(server: LocalServer, name: str) -> None:
    check(server.client.post("/v1/videos", files={"prompt": (None, "a"), name: (None, "b")}), 400, "input_reference")


def test_two_pictures_are_refused(server: LocalServer) -> None:
    files: Any = [("prompt", (None, "a")), *[("input_reference", ("a.png", png(64, 64), "image/png"))] * 2]
    check(server.client.post("/v1/videos", files=files), 400, "input_reference", "more than once")


def test_a_picture_for_a_single_frame_is_refused(server: LocalServer) -> None:
    files: Any = {
        "prompt": (None, "a"),
        "seconds": (None, "0.04"),
        "input_reference": ("a.png", png(64, 64), "image/png"),
    }
    check(server.client.post("/v1/videos", files=files), 400, "input_reference", "more seconds")


def test_a_file_where_none_belongs_is_refused(server: LocalServer) -> None:
    files: Any = {"prompt": (None, "a"), "mask": ("a.png", png(64, 64), "image/png")}
    check(server.client.post("/v1/videos", files=files), 400, "mask")


# --- ids, queries, headers, methods ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "video_id",
    [
        "x",
        "video_",
        "video_123",
        "video_" + "g" * 32,
        "VIDEO_" + "0" * 32,
        "video_" + "0" * 33,
        UNKNOWN_ID,
        "..",
        "../../etc",
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e%2fsecret",
        "..%5c..%5csecret",
        "video_%00",
        "%ff%fe",
        "video_" + "0" * 5000,
        "*",
        "%7B%7D",
        UNKNOWN_ID + "%0a",
    ],
)
@pytest.mark.parametrize(
    ("method", "rest"),
    [
        ("GET", ""),
        ("DELETE", ""),
        ("POST", "/cancel"),
        ("GET", "/content"),
        ("GET", "/stream"),
        ("GET", "/events"),
    ],
)
def test_an_unknown_id_is_not_found(server: LocalServer, video_id: str, method: str, rest: str) -> None:
    # As raw bytes, for a client would tidy up the path.
    answer = send(server, f"{method} /v1/videos/{video_id}{rest} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    assert status == 404, answer
    assert json.loads(body)["error"]["param"] == "video_id"


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=-1", "limit"),
        ("limit=101", "limit"),
        ("limit=ten", "limit"),
        ("limit=", "limit"),
        ("limit=1.5", "limit"),
        ("limit=1&limit=2", "limit"),
        ("after=x", "after"),
        ("after=", "after"),
        ("after=../../etc", "after"),
        ("order=up", "order"),
        ("order=", "order"),
        ("order=ASC", "order"),
        ("before=x", "before"),
        ("page=2", "page"),
    ],
)
def test_a_wrong_query_of_the_list_is_named(server: LocalServer, query: str, param: str) -> None:
    check(server.client.get(f"/v1/videos?{query}"), 400, param, param)


@pytest.mark.parametrize(
    ("path", "param"),
    [
        (f"/v1/videos/{UNKNOWN_ID}/content?variant=audio", "variant"),
        (f"/v1/videos/{UNKNOWN_ID}/content?variant=", "variant"),
        (f"/v1/videos/{UNKNOWN_ID}/content?format=gif", "format"),
        (f"/v1/videos/{UNKNOWN_ID}?full=1", "full"),
        ("/v1/models?limit=1", "limit"),
    ],
)
def test_a_wrong_query_is_named(server: LocalServer, path: str, param: str) -> None:
    check(server.client.get(path), 400, param, param)


def test_a_wrong_query_of_a_new_video_is_named(server: LocalServer) -> None:
    check(server.client.post("/v1/videos?wait=perhaps", json={"prompt": "a"}), 400, "wait")
    check(server.client.post("/v1/videos?prompt=a", json={"prompt": "a"}), 400, "prompt")


@pytest.mark.parametrize("key", ["", "k" * 256])
def test_a_wrong_idempotency_key_is_named(server: LocalServer, key: str) -> None:
    answer = server.client.post("/v1/videos", json={"prompt": "a"}, headers={"Idempotency-Key": key})
    check(answer, 400, "Idempotency-Key")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/videos", "GET, HEAD, POST"),
        ("DELETE", "/v1/videos", "GET, HEAD, POST"),
        ("DELETE", "/v1/videos/", "GET, HEAD, POST"),
        ("PATCH", f"/v1/videos/{UNKNOWN_ID}", "DELETE, GET, HEAD"),
        ("POST", f"/v1/videos/{UNKNOWN_ID}", "DELETE, GET, HEAD"),
        ("POST", f"/v1/videos/{UNKNOWN_ID}/content", "GET, HEAD"),
        ("GET", f"/v1/videos/{UNKNOWN_ID}/cancel", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("POST", "/docs", "GET, HEAD"),
        ("POST", "/docs/assets/swagger-ui.css", "GET, HEAD"),
    ],
)
def test_another_method_is_not_allowed(server: LocalServer, method: str, path: str, allowed: str) -> None:
    answer = server.client.request(method, path)
    check(answer, 405, None, allowed)
    assert answer.headers["allow"] == allowed


@pytest.mark.parametrize("path", ["/v1", "/v1/video", "/v2/videos", f"/v1/videos/{UNKNOWN_ID}/remix", "/.env"])
def test_another_path_is_not_found(server: LocalServer, path: str) -> None:
    check(server.client.get(path), 404, None, "no such path")


def test_another_model_is_not_found(server: LocalServer) -> None:
    answer = server.client.get("/v1/models/sora-2")
    check(answer, 404, "model", "'tiny'")
    assert answer.json()["error"]["code"] == "model_not_found"


def test_nothing_was_accepted_and_the_server_goes_on(server: LocalServer) -> None:
    assert server.client.get("/v1/videos").json()["data"] == []
    assert server.client.get("/readyz").status_code == 200
    assert server.finish(server.submit())["status"] == "completed"
