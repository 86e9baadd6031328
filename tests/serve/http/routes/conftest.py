"""A server with invented videos, and one of them."""

from collections.abc import Iterator

import pytest

from tests.serve.local_server import LocalServer, serve_locally


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with serve_locally(str(tmp_path_factory.mktemp("storage")), unit_seconds=0.05) as server:
        yield server


@pytest.fixture(scope="module")
def finished(server: LocalServer) -> str:
    """The id of a finished video of 4 units."""
    return str(server.finish(server.submit())["id"])
