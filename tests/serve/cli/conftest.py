"""What the tests of the client share."""

from pathlib import Path

import pytest

from deployments.cli import server as http_client


@pytest.fixture
def in_a_hurry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, with a client that loses its patience at once."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"_PATIENCE_S": 0.0, "_CALL_S": 1.0, "_IDLE_S": 0.5, "_PREVIEW_S": 1.0}.items():
        monkeypatch.setattr(http_client, name, value)
