"""What clients see while the storage of the server is full, read-only or away."""

import asyncio
import errno
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from deployments.http.config import HttpConfig
from deployments.http.readiness import Readiness
from pyramid_serve.storage import VideoFile, VideoStore
from tests.serve.http.http_at_hand import png
from tests.serve.local_server import LocalServer, serve_locally
from tests.switched_storage import FULL, READ_ONLY, READS, SwitchedFileSystem, refusing


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    root = f"switched://{tmp_path_factory.mktemp('storage')}"
    # No patience, as with a local disk.
    with serve_locally(root, http=HttpConfig(storage_check_interval_s=0.1), patience_s=0.0) as server:
        yield server


def check_unavailable(answer: httpx.Response) -> None:
    assert answer.status_code == 503, answer.text
    assert int(answer.headers["retry-after"]) >= 1
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "storage_unavailable")
    assert "/" not in error["message"]


def ids_of(server: LocalServer) -> list[str]:
    return [video["id"] for video in server.client.get("/v1/videos?limit=100").json()["data"]]


def until_ready(server: LocalServer, status: int) -> httpx.Response:
    deadline = time.monotonic() + 10
    while (answer := server.client.get("/readyz")).status_code != status:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.05)
    return answer


@pytest.mark.parametrize("number", FULL + READ_ONLY)
@pytest.mark.parametrize("what", ["video.json", "input.png", "unfinished", "keys"])
def test_a_video_that_cannot_be_stored_is_refused_for_now(server: LocalServer, what: str, number: int) -> None:
    before = ids_of(server)
    files = {"input_reference": ("in.png", png(100, 50), "image/png")}
    headers = {"Idempotency-Key": f"{what} {number}"}

    def post() -> httpx.Response:
        return server.client.post("/v1/videos", data={"prompt": "a"}, files=files, headers=headers)

    with refusing(number, operations=("pipe_file",), containing=f"/{what}"):
        check_unavailable(post())
        check_unavailable(post())
        assert ids_of(server) == before
    answer = post()
    assert answer.status_code == 200, answer.text
    assert set(ids_of(server)) - set(before) == {answer.json()["id"]}
    assert server.finish(answer.json()["id"])["status"] == "completed"


def test_a_waiting_request_is_refused_too(server: LocalServer) -> None:
    with refusing(errno.ENOSPC):
        check_unavailable(server.client.post("/v1/videos?wait=true", json={"prompt": "a"}))


class BackendError(Exception):
    pass


def test_an_object_store_that_is_away_is_unavailable_for_every_route(server: LocalServer) -> None:
    video_id = server.submit()
    server.finish(video_id)
    time.sleep(1.1)  # until the server looks at a finished video again
    with refusing(BackendError("connection refused"), operations=(*READS, "pipe_file", "rm_file", "rm")):
        check_unavailable(server.client.post("/v1/videos", json={"prompt": "a"}))
        for path in ("", f"/{video_id}", f"/{video_id}/content", f"/{video_id}/stream", f"/{video_id}/events"):
            check_unavailable(server.client.get(f"/v1/videos{path}"))
        check_unavailable(server.client.delete(f"/v1/videos/{video_id}"))
    assert server.client.get(f"/v1/videos/{video_id}").status_code == 200


@pytest.mark.parametrize("number", READ_ONLY)
def test_a_finished_video_is_read_from_a_read_only_storage_and_stays_whole(server: LocalServer, number: int) -> None:
    video_id = server.submit()
    server.finish(video_id)
    path = f"/v1/videos/{video_id}"
    with refusing(number):
        check_unavailable(server.client.delete(path))
        assert server.client.get(path).json()["status"] == "completed"
        assert video_id in ids_of(server)
        content = server.client.get(f"{path}/content")
        assert content.status_code == 200 and len(content.content) == int(content.headers["content-length"])
        assert server.client.get(f"{path}/stream").status_code == 200
        assert server.client.post(f"{path}/cancel").json()["status"] == "completed"
    assert server.client.delete(path).status_code == 200
    assert server.client.get(path).status_code == 404


def test_a_video_that_is_made_is_not_cancelled_where_that_cannot_be_written(server: LocalServer) -> None:
    video_id = server.submit("hold")
    server.until(video_id, lambda video: video["num_units_done"] == 2)
    with refusing(errno.EROFS):
        check_unavailable(server.client.post(f"/v1/videos/{video_id}/cancel"))
        check_unavailable(server.client.delete(f"/v1/videos/{video_id}"))
        assert server.client.get(f"/v1/videos/{video_id}").json()["status"] == "in_progress"
    assert server.client.post(f"/v1/videos/{video_id}/cancel").json()["error"]["code"] == "cancelled"


@pytest.mark.parametrize("variant", ["thumbnail", "spritesheet"])
def test_a_preview_is_sent_though_it_cannot_be_kept(server: LocalServer, variant: str) -> None:
    video_id = server.submit()
    server.finish(video_id)
    path = f"/v1/videos/{video_id}/content?variant={variant}"
    with refusing(errno.ENOSPC):
        first, again = server.client.get(path), server.client.get(path)
        part = server.client.get(path, headers={"Range": "bytes=8-11"})
    assert first.status_code == 200 and first.headers["content-type"] == "image/webp"
    assert first.content[:4] == b"RIFF" and again.content == first.content
    assert (part.status_code, part.content) == (206, b"WEBP")
    with pytest.raises(LookupError):
        server.store.files.size_of(video_id, VideoFile(f"{variant}.webp"))
    kept = server.client.get(path)
    assert kept.content == first.content and kept.headers["etag"] == first.headers["etag"]


# --- readiness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", FULL + READ_ONLY)
def test_a_server_is_not_ready_until_its_storage_takes_something(server: LocalServer, number: int) -> None:
    until_ready(server, 200)
    with refusing(number):
        check_unavailable(until_ready(server, 503))
    until_ready(server, 200)


def test_a_server_is_not_ready_while_its_storage_cannot_be_read(server: LocalServer) -> None:
    until_ready(server, 200)
    with refusing(errno.EIO, operations=READS):
        check_unavailable(server.client.get("/readyz"))


def test_many_probes_list_nothing_and_write_once_in_a_while(tmp_path: Path) -> None:
    root = f"switched://{tmp_path}"
    with serve_locally(root, http=HttpConfig(storage_check_interval_s=3600.0)) as server:
        for _ in range(3):
            server.finish(server.submit(seconds="0.4"))
        SwitchedFileSystem.calls.clear()
        with ThreadPoolExecutor(16) as pool:
            answers = [pool.submit(httpx.get, f"{server.url}/readyz") for _ in range(64)]
            assert {answer.result().status_code for answer in answers} == {200}
        calls = [(operation, path.removeprefix(str(tmp_path))) for operation, path in SwitchedFileSystem.calls]
    probes = [call for call in calls if call[1].startswith("/probe/")]
    assert [operation for operation, _ in probes] == ["pipe_file", "cat_file", "rm_file"]
    assert not [call for call in calls if call[1].startswith("/videos")]


class HangingStore(VideoStore):
    """Hangs in every read until it is let go."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.num_reads = 0
        self.may_go = threading.Event()

    def read_epoch(self) -> str | None:
        self.num_reads += 1
        self.may_go.wait(30)
        return None


@pytest.mark.asyncio
async def test_a_storage_that_hangs_holds_one_thread_however_many_probes_come(tmp_path: Path) -> None:
    store = HangingStore(str(tmp_path))
    readiness = Readiness(store, interval_s=0.0)
    for _ in range(20):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await readiness.check()
    assert store.num_reads == 1
    store.may_go.set()
    await readiness.check()
