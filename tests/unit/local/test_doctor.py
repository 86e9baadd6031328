"""``pyramid-serve doctor``: every line there, whatever is missing, and no secrets."""

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments import cli
from deployments.local import doctor
from deployments.local.doctor import Line, examine
from pyramid_serve import precision
from pyramid_serve.precision import Precision

NAMES = [
    "versions", "python", "processor", "flags", "memory", "disk", "ffmpeg", "storage",
    "torch", "library", "dtype", "gpu", "ray",
]  # fmt: skip
ROOT = Path(__file__).parents[3]


def lines(**options: Any) -> dict[str, Line]:
    return {line.name: line for line in examine(**options)}


def test_every_line_is_there_and_readable(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == NAMES
    assert "pyramid-serve 0." in out and "libx264" in out and "cores" in out and "GiB" in out


def test_json_has_the_same_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [line["name"] for line in content] == NAMES
    assert all(set(line) == {"name", "text", "is_ok", "is_needed"} for line in content)


def test_a_storage_is_tried(tmp_path: Path) -> None:
    assert lines(storage=str(tmp_path / "videos"))["storage"].text.endswith(": can be written, read and deleted from")
    (tmp_path / "file").write_text("")
    line = lines(storage=str(tmp_path / "file"))["storage"]
    assert not line.is_ok and not line.is_needed and "is not a folder" in line.text


def test_the_storage_of_a_configuration_is_tried(tmp_path: Path) -> None:
    application = {"import_path": "deployments.app:build", "args": {"storage": str(tmp_path / "videos")}}
    (tmp_path / "config.yaml").write_text(json.dumps({"applications": [application]}))
    assert f"{tmp_path}/videos: can be written" in lines(config=tmp_path / "config.yaml")["storage"].text
    assert "cannot be read" in lines(config=tmp_path / "nowhere.yaml")["storage"].text


def test_it_tells_no_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYRAMID_SERVE_API_KEY", "hush-hush")
    for root in ("s3://key:hush/hush@bucket/videos?token=hush", f"{tmp_path}/videos"):
        assert cli.main(["doctor", "--storage", root]) == 0
    out = capsys.readouterr().out
    assert "hush" not in out and "s3://***" in out
    assert str(tmp_path) not in out and "~/videos: can be written" in out


def test_a_library_that_cannot_be_imported_is_told_and_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["doctor"]) == 2
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()] == NAMES
    for name in ("torch", "dtype", "gpu"):
        (line,) = (line for line in said.out.splitlines() if line.startswith(name))
        assert "cannot be imported: ModuleNotFoundError" in line
    assert said.err.startswith("pyramid-serve doctor: generate does not work here: see torch")


def test_a_torch_that_is_broken_is_told_by_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libtorch_cpu.so: undefined symbol')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "deployments.cli", "doctor"]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
    assert finished.returncode == 2
    assert "cannot be imported: OSError: libtorch_cpu.so: undefined symbol" in finished.stdout
    assert [line.split()[0] for line in finished.stdout.splitlines()] == NAMES
    assert "Traceback" not in finished.stdout + finished.stderr


@pytest.fixture
def ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The path of a program that ``imageio_ffmpeg`` takes for ffmpeg."""
    path = tmp_path / "ffmpeg"
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: str(path))
    yield path


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "cannot be run: No such file"),
        ("exit 3", "ended with 3"),
        ("echo ffmpeg version 7 Copyright", "has no libx264"),
    ],
)
def test_an_ffmpeg_that_does_not_work_is_an_error(ffmpeg: Path, script: str | None, reason: str) -> None:
    if script is not None:
        ffmpeg.write_text(f"#!/bin/sh\n{script}\n")
        ffmpeg.chmod(0o755)
    line = lines()["ffmpeg"]
    assert reason in line.text and line.is_needed and not line.is_ok


def test_no_ffmpeg_at_all_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", missing)
    assert lines()["ffmpeg"].text == "not found: No ffmpeg exe could be found."


def test_a_machine_that_tells_nothing_of_itself_still_gets_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_cpuinfo", lambda key: [])
    monkeypatch.setattr("shutil.disk_usage", lambda path: (_ for _ in ()).throw(FileNotFoundError(2, "No such file")))
    monkeypatch.setitem(sys.modules, "psutil", None)
    found = lines()
    assert list(found) == NAMES
    assert "not known" in found["flags"].text and "not there (No such file)" in found["disk"].text
    assert not found["memory"].is_ok and found["processor"].is_ok


def test_the_dtype_is_that_of_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "suitable_dtype", lambda device: Precision(torch.bfloat16, "it is fast here"))
    assert lines()["dtype"].text.startswith("bfloat16 on ")
    assert lines()["dtype"].text.endswith(": it is fast here")


@pytest.mark.parametrize(("version", "is_ok"), [((3, 10), False), ((3, 11), True), ((3, 13), True), ((3, 14), False)])
def test_the_pythons_are_those_that_the_package_takes(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], is_ok: bool
) -> None:
    requires = str(importlib.metadata.metadata("pyramid-serve")["Requires-Python"]).split(",")
    assert set(requires) == {">=3.11", "<3.14"}
    monkeypatch.setattr(sys, "version_info", (*version, 0, "final", 0))
    assert lines()["python"].is_ok is is_ok
