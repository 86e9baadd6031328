"""The folders that Ray leaves behind, one for each time it was started: logs, mostly, which nobody else removes."""

import json
import os
import re
import shutil
from pathlib import Path

import psutil

_MARK = "pyramid_serve_session.json"
_SESSION = re.compile(r"session_\d{4}-\d\d-\d\d_[\d_-]+")
_NUM_KEPT = 5
"""Logs of the last runs may still be wanted."""


def mark_session(session: Path) -> None:
    """Note in a session's folder that this process has started it."""
    process = psutil.Process()
    (session / _MARK).write_text(json.dumps({"pid": process.pid, "started": process.create_time()}))


def remove_old_sessions(root: Path) -> int:
    """Remove all but the last five folders of sessions that this user's earlier runs have left; how many those were.

    Only folders with a mark, whose process is gone, and that no running process names, are touched.
    """
    over = sorted((folder for folder in root.glob("session_*") if _is_over(folder)), key=lambda folder: folder.name)
    commands = _commands()
    unused = [folder for folder in over[:-_NUM_KEPT] if not any(folder.name in command for command in commands)]
    for folder in unused:
        shutil.rmtree(folder, ignore_errors=True)
    return sum(not folder.exists() for folder in unused)


def _is_over(folder: Path) -> bool:
    """Whether a folder is of a session that a process of this project and user has started, which is gone."""
    try:
        if not _SESSION.fullmatch(folder.name) or folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return False
        mark = json.loads((folder / _MARK).read_text())
        pid, started = int(mark["pid"]), float(mark["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    try:
        return bool(abs(psutil.Process(pid).create_time() - started) > 1.0)  # the number has been used again
    except psutil.NoSuchProcess:
        return True


def _commands() -> list[str]:
    return [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
