"""``pyramid-serve up`` on a tiny random model: HTTP through Serve, and what becomes of it under load and faults."""

import asyncio
import os
import signal
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from deployments.local.cluster import free_port
from tests.serve.cli.test_command_line import Command, processes_of
from tests.serve.cli.up_at_hand import SMALL, Up
from tests.serve.http.http_at_hand import HEAD, check, png, send
from tests.serve.local_server import probe

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, miniflux: Path) -> Iterator[Up]:
    # Through Serve's proxy at first, as on a cluster; from the restart after SIGTERM on, straight to the ingress.
    up = Up(tmp_path_factory.mktemp("up"), [{"source": str(miniflux), "name": "mini"}], through_proxy=True)
    try:
        yield up
    finally:
        up.stop()


def test_it_says_where_it_is_and_what_to_type_next(up: Up) -> None:
    assert f"{up.url}  (docs: {up.url}/docs)" in up.said
    assert f"-o circle.mp4 --url {up.url}" in up.said
    assert up.client.get("/readyz").json() == {"status": "ok"}
    assert up.client.get("/docs").status_code == 200


def test_it_says_where_its_logs_are(up: Up) -> None:
    (line,) = (line for line in up.said.splitlines() if line.startswith("Logs: "))
    logs = Path(line.removeprefix("Logs: "))
    assert list(logs.glob("worker-*.err")) and (logs / "serve").is_dir()


def test_a_storage_that_takes_nothing_is_told_on_the_terminal_and_to_clients(up: Up) -> None:
    done = up.submit()
    assert up.finish(done)["status"] == "completed"
    # Where files are written before they are moved in place there is a file now: nothing can be written.
    aside, kept = up.folder / "videos" / "aside", up.folder / "videos" / "kept"
    aside.rename(kept)
    aside.write_text("in the way")
    try:
        for _ in range(20):
            answer = up.client.post("/v1/videos", json=SMALL, headers={"Idempotency-Key": "while full"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_unavailable")
            assert int(answer.headers["retry-after"]) >= 1
        assert up.client.get(f"/v1/videos/{done}/content").status_code == 200
        assert up.client.get(f"/v1/videos/{done}/content?variant=thumbnail").status_code == 200
        deadline = time.monotonic() + 30
        while up.client.get("/readyz").status_code != 503:
            assert time.monotonic() < deadline
            time.sleep(0.5)
    finally:
        aside.unlink()
        kept.rename(aside)
    said = up.until("cannot be written")
    (line,) = (line for line in said.splitlines() if "POST /v1/videos" in line)
    assert (
        "WARNING deployments.http.errors: POST /v1/videos: storage " in line
        and "{" not in line
        and "Traceback" not in said
    )
    deadline = time.monotonic() + 30
    while up.client.get("/readyz").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    answer = up.client.post("/v1/videos", json=SMALL, headers={"Idempotency-Key": "while full"})
    assert up.finish(answer.json()["id"])["status"] == "completed"


def test_the_sdk_makes_a_video_with_and_without_a_picture(up: Up, tmp_path: Path) -> None:
    client = openai.OpenAI(base_url=f"{up.url}/v1", api_key="none")
    settings = {"num_inference_steps": [1, 1, 1], "video_num_inference_steps": 1, "seed": 3}
    create: Any = client.videos.create  # typed for its vendor's sizes and lengths
    for picture in (openai.omit, ("in.png", png(100, 50), "image/png")):
        video = create(prompt="a ball", size="128x64", seconds="1", input_reference=picture, extra_body=settings)
        video = client.videos.poll(video.id)
        assert video.status == "completed", video
        client.videos.download_content(video.id).write_to_file(tmp_path / "video.mp4")
        assert probe(tmp_path / "video.mp4") == (25, 128, 64)
        assert client.videos.delete(video.id).deleted


def test_the_stream_comes_early_and_alike_for_all_and_plays(up: Up, tmp_path: Path) -> None:
    video_id = up.submit(size="128x64", seconds="5", video_num_inference_steps=10)
    path = f"{up.url}/v1/videos/{video_id}/stream"
    with ThreadPoolExecutor(1) as other, httpx.stream("GET", path, timeout=120) as answer:
        early = other.submit(httpx.get, path, timeout=120)
        chunks = answer.iter_raw()
        first = next(chunks)
        num_done = up.client.get(f"/v1/videos/{video_id}").json()["num_units_done"]
        streamed = first + b"".join(chunks)
        assert early.result().content == streamed
    assert num_done < 16 / 3
    assert up.finish(video_id)["status"] == "completed"
    assert up.client.get(path).content == streamed
    (tmp_path / "stream.mp4").write_bytes(streamed)
    assert probe(tmp_path / "stream.mp4") == (121, 128, 64)


def test_the_stream_of_a_cancelled_video_is_broken_off(up: Up) -> None:
    video_id = up.submit(seconds="5", video_num_inference_steps=50)
    with (
        pytest.raises(httpx.RemoteProtocolError),
        httpx.stream("GET", f"{up.url}/v1/videos/{video_id}/stream", timeout=60) as answer,
    ):
        for _ in answer.iter_raw():
            up.client.post(f"/v1/videos/{video_id}/cancel")


def test_a_client_that_leaves_a_waiting_request_cancels_the_video(up: Up) -> None:
    fields = SMALL | {"prompt": "left", "seconds": "5", "num_inference_steps": 100, "video_num_inference_steps": 50}
    with pytest.raises(httpx.ReadTimeout):
        up.client.post("/v1/videos?wait=true", json=fields, timeout=2.0)
    left: list[str] = []
    deadline = time.monotonic() + 30
    while not left:  # it may be accepted a moment after its client left
        assert time.monotonic() < deadline
        videos = up.client.get("/v1/videos").json()["data"]
        left = [video["id"] for video in videos if video["prompt"] == "left"]
    (video_id,) = left
    assert up.finish(video_id)["error"]["code"] == "cancelled"


def test_wrong_requests_are_refused_through_the_proxy_too(up: Up) -> None:
    assert send(up, HEAD + b'Content-Length: 100\r\n\r\n{"prompt": ').startswith(b"HTTP/1.1 408 ")  # type: ignore[arg-type]
    big = b'{"prompt": "' + b"a" * 1_500_000 + b'"}'
    check(up.client.post("/v1/videos", content=big, headers={"Content-Type": "application/json"}), 413, None)
    check(up.client.post("/v1/videos", json={"prompt": "a", "fps": 3}), 400, "fps")
    check(up.client.get("/v1/videos/..%2f..%2fetc"), 404, "video_id")
    check(up.client.put("/v1/videos"), 405, None)
    check(up.client.get("/nowhere"), 404, None)


def test_a_web_page_cannot_use_a_server_of_this_machine(up: Up) -> None:
    check(up.client.post("/v1/videos", json=SMALL, headers={"Origin": "https://evil.example"}), 403, "Origin")
    check(up.client.get("/v1/videos", headers={"Host": "evil.example"}), 400, "Host")
    assert up.client.get("/readyz", headers={"Host": "evil.example"}).status_code == 200


def test_head_and_the_file_in_one_request_come_through_the_proxy(up: Up) -> None:
    answer = up.client.post("/v1/videos/sync/", files={name: (None, str(value)) for name, value in SMALL.items()})
    assert (answer.status_code, int(answer.headers["content-length"])) == (200, len(answer.content))
    path = f"/v1/videos/{answer.headers['x-video-id']}"
    assert up.client.get(f"{path}/content").content == answer.content
    for rest in ("/content", "/stream", "/events", ""):
        head = up.client.head(f"{path}{rest}")
        assert (head.status_code, head.content) == (200, b"")
    assert int(up.client.head(f"{path}/content").headers["content-length"]) == len(answer.content)


def test_sigterm_while_a_video_is_made_stops_it_for_now(up: Up) -> None:
    video_id = up.submit(seconds="5", video_num_inference_steps=5)
    os.kill(up.command.process.pid, signal.SIGTERM)
    up.command.process.wait(60)
    assert up.command.process.returncode == 0
    assert up.until("stopped").strip().splitlines()[-1] == "pyramid-serve up: stopped"
    up.command.check_nothing_runs()
    up.start()
    assert up.finish(video_id)["status"] == "completed"


def test_an_ingress_that_is_killed_loses_no_accepted_video(up: Up) -> None:
    headers = {"Idempotency-Key": "around the kill"}
    fields = SMALL | {"seconds": "2"}
    first = up.client.post("/v1/videos", json=fields, headers=headers).json()["id"]
    others = [up.submit() for _ in range(3)]
    (pid,) = (pid for pid, command in processes_of(up.command.mark).items() if "Ingress" in command)
    os.kill(pid, signal.SIGKILL)

    def post() -> httpx.Response | None:
        try:
            return up.client.post("/v1/videos", json=fields, headers=headers)
        except httpx.TransportError:
            return None

    deadline = time.monotonic() + 180
    while (answer := post()) is None or answer.status_code != 200:
        assert time.monotonic() < deadline, answer
        time.sleep(0.2)
    assert answer.json()["id"] == first
    assert {up.finish(video_id)["status"] for video_id in (first, *others)} == {"completed"}


@pytest.mark.slow
def test_200_requests_at_once_while_status_reads_stay_fast(up: Up) -> None:
    accepted: list[str] = []
    refused: list[httpx.Response] = []
    seconds: list[float] = []

    async def ask_four() -> None:
        async with httpx.AsyncClient(base_url=up.url, timeout=120) as client:
            for _ in range(4):
                answer = await client.post("/v1/videos", json=SMALL)
                if answer.status_code == 200:
                    accepted.append(answer.json()["id"])
                else:
                    assert answer.status_code == 429, answer.text
                    refused.append(answer)

    async def read(done: asyncio.Event) -> None:
        async with httpx.AsyncClient(base_url=up.url, timeout=120) as client:
            while not done.is_set():
                for video_id in accepted[-1:]:
                    started = time.perf_counter()
                    assert (await client.get(f"/v1/videos/{video_id}")).status_code == 200
                    seconds.append(time.perf_counter() - started)
                await asyncio.sleep(0.05)

    async def all_over() -> bool:
        async with httpx.AsyncClient(base_url=up.url, timeout=120) as client:
            page = (await client.get("/v1/videos?limit=100")).json()["data"]
        return all(video["status"] in ("completed", "failed") for video in page)

    async def run() -> None:
        done = asyncio.Event()
        reader = asyncio.create_task(read(done))
        await asyncio.gather(*(ask_four() for _ in range(50)))
        while not await all_over():
            await asyncio.sleep(1.0)
        done.set()
        await reader

    asyncio.run(run())
    assert len(accepted) + len(refused) == 200
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert {up.finish(video_id)["status"] for video_id in accepted} == {"completed"}
    assert statistics.median(seconds) < 0.1


@pytest.mark.slow
def test_ctrl_c_stops_it_and_the_next_start_goes_on(up: Up) -> None:
    video_id = up.submit(seconds="5", video_num_inference_steps=5)
    assert up.stop() == 130
    up.command.check_nothing_runs()
    up.start()
    assert up.finish(video_id)["status"] == "completed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "last"),
    [(signal.SIGTERM, 0, "stopped"), (signal.SIGINT, 130, "interrupted"), (signal.SIGHUP, 130, "interrupted")],
)
@pytest.mark.parametrize("moment", ["", "Starting Ray", "Ctrl-C stops it"])
def test_it_ends_at_any_moment_with_nothing_left(
    tmp_path: Path, number: int, status: int, last: str, moment: str
) -> None:
    command = Command("up", "--port", str(free_port()), cwd=tmp_path)
    assert command.process.stdout is not None
    said = ""
    while moment and moment not in said:
        line = command.process.stdout.readline()
        assert line, said
        said += line
    time.sleep(2.0)
    for _ in range(2):  # twice in a row
        command.process.send_signal(number)
        time.sleep(0.2)
    out, _ = command.process.communicate(timeout=60)
    assert command.process.returncode == status, said + out
    assert (said + out).strip().splitlines()[-1] == f"pyramid-serve up: {last}"
    assert "Traceback" not in said + out and "***" not in said + out
    command.check_nothing_runs()
