"""``pyramid-serve`` as a client, against a server with invented videos; and as a server of its own, with Ray."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
from PIL import Image

from deployments import cli
from deployments.cli.demo import deployment_rows, make
from deployments.cli.server import Server
from deployments.local.cluster import free_port
from deployments.local.signals import StopSignals
from tests.serve.cli.conftest import Said
from tests.serve.http.http_at_hand import png
from tests.serve.local_server import LocalServer, probe, serve_locally

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


# --- a client -------------------------------------------------------------------------------------------------------


def test_a_submitted_video_is_written_once_finished(said: Said, tmp_path: Path) -> None:
    assert "out.mp4: 25 frames of 128x64, seed 7" in said("submit", "a ball", "-o", "out.mp4", "--seed", "7")
    assert probe(tmp_path / "out.mp4") == (25, 128, 64)
    assert [file.name for file in tmp_path.iterdir()] == ["out.mp4"]


def test_a_submitted_video_can_be_fetched_later(said: Said, server: LocalServer, tmp_path: Path) -> None:
    out = said("submit", "a ball", "--size", "64x64", "--seconds", "0.4")
    video_id = out.splitlines()[0]
    assert f"pyramid-serve download {video_id} --url {server.url}" in out
    assert f"{video_id}.mp4: 9 frames of 64x64" in said("download", video_id)
    assert probe(tmp_path / f"{video_id}.mp4") == (9, 64, 64)
    said("download", video_id, "--variant", "thumbnail")
    assert Image.open(tmp_path / f"{video_id}.webp").size == (64, 64)


def test_every_setting_of_a_request_is_sent(said: Said, server: LocalServer, tmp_path: Path) -> None:
    (tmp_path / "in.jpg").write_bytes(png(100, 50))
    settings = "--image in.jpg --seconds 1 --size 128x64 --seed 7 --negative-prompt bad --prompt-suffix ;good"
    steps = "--steps 3,2,1 --video-steps 2 --guidance-scale 2.5 --video-guidance-scale 3 --model tiny"
    video_id = said("submit", "a ball", *settings.split(), *steps.split()).splitlines()[0]
    video = json.loads(said("status", video_id, "--json"))
    assert video["has_input_reference"] is True
    assert (video["seed"], video["negative_prompt"], video["prompt_suffix"]) == (7, "bad", ";good")
    assert (video["num_inference_steps"], video["video_num_inference_steps"]) == ([3, 2, 1], [2, 2, 2])
    assert (video["guidance_scale"], video["video_guidance_scale"]) == (2.5, 3.0)


def test_a_video_can_be_watched_over_cancelled_and_deleted(said: Said, server: LocalServer) -> None:
    video_id = said("submit", "hold").splitlines()[0]
    server.until(video_id, lambda video: video["num_units_done"] == 2)
    assert f"{video_id}: in progress, 60% done" in said("status", video_id)
    assert "in_progress" in next(line for line in said("list").splitlines() if video_id in line)
    assert said("cancel", video_id).strip() == f"{video_id}: cancelled"
    assert "cancelled" in next(line for line in said("list", "--limit", "1").splitlines() if video_id in line)
    assert said("delete", video_id).strip() == f"{video_id}: deleted"
    assert video_id not in said("list")


def test_the_status_of_a_finished_video_has_its_timeline(said: Said) -> None:
    video_id = said("submit", "a ball", "--wait").split(":")[0]
    out = said("status", video_id)
    assert f"{video_id}: completed" in out
    assert "25 frames of 128x64" in out
    assert "\ndenoiser " in out and "\ndecoder " in out
    assert "% of the decoding" in out


def test_a_failed_video_is_an_error_and_no_file(said: Said, tmp_path: Path) -> None:
    assert "failed: it had to fail" in said("submit", "fail", "-o", "out.mp4", status=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["submit", "a", "--size", "1280x720"], "size=1280x720: this model makes 128x64, 64x64"),
        (["submit", "a", "--seconds", "soon"], "seconds='soon'"),
        (["submit", " "], "prompt"),
        (["submit", "a", "--image", "nowhere.png"], "nowhere.png: cannot be read: No such file"),
        (["submit", "a", "-o", "out.avi"], "out.avi: must end in .mp4"),
        (["submit", "a", "-o", "nowhere/out.mp4"], "no folder nowhere"),
        (["status", "video_1"], "'video_1': no such video"),
        (["status", "../../etc"], "'../../etc': no such video"),
        (["cancel", "video_" + "0" * 32], "no such video"),
        (["delete", "x"], "no such video"),
        (["download", "x"], "no such video"),
        (["list", "--limit", "0"], "--limit 0: must be at least 1"),
    ],
)
def test_what_is_wrong_is_one_line(said: Said, arguments: list[str], text: str, tmp_path: Path) -> None:
    err = said(*arguments, status=2)
    assert text in err
    assert err.startswith(f"pyramid-serve {arguments[0]}: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["ftp://x", "http://", "nonsense://a b"])
def test_a_url_that_is_none_is_refused(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "--url", url]) == 2
    assert "must be like http://127.0.0.1:8000" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_told_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "--url", f"127.0.0.1:{free_port()}"]) == 2
    assert "start a server with 'pyramid-serve up'" in capsys.readouterr().err


def test_ctrl_c_while_waiting_says_how_to_go_on(server: LocalServer, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deployments.cli", "submit", "hold", "-o", "out.mp4", "--url", server.url]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    deadline = time.monotonic() + 30
    while [video["prompt"] for video in server.client.get("/v1/videos?limit=1").json()["data"]] != ["hold"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    video_id = server.client.get("/v1/videos?limit=1").json()["data"][0]["id"]
    listed_at = time.monotonic()
    while server.app.state.door.videos.mirror._looked_at < listed_at:  # asked for by its id: the command waits
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"pyramid-serve cancel {video_id} --url {server.url}" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
    server.client.delete(f"/v1/videos/{video_id}")


def test_the_client_lists_more_than_a_page(server: LocalServer) -> None:
    for _ in range(5):
        server.submit(seconds="0.4")
    client = Server(server.url)
    assert len(list(client.list(limit=4))) == 4
    assert len({video["id"] for video in client.list(limit=1000)}) >= 5


def test_the_client_comes_again_when_the_server_was_away(tmp_path: Path) -> None:
    with serve_locally(str(tmp_path)) as server:
        video_id = server.submit()
        server.finish(video_id)
        door = server.app.state.door
        door.views.forget(video_id)
        get, door.videos.get = door.videos.get, _away
        threading.Timer(0.5, lambda: setattr(door.videos, "get", get)).start()
        assert Server(server.url).get(video_id)["status"] == "completed"


async def _away(video_id: str) -> Any:
    from deployments.http.errors import ApiError

    raise ApiError(503, "away")


def test_progress_is_shown_for_each_deployment(server: LocalServer) -> None:
    video_id = server.submit("hold")
    video = server.until(video_id, lambda video: video["num_units_done"] == 2)
    rows = deployment_rows(video)
    assert [row.split()[0] for row in rows] == ["text", "denoiser", "decoder", "saved"]
    assert "2/4 units" in rows[1] and "2/4 units" in rows[2]
    server.client.delete(f"/v1/videos/{video_id}")


def test_a_script_that_starts_a_server_behind_it_can_interrupt_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell leaves it for a command followed by "&"
    try:
        with pytest.raises(KeyboardInterrupt), StopSignals():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_demo_draws_over_its_progress_and_ends_with_the_chart(tmp_path: Path) -> None:
    terminal, file = Terminal(), io.StringIO()
    with serve_locally(str(tmp_path / "storage"), unit_seconds=0.2) as server:
        for out in (terminal, file):
            make(Server(server.url), "a ball", tmp_path / "demo.mp4", out=out)
    for out in (terminal, file):
        assert "demo.mp4: 25 frames of 128x64, 24 fps" in out.getvalue()
        assert "\ndenoiser  " in out.getvalue()
        assert "% of the decoding" in out.getvalue()
    assert "\x1b[4A\x1b[2K  text encoder  [########################] 1/1 prompts\n" in terminal.getvalue()
    assert "\x1b" not in file.getvalue()
    assert probe(tmp_path / "demo.mp4") == (25, 128, 64)
    assert Image.open(tmp_path / "demo.png").format == "PNG"


# --- servers of its own ---------------------------------------------------------------------------------------------


def processes_of(mark: str) -> dict[int, str]:
    """Living processes that were started with this mark in their environment, and their command lines."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                if mark.encode() in (folder / "environ").read_bytes():
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # it has ended, or is another user's
    return found


class Command:
    """A ``pyramid-serve`` command in a session of its own, as in a terminal."""

    def __init__(self, *arguments: str | Path, cwd: Path) -> None:
        self.mark = f"PYRAMID_SERVE_TEST={uuid.uuid4().hex}"
        name, _, value = self.mark.partition("=")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deployments.cli", *map(str, arguments)],
            cwd=cwd,
            env=os.environ | {name: value, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def interrupt(self) -> None:
        """As Ctrl-C does: to the whole group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def check_nothing_runs(self) -> None:
        deadline = time.monotonic() + 20
        while processes_of(self.mark):
            assert time.monotonic() < deadline, processes_of(self.mark)
            time.sleep(0.2)


@pytest.mark.slow
def test_the_demo_leaves_a_video_and_nothing_running(tmp_path: Path) -> None:
    command = Command("demo", "a blue star spins on a white background", cwd=tmp_path)
    out, _ = command.process.communicate(timeout=280)
    assert command.process.returncode == 0, out
    frames, width, height = probe(tmp_path / "demo.mp4")
    assert frames > 1
    assert f"demo.mp4: {frames} frames of {width}x{height}, 24 fps" in out
    assert Image.open(tmp_path / "demo.png").format == "PNG"
    for text in ("\ndenoiser ", "\ndecoder ", "% of the decoding"):
        assert text in out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["demo.mp4", "demo.png"]
    command.check_nothing_runs()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["Starting Ray", "ServeReplica", "POST "])
def test_ctrl_c_ends_the_demo_at_any_moment(tmp_path: Path, moment: str) -> None:
    command = Command("demo", cwd=tmp_path)
    assert command.process.stdout is not None
    said = ""
    if moment == "ServeReplica":
        while not any("ServeReplica" in line for line in processes_of(command.mark).values()):
            assert command.process.poll() is None
            time.sleep(0.2)
    else:
        while moment not in said:
            line = command.process.stdout.readline()
            assert line, said
            said += line
        time.sleep(2)
    command.interrupt()
    out, _ = command.process.communicate(timeout=60)
    assert command.process.returncode == 130, said + out
    assert (said + out).strip().splitlines()[-1] == "pyramid-serve demo: interrupted"
    assert "Traceback" not in said + out
    assert list(tmp_path.iterdir()) == []
    command.check_nothing_runs()


def test_a_port_that_is_taken_is_told_at_once(server: LocalServer, capsys: pytest.CaptureFixture[str]) -> None:
    port = server.url.rpartition(":")[2]
    assert cli.main(["up", "--port", port]) == 2
    assert f"port {port} of 127.0.0.1: address already in use; take another with --port" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("storage", "text"),
    [
        ("file", "is not a folder"),
        ("link", "is a symbolic link to nothing"),
        ("file/under", "cannot be written: Not a directory"),
        ("s3://key:secret@bucket/videos", 'is not installed: pip install "pyramid-serve[s3]"'),
        ("nonsense://bucket", "Protocol not known: nonsense"),
    ],
)
def test_a_storage_that_cannot_be_used_is_told_before_ray_starts(
    storage: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(url: str, **_: Any) -> Any:
        if url.startswith("s3:"):
            raise ImportError("Install s3fs to access S3")
        return url_to_fs(url)

    url_to_fs = fsspec.core.url_to_fs
    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    application = {"import_path": "deployments.app:build", "args": {"storage": storage}}
    (tmp_path / "config.yaml").write_text(json.dumps({"applications": [application]}))
    assert cli.main(["up", "--config", "config.yaml", "--port", str(free_port())]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("pyramid-serve up: storage ") and text in captured.err
    assert captured.err.count("\n") == 1 and captured.out == "" and "secret" not in captured.err


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("applications: [{import_path: 'deployments.app:build', args: {modle: {}}}]", "modle"),
        ("applications: [{import_path: 'other:app'}]", "must have one application"),
        ("applications: [{import_path: 'deployments.app:build', runtime_env: {}}]", "for a cluster"),
        ("a: [", "no YAML"),
    ],
)
def test_a_configuration_that_is_wrong_is_told_at_once(
    content: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(content)
    assert cli.main(["up", "--config", "config.yaml"]) == 2
    assert text in capsys.readouterr().err


def test_a_missing_configuration_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["up", "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml: cannot be read" in capsys.readouterr().err
