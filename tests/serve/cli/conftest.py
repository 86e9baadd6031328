"""What the tests of the client share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments import cli
from deployments.cli import server as http_client
from tests.serve.local_server import LocalServer, serve_locally


@pytest.fixture
def in_a_hurry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, with a client that loses its patience at once."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"_PATIENCE_S": 0.0, "_CALL_S": 1.0, "_IDLE_S": 0.5, "_PREVIEW_S": 1.0}.items():
        monkeypatch.setattr(http_client, name, value)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with serve_locally(str(tmp_path_factory.mktemp("storage")), unit_seconds=0.02) as server:
        yield server


@pytest.fixture
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Said:
    """What a command printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], server: LocalServer) -> None:
        self._capsys = capsys
        self._server = server

    def __call__(self, *arguments: str | Path, status: int = 0) -> str:
        """Standard output of a command that succeeds, standard error of one that does not."""
        assert cli.main([*map(str, arguments), "--url", self._server.url]) == status
        captured = self._capsys.readouterr()
        return captured.err if status else captured.out


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], server: LocalServer) -> Said:
    return Said(capsys, server)
