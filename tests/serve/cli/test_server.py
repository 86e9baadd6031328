"""The client of the command line: retries, redirects and proxies."""

import json
import socket
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from deployments import cli
from deployments.cli import server as http_client
from deployments.cli.server import Server, ServerError
from tests.serve.cli.answers_at_hand import (
    COMMANDS,
    VIDEO_ID,
    Answer,
    answering,
    check_one_line,
    objects,
    raw,
    response,
    video_object,
)

pytestmark = pytest.mark.usefixtures("in_a_hurry")


def test_another_server_gets_neither_the_key_nor_the_request(capsys: pytest.CaptureFixture[str]) -> None:
    heads: list[str] = []

    def note(connection: socket.socket, head: str) -> None:
        heads.append(head)
        connection.sendall(response(json.dumps(video_object()).encode()))

    for status in ("301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"):
        with answering(note) as other:
            target = other + "/v1/videos"
            with answering(raw(response(b"", status=status, headers=f"Location: {target}\r\n"))) as url:
                for command in COMMANDS:
                    assert cli.main([*command, "--url", url, "--api-key", "secret"]) == 2
                    said = check_one_line(capsys, command[0])
                    assert f"redirects to {other}; " in said and "secret" not in said
    assert heads == []


def test_a_redirect_within_the_server_is_followed_with_the_key(capsys: pytest.CaptureFixture[str]) -> None:
    heads: list[str] = []

    def move(connection: socket.socket, head: str) -> None:
        heads.append(head)
        path = head.split(" ")[1]
        if path.startswith("/new"):
            connection.sendall(response(json.dumps(video_object()).encode()))
        else:
            connection.sendall(response(b"", status="308 Permanent Redirect", headers=f"Location: /new{path}\r\n"))

    with answering(move) as url:
        assert cli.main(["submit", "a ball", "--url", url, "--api-key", "secret"]) == 0
    assert [head.split(" ")[:2] for head in heads] == [["POST", "/v1/videos"], ["POST", "/new/v1/videos"]]
    assert all("authorization: bearer secret" in head.lower() for head in heads)


def test_a_key_that_fits_in_no_header_is_refused_without_being_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("se\ncret", "se\u00e9cret"):
        assert cli.main(["list", "--api-key", key]) == 2
        assert "cret" not in check_one_line(capsys, "list")


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "socks5://127.0.0.1:1")
    monkeypatch.delenv("REQUEST_METHOD", raising=False)
    with answering(objects(video_object())) as url:
        port = url.rpartition(":")[2]
        for host in ("127.0.0.1", "localhost"):
            assert Server(f"http://{host}:{port}").get(VIDEO_ID)["id"] == VIDEO_ID


def test_a_proxy_of_the_environment_is_asked_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[str] = []

    def note(connection: socket.socket, head: str) -> None:
        heads.append(head)
        connection.sendall(response(json.dumps(video_object()).encode()))

    with answering(note) as proxy:
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("http_proxy", proxy)
        assert Server("http://videos.example:8000").get(VIDEO_ID)["id"] == VIDEO_ID
    assert heads[0].startswith(f"GET http://videos.example:8000/v1/videos/{VIDEO_ID} ")


def test_a_proxy_that_cannot_be_used_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for proxy in ("nonsense://host", "http://[::1", "socks5://127.0.0.1:1"):
        monkeypatch.setenv("http_proxy", proxy)
        assert cli.main(["list", "--url", "http://videos.example:8000"]) == 2
        check_one_line(capsys, "list")


def test_a_server_that_is_away_is_asked_again_with_the_same_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "_PATIENCE_S", 30.0)
    keys: list[str] = []

    def answer(connection: socket.socket, head: str) -> None:
        (key,) = (line for line in head.lower().split("\r\n") if line.startswith("idempotency-key: "))
        keys.append(key)
        if len(keys) == 1:
            return  # the answer is lost
        if len(keys) == 2:
            connection.sendall(response(b"{}", status="503 Service Unavailable"))
        else:
            connection.sendall(response(json.dumps(video_object()).encode()))

    with answering(answer) as url:
        assert Server(url).submit({"prompt": "a"})["id"] == VIDEO_ID
    assert len(keys) == 3 and len(set(keys)) == 1


def test_a_list_without_an_end_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(objects({"data": [], "has_more": True})) as url:
        assert list(Server(url).list(limit=10)) == []
    with answering(objects({"data": [video_object()] * 7, "has_more": True})) as url:
        assert len(list(Server(url).list(limit=10))) == 10


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:0", "http://a:99999", "http://a b", "http://[::1", "http://key@host"]
)
def test_a_url_that_leads_nowhere_is_refused(url: str) -> None:
    with pytest.raises(ServerError, match="must be like"):
        Server(url)


# --- patience -------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only while the client sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(http_client, "time", clock)
    monkeypatch.setattr(http_client, "_PATIENCE_S", 60.0)
    monkeypatch.setattr(http_client, "_CALL_S", 10.0)
    return clock


def refusing(num_times: int, status: str, headers: str = "") -> Answer:
    """A server that refuses so many requests for a video and then accepts one."""
    came = iter(range(1_000_000))

    def answer(connection: socket.socket, head: str) -> None:
        if next(came) < num_times:
            body = b'{"error": {"message": "come back later"}}'
            connection.sendall(response(body, status=status, headers=headers))
        else:
            connection.sendall(response(json.dumps(video_object()).encode()))

    return answer


@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Service Unavailable"])
def test_a_server_that_says_when_to_come_back_is_asked_then(status: str, clock: Clock) -> None:
    with answering(refusing(2, status, "Retry-After: 7\r\n")) as url:
        assert Server(url).submit({"prompt": "a"})["id"] == VIDEO_ID
    assert clock.slept == [7.0, 7.0]


def test_a_server_that_does_not_say_when_is_asked_every_second(clock: Clock) -> None:
    with answering(refusing(3, "503 Service Unavailable")) as url:
        assert Server(url).submit({"prompt": "a"})["id"] == VIDEO_ID
    assert clock.slept == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("header", ["0", "soon", "-5", "1e3", "\u00b2", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_a_time_that_is_over_or_no_time_is_a_second(header: str, clock: Clock) -> None:
    with answering(refusing(1, "503 Service Unavailable", f"Retry-After: {header}\r\n")) as url:
        assert Server(url).submit({"prompt": "a"})["id"] == VIDEO_ID
    assert clock.slept == [1.0]


def test_a_date_to_come_back_at_is_honoured(clock: Clock) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
    with answering(refusing(1, "503 Service Unavailable", f"Retry-After: {date}\r\n")) as url:
        assert Server(url).submit({"prompt": "a"})["id"] == VIDEO_ID
    (slept,) = clock.slept
    assert 10 < slept <= 20


def test_a_server_that_wants_more_time_than_there_is_patience_is_asked_once_more_at_its_end(clock: Clock) -> None:
    with answering(refusing(1, "429 Too Many Requests", "Retry-After: 3600\r\n")) as url:
        assert Server(url).submit({"prompt": "a"})["id"] == VIDEO_ID
    assert clock.slept == [60.0]


def test_patience_ends_with_what_the_server_says(clock: Clock) -> None:
    with (
        answering(refusing(1_000, "429 Too Many Requests", "Retry-After: 25\r\n")) as url,
        pytest.raises(ServerError, match=r"^come back later$"),
    ):
        Server(url).submit({"prompt": "a"})
    assert clock.slept == [25.0, 25.0, 10.0]


def test_a_request_that_is_wrong_is_not_sent_again(clock: Clock) -> None:
    with (
        answering(refusing(1, "400 Bad Request", "Retry-After: 7\r\n")) as url,
        pytest.raises(ServerError, match=r"^come back later$"),
    ):
        Server(url).submit({"prompt": "a"})
    assert clock.slept == []
