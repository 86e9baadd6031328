"""Folders of earlier sessions: removed where they are ours and over, and never otherwise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from deployments.local.sessions import mark_session, remove_old_sessions


def session(root: Path, number: int) -> Path:
    folder = root / f"session_2026-01-02_03-04-{number:02}_123456_77"
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "a.log").write_text("a")
    return folder


def marked(root: Path, number: int, *, pid: int = 2**22 + 1, started: float = 1.0) -> Path:
    """The folder of a session whose process is gone, unless one is given."""
    folder = session(root, number)
    mark_session(folder)
    (mark,) = folder.glob("*.json")
    mark.write_text(json.dumps({"pid": pid, "started": started}))
    return folder


def test_the_oldest_of_those_that_are_over_are_removed(tmp_path: Path) -> None:
    folders = [marked(tmp_path, number) for number in range(8)]
    assert remove_old_sessions(tmp_path) == 3
    assert [folder.exists() for folder in folders] == [False] * 3 + [True] * 5
    assert remove_old_sessions(tmp_path) == 0


def test_a_process_with_the_same_number_is_not_the_same_process(tmp_path: Path) -> None:
    folder = marked(tmp_path, 0, pid=os.getpid(), started=1.0)
    for number in range(1, 6):
        marked(tmp_path, number)
    assert remove_old_sessions(tmp_path) == 1
    assert not folder.exists()


def test_what_runs_or_is_not_ours_stays(tmp_path: Path) -> None:
    running = session(tmp_path, 0)
    mark_session(running)
    foreign = session(tmp_path, 1)
    broken = session(tmp_path, 2)
    (broken / "pyramid_serve_session.json").write_text("[1]")
    elsewhere = marked(tmp_path / "elsewhere", 3)
    link = tmp_path / elsewhere.name
    link.symlink_to(elsewhere)
    in_use = marked(tmp_path, 4)
    other_name = marked(tmp_path / "other", 5).rename(tmp_path / "session_latest")
    for number in range(10, 15):
        marked(tmp_path, number)
    code = "import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, str(in_use)], stdin=-1, stdout=-1) as user:
        assert user.stdout is not None
        user.stdout.readline()
        assert remove_old_sessions(tmp_path) == 0
        user.kill()
    for folder in (running, foreign, broken, elsewhere, link, in_use, other_name):
        assert (folder / "logs" / "a.log").exists()
    assert remove_old_sessions(tmp_path) == 1
    assert not in_use.exists()


def test_a_folder_of_another_user_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        marked(tmp_path, number)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert remove_old_sessions(tmp_path) == 0


def test_the_mark_names_this_process(tmp_path: Path) -> None:
    mark_session(tmp_path)
    (mark,) = tmp_path.iterdir()
    assert json.loads(mark.read_text()) == {"pid": os.getpid(), "started": psutil.Process().create_time()}
