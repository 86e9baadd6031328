"""The files of a finished video, whole and in ranges."""

import io
import zipfile
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


FORMS = {
    "gif": ("image/gif", "video_id.gif"),
    "webp": ("image/webp", "video_id.webp"),
    "frames": ("application/zip", "video_id.zip"),
    "frame": ("image/png", "video_id-00000.png"),
    "frame&at=last": ("image/png", "video_id-00024.png"),
}


@pytest.mark.parametrize("variant", FORMS)
def test_another_form_of_a_video_is_sent_as_its_mp4_is(server: LocalServer, finished: str, variant: str) -> None:
    path = f"/v1/videos/{finished}/content?variant={variant}"
    media_type, name = FORMS[variant]
    answers = [server.client.get(path) for _ in range(2)]
    assert answers[0].status_code == 200 and answers[0].content == answers[1].content
    headers = answers[0].headers
    assert headers["content-type"] == media_type
    assert headers["content-disposition"] == f'inline; filename="{name.replace("video_id", finished)}"'
    assert int(headers["content-length"]) == len(answers[0].content)
    assert server.client.get(path, headers={"If-None-Match": headers["etag"]}).status_code == 304
    part = server.client.get(path, headers={"Range": "bytes=5-10"})
    assert (part.status_code, part.content) == (206, answers[0].content[5:11])
    head = server.client.head(path)
    assert (head.status_code, head.headers["etag"], head.content) == (200, headers["etag"], b"")


def test_the_etags_of_different_files_differ(server: LocalServer, finished: str) -> None:
    variants = ["video", "thumbnail", *FORMS, "frame&at=0.5"]
    etags = {server.client.get(f"/v1/videos/{finished}/content?variant={each}").headers["etag"] for each in variants}
    assert len(etags) == len(variants)


def test_a_gif_a_webp_and_a_zip_have_every_frame(server: LocalServer, finished: str) -> None:
    def content(variant: str) -> io.BytesIO:
        return io.BytesIO(server.client.get(f"/v1/videos/{finished}/content?variant={variant}").content)

    for variant, kind in (("gif", "GIF"), ("webp", "WEBP")):
        with Image.open(content(variant)) as picture:
            assert (picture.format, picture.size, picture.info["loop"]) == (kind, (128, 64), 0)
            shown_ms = 0
            for index in range(getattr(picture, "n_frames", 1)):  # a WebP shows equal frames as one
                picture.seek(index)
                picture.load()
                shown_ms += picture.info["duration"]
            assert abs(shown_ms - 25 * 1000 / 24) < 10
    with zipfile.ZipFile(content("frames")) as packed:
        assert packed.namelist() == [f"{index:05d}.png" for index in range(25)]


@pytest.mark.parametrize(
    ("at", "unit"),
    [
        ("first", 0),
        ("0", 0),
        ("0.041", 0),
        ("0.042", 1),
        ("0.37", 1),
        ("0.375", 2),
        ("1.0", 3),
        ("1.04", 3),
        ("last", 3),
    ],
)
def test_a_frame_is_that_which_is_shown_at_a_time(server: LocalServer, finished: str, at: str, unit: int) -> None:
    answer = server.client.get(f"/v1/videos/{finished}/content?variant=frame&at={at}")
    picture = Image.open(io.BytesIO(answer.content)).convert("RGB")
    assert (answer.status_code, picture.size) == (200, (128, 64))
    assert abs(picture.getpixel((64, 32))[0] - 10 * unit) <= 2  # type: ignore[index]  # the server's units get brighter


@pytest.mark.parametrize("at", ["1.05", "25", "-1", "nan", "inf", "1e-1", "", "middle", "0x1", "\u0660", "9" * 5000])
def test_a_time_at_which_there_is_no_frame_is_refused(server: LocalServer, finished: str, at: str) -> None:
    answer = server.client.get(f"/v1/videos/{finished}/content", params={"variant": "frame", "at": at})
    check(answer, 400, "at")
    assert answer.json()["error"]["message"].endswith("must be first, last, or a time in seconds from 0 to below 1.042")


def test_a_time_of_something_else_than_a_frame_is_refused(server: LocalServer, finished: str) -> None:
    for variant in ("", "&variant=gif", "&variant=thumbnail"):
        check(server.client.get(f"/v1/videos/{finished}/content?at=first{variant}"), 400, "at")


def test_an_unknown_form_is_refused_with_those_that_there_are(server: LocalServer, finished: str) -> None:
    answer = server.client.get(f"/v1/videos/{finished}/content?variant=avi")
    check(answer, 400, "variant")
    assert "'gif', 'webp', 'frame' or 'frames'" in answer.json()["error"]["message"]


def test_another_form_is_kept_and_goes_with_the_video(server: LocalServer) -> None:
    video_id = str(server.finish(server.submit())["id"])
    folder = Path(server.store.root, "videos", video_id)
    for variant in FORMS:
        assert server.client.get(f"/v1/videos/{video_id}/content?variant={variant}").status_code == 200
    kept = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert kept >= {"video.gif", "video.webp", "frames.zip", "frames/00000.png", "frames/00024.png"}
    assert server.client.delete(f"/v1/videos/{video_id}").status_code == 200
    assert not folder.exists()
    for variant in FORMS:
        check(server.client.get(f"/v1/videos/{video_id}/content?variant={variant}"), 404, "video_id")


def test_an_unfinished_video_has_no_content_yet(server: LocalServer) -> None:
    video_id = server.submit("hold")
    for variant in ("video", "thumbnail", "spritesheet", *FORMS):
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
