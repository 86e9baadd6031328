from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.serve.local_server import LocalServer, fragment, probe, serve_locally


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
