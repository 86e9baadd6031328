"""A program in the place of ffmpeg, for what the real one does not do on demand."""

from collections.abc import Callable
from pathlib import Path

import imageio_ffmpeg
import pytest


@pytest.fixture
def fake_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Call it with the shell script to run instead of ffmpeg; it gives the file with the process ids of all runs."""

    def install(script: str) -> Path:
        program, pids = tmp_path / "ffmpeg", tmp_path / "pids"
        program.write_text(f"#!/bin/sh\necho $$ >> {pids}\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(program))
        return pids

    return install
