"""Files that a server sends: written when they are whole, and not at all when they are not."""

import io
import json
import socket
import time
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from deployments import cli
from deployments.cli import server as http_client
from deployments.cli.server import Server
from tests.serve.cli.answers_at_hand import (
    VIDEO_ID,
    Answer,
    answering,
    check_one_line,
    raw,
    response,
    video_object,
)
from tests.serve.local_server import whole

pytestmark = pytest.mark.usefixtures("in_a_hurry")

MP4 = whole(64, 64, 2)


def serving(content: Answer) -> Answer:
    """A server of a finished video, with this answer for its file."""

    def answer(connection: socket.socket, head: str) -> None:
        if "/content?" in head.partition("\r\n")[0]:
            content(connection, head)
        else:
            connection.sendall(response(json.dumps(video_object()).encode()))

    return answer


def endless(connection: socket.socket, head: str) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: video/mp4\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"10000\r\n" + b"a" * 65536 + b"\r\n")


def endless_trickle(connection: socket.socket, head: str) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: video/mp4\r\n\r\n")
    while True:
        connection.sendall(b"a")
        time.sleep(0.05)


def stuck(connection: socket.socket, head: str) -> None:
    connection.sendall(response(MP4, kind="video/mp4")[:-10])
    time.sleep(30)


BROKEN_FILES: dict[str, tuple[Answer, str]] = {
    "breaks off": (raw(response(MP4, kind="video/mp4")[:-10]), "broke off"),
    "breaks off without a length": (raw(b"HTTP/1.1 200 OK\r\n\r\n" + MP4[:-10]), "not whole"),
    "longer than its length": (
        raw(f"HTTP/1.1 200 OK\r\nContent-Length: {len(MP4) - 10}\r\n\r\n".encode() + MP4),
        "not whole",
    ),
    "a length beyond all bounds": (raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\na"), "more than"),
    "endless": (endless, "more than"),
    "an endless trickle": (endless_trickle, "hardly anything came"),
    "stuck": (stuck, "hardly anything came"),
    "empty": (raw(response(b"", kind="video/mp4")), "not whole"),
    "HTML": (raw(response(b"<html>", kind="text/html; charset=utf-8")), "sends text/html instead"),
    "JSON": (raw(response(b"{}")), "sends application/json instead"),
    "encoded": (raw(response(MP4, kind="video/mp4", headers="Content-Encoding: br\r\n")), "encoding"),
    "a broken chunk": (raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"), "broke off"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_file_that_does_not_come_whole_leaves_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client, "_MAX_FILE_BYTES", 20_000_000)
    answer, reason = BROKEN_FILES[name]
    (tmp_path / "there.mp4").write_bytes(b"before")
    with answering(serving(answer)) as url:
        for output in ("out.mp4", "there.mp4"):
            assert cli.main(["download", VIDEO_ID, "-o", output, "--url", url]) == 2
            assert reason in check_one_line(capsys, "download")
    assert [file.name for file in tmp_path.iterdir()] == ["there.mp4"]
    assert (tmp_path / "there.mp4").read_bytes() == b"before"


def picture_of(kind: str) -> bytes:
    content = io.BytesIO()
    Image.linear_gradient("L").save(content, format=kind)
    return content.getvalue()


def zip_of() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as packed:
        packed.writestr("00000.png", picture_of("PNG"))
    return content.getvalue()


@pytest.mark.parametrize(
    ("name", "kind", "content"),
    [
        ("a.gif", "image/gif", picture_of("GIF")),
        ("a.webp", "image/webp", picture_of("WEBP")),
        ("a.png", "image/png", picture_of("PNG")),
        ("a.zip", "application/zip", zip_of()),
    ],
)
def test_another_form_that_is_cut_off_is_noticed_by_its_end(
    name: str, kind: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for num_lost in (0, 1, 15, 500):
        file = content[: len(content) - num_lost]
        with answering(serving(raw(response(file, kind=kind)))) as url:
            is_whole = cli.main(["download", VIDEO_ID, "-o", name, "--url", url]) == 0
        assert is_whole == (num_lost == 0)
        if is_whole:
            assert name in capsys.readouterr().out
            (tmp_path / name).unlink()
        else:
            assert "not whole" in check_one_line(capsys, "download")
        assert not list(tmp_path.iterdir())


def test_a_file_that_is_still_being_made_is_asked_for_again(tmp_path: Path) -> None:
    num_asked = 0

    def making(connection: socket.socket, head: str) -> None:
        nonlocal num_asked
        num_asked += 1
        if num_asked < 3:
            error = {"error": {"message": "still being made", "type": "server_error", "param": None, "code": None}}
            connection.sendall(response(json.dumps(error).encode(), status="503 Service Unavailable"))
        else:
            connection.sendall(response(picture_of("GIF"), kind="image/gif"))

    with answering(serving(making)) as url:
        assert cli.main(["download", VIDEO_ID, "-o", "a.gif", "--url", url]) == 0
    assert (tmp_path / "a.gif").read_bytes() == picture_of("GIF")


@pytest.mark.parametrize("is_chunked", [True, False])
def test_a_file_that_comes_whole_is_written(is_chunked: bool, tmp_path: Path) -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(MP4), MP4)
    content = chunked if is_chunked else response(MP4, kind="video/mp4")
    with answering(serving(raw(content))) as url:
        assert cli.main(["download", VIDEO_ID, "-o", "out.mp4", "--url", url]) == 0
    assert (tmp_path / "out.mp4").read_bytes() == MP4


def test_a_video_that_cannot_be_written_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "out.mp4").mkdir()
    with (
        answering(serving(raw(response(MP4, kind="video/mp4")))) as url,
        pytest.raises(ValueError, match=r"out\.mp4: cannot be written: Is a directory"),
    ):
        Server(url).download(VIDEO_ID, tmp_path / "out.mp4")
    assert [file.name for file in tmp_path.iterdir()] == ["out.mp4"]
