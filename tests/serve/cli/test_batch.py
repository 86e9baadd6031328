"""``pyramid-serve batch`` at a server that makes invented videos."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from deployments.cli import main
from tests.page.cable import cable_to
from tests.serve.http.http_at_hand import png
from tests.serve.local_server import LocalServer, probe, serve_locally


@pytest.fixture
def server(tmp_path: Path) -> Any:
    with serve_locally(str(tmp_path / "storage")) as server:
        yield server


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def run(server: LocalServer, requests: Path, folder: Path, *options: str) -> int:
    return main(["batch", str(requests), "-o", str(folder), "--url", server.url, *options])


def test_each_request_has_its_video_and_its_line(server: LocalServer, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(png(128, 64))
    requests = write(
        tmp_path / "requests.jsonl",
        {"prompt": "a ball", "seconds": "0.4", "seed": 7},
        {"prompt": "a cube", "name": "cube", "image": "red.png", "num_inference_steps": [3, 2, 1], "size": "64x64"},
    )
    folder = tmp_path / "out"
    assert run(server, requests, folder) == 0
    by_name = {result["name"]: result for result in results(folder)}
    assert set(by_name) == {"00001", "cube"}
    assert (by_name["00001"]["seed"], by_name["00001"]["status"], by_name["00001"]["line"]) == (7, "completed", 1)
    assert probe(folder / "00001.mp4") == (9, 128, 64)
    cube = server.client.get(f"/v1/videos/{by_name['cube']['id']}").json()
    assert (cube["has_input_reference"], cube["num_inference_steps"], cube["size"]) == (True, [3, 2, 1], "64x64")


def test_a_table_is_read_too(server: LocalServer, tmp_path: Path) -> None:
    requests = tmp_path / "requests.csv"
    requests.write_text('name,prompt,seconds,seed\none,"a ball, red",0.04,7\ntwo,a cube,,\n')
    assert run(server, requests, tmp_path / "out") == 0
    videos = {video["prompt"]: video for video in server.client.get("/v1/videos").json()["data"]}
    assert (videos["a ball, red"]["num_frames"], videos["a ball, red"]["seed"]) == (1, 7)
    assert videos["a cube"]["num_frames"] == 25, "what is empty was not left out"


def test_what_is_there_is_not_made_again_and_what_failed_is(
    server: LocalServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = write(
        tmp_path / "requests.jsonl",
        {"prompt": "a ball", "seconds": "0.4"},
        {"prompt": "fail", "seconds": "0.4"},
        {"prompt": "a cube", "size": "99x99"},
    )
    folder = tmp_path / "out"
    assert run(server, requests, folder) == 1
    said = capsys.readouterr()
    assert "1 of 3 videos are in" in said.out
    assert "it had to fail" in said.err
    assert "99x99" in said.err
    assert [result["status"] for result in sorted(results(folder), key=lambda each: each["line"])] == [
        "completed",
        "failed",
        "refused",
    ]
    assert run(server, requests, folder) == 1
    assert len(server.client.get("/v1/videos").json()["data"]) == 3, "the failed one alone is made anew"
    write(requests, {"prompt": "a ball", "seconds": "0.4"}, {"prompt": "a cone", "seconds": "0.4"})
    assert run(server, requests, folder) == 0
    (folder / "00001.mp4").unlink()
    num = len(server.client.get("/v1/videos").json()["data"])
    assert run(server, requests, folder) == 0
    assert (folder / "00001.mp4").exists()
    assert len(server.client.get("/v1/videos").json()["data"]) == num, "it is still at the server"


def test_a_row_that_moves_to_another_name_is_made_anew(server: LocalServer, tmp_path: Path) -> None:
    rows = [{"prompt": f"a {what}", "seconds": "0.04", "seed": 1} for what in ("ball", "cube")]
    folder, requests = tmp_path / "out", tmp_path / "requests.jsonl"

    def prompts() -> list[str]:
        """Whose videos the files are, by the last line for each."""
        ids = {result["name"]: result["id"] for result in results(folder) if result["status"] == "completed"}
        return [server.client.get(f"/v1/videos/{ids[name]}").json()["prompt"] for name in sorted(ids)]

    for asked in (rows, [{"prompt": "a cone", "seconds": "0.04"}, *rows], rows):
        assert run(server, write(requests, *asked), folder) == 0
        assert prompts()[: len(asked)] == [row["prompt"] for row in asked]


def test_a_picture_counts_by_what_is_in_it(
    server: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "red.png").write_bytes(png(128, 64))
    requests = write(tmp_path / "requests.jsonl", {"prompt": "a ball", "image": "red.png", "seconds": "0.4"})
    assert run(server, requests, tmp_path / "out") == 0
    monkeypatch.chdir(tmp_path)
    assert run(server, Path("requests.jsonl"), Path("out")) == 0
    assert len(server.client.get("/v1/videos").json()["data"]) == 1, "made again from another folder"
    (tmp_path / "red.png").write_bytes(png(256, 128))
    assert run(server, requests, tmp_path / "out") == 0
    assert len(server.client.get("/v1/videos").json()["data"]) == 2


def test_a_line_that_was_cut_off_spoils_no_other(server: LocalServer, tmp_path: Path) -> None:
    requests, folder = write(tmp_path / "requests.jsonl", {"prompt": "a ball", "seconds": "0.04"}), tmp_path / "out"
    assert run(server, requests, folder) == 0
    (folder / "00001.mp4").unlink()
    with (folder / "results.jsonl").open("a") as file:
        file.write('{"name": "0000')
    assert run(server, requests, folder) == 0
    lines = (folder / "results.jsonl").read_text().splitlines()
    assert [line[:9] for line in lines] == ['{"name": ', '{"name": ', '{"name": ']
    assert json.loads(lines[2])["status"] == "completed"


def test_a_server_that_is_away_for_a_while_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.cli.batch._AWAY_S", 0.2)
    requests = write(tmp_path / "requests.jsonl", *({"prompt": "a ball", "name": f"n{each}"} for each in range(6)))
    with serve_locally(str(tmp_path / "storage"), unit_seconds=0.3) as server, cable_to(server.url) as cable:

        def interrupt() -> None:
            while len(server.client.get("/v1/videos").json()["data"]) < 3:
                time.sleep(0.05)
            cable.pull()
            time.sleep(2)
            cable.plug_in()

        thread = threading.Thread(target=interrupt)
        thread.start()
        status = main(["batch", str(requests), "-o", str(tmp_path / "out"), "--url", cable.url, "--in-flight", "3"])
        thread.join(20)
        assert status == 0
        assert len(server.client.get("/v1/videos").json()["data"]) == 6, "some were made twice"


def test_after_ctrl_c_another_run_goes_on_with_the_same_videos(tmp_path: Path) -> None:
    requests = write(tmp_path / "requests.jsonl", *({"prompt": f"number {each}"} for each in range(12)))
    folder = tmp_path / "out"
    with serve_locally(str(tmp_path / "storage"), unit_seconds=0.3) as server:
        command = [sys.executable, "-m", "deployments.cli", "batch", str(requests), "-o", str(folder)]
        first = subprocess.Popen([*command, "--url", server.url, "--in-flight", "3"], stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not (folder / "results.jsonl").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        first.send_signal(signal.SIGINT)
        _, said = first.communicate(timeout=30)
        assert first.returncode == 130
        assert "Run it again" in said
        num_done = len(results(folder))
        assert 0 < num_done < 12
        assert len(server.client.get("/v1/videos?limit=100").json()["data"]) <= num_done + 6
        assert main(["batch", str(requests), "-o", str(folder), "--url", server.url, "--in-flight", "12"]) == 0
        assert len(list(folder.glob("*.mp4"))) == 12
        assert len(server.client.get("/v1/videos?limit=100").json()["data"]) == 12, "some were made twice"


def test_no_more_than_asked_for_are_in_flight(server: LocalServer, tmp_path: Path) -> None:
    requests = write(tmp_path / "requests.jsonl", *({"prompt": "hold", "name": f"n{each}"} for each in range(5)))
    command = [sys.executable, "-m", "deployments.cli", "batch", str(requests), "-o", str(tmp_path / "out")]
    running = subprocess.Popen([*command, "--url", server.url, "--in-flight", "2"], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(server.client.get("/v1/videos").json()["data"]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1.5)
    assert len(server.client.get("/v1/videos").json()["data"]) == 2
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=30)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", "", "has no requests"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": ', "a.jsonl:2: not valid JSON"),
        ("a.jsonl", '["a"]', "a.jsonl:1: must be a JSON object"),
        ("a.jsonl", '{"seed": 1}', "a.jsonl:1: prompt: is required"),
        ("a.jsonl", '{"prompt": "a", "name": "../b"}', "no path"),
        (
            "a.jsonl",
            '{"prompt": "a", "name": "b"}\n\n{"prompt": "a", "name": "b"}',
            "a.jsonl:3: name 'b' is that of line 1",
        ),
        ("a.jsonl", '{"prompt": "a", "image": "none.png"}', "no such file"),
        ("a.jsonl", '{"prompt": "a", "image": "' + "x" * 300 + '"}', "no such file"),
        ("a.jsonl", '{"prompt": "a", "name": "b"}\n{"prompt": "a", "name": "B"}', "name 'B' is that of line 1"),
        ("a.jsonl", '{"prompt": "a", "name": "con.x"}', "no path"),
        ("a.jsonl", '{"prompt": "a", "name": "b."}', "no path"),
        ("a.jsonl", '{"prompt": "a", "name": "' + "漢" * 100 + '"}', "more than 200 bytes"),
        ("a.jsonl", '{"prompt": ' + "[" * 100_000, "nested too deeply"),
        ("a.csv", "seed\n1\n", "a.csv:1: must name the fields, prompt among them"),
        ("a.csv", "prompt,seed\na\n", "a.csv:2: must have 2 values"),
        ("a.txt", "a", "must be a .jsonl or a .csv file"),
    ],
)
def test_a_file_that_is_wrong_is_refused_before_anything_is_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, said: str
) -> None:
    (tmp_path / name).write_text(content)
    assert main(["batch", str(tmp_path / name), "-o", str(tmp_path / "out"), "--url", "http://127.0.0.1:1"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = write(tmp_path / "a.jsonl", {"prompt": "a"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.mp4").write_text("precious")
    assert main(["batch", str(requests), "-o", str(tmp_path / "out")]) == 2
    assert "take an empty folder" in capsys.readouterr().err


def test_where_no_server_is_it_ends_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = write(tmp_path / "a.jsonl", *({"prompt": "a", "name": f"n{each}"} for each in range(20)))
    assert main(["batch", str(requests), "-o", str(tmp_path / "out"), "--url", "http://127.0.0.1:1"]) == 2
    assert "nothing answers there" in capsys.readouterr().err
