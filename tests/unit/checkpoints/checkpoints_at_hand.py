"""Folders that look like checkpoints, for tests."""

import json
from pathlib import Path
from typing import Any


def write_checkpoint(folder: Path, *names: str, config: dict[str, Any] | None = None) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config or {}))
    return folder
