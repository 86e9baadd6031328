"""The files of a finished video, whole and in ranges."""

import io
from pathlib import Path

import pytest
from PIL import Image

from tests.serve.http.http_at_hand import check
from tests.serve.local_server import LocalServer, probe


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
