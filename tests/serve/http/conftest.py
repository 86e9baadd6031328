"""A server that refuses what the tests of a module send."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.http.body import BodyLimits
from deployments.http.config import HttpConfig
from tests.serve.local_server import LocalServer, serve_locally

BODY = BodyLimits(max_bytes=600_000, discard_timeout_s=1.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A server with small limits. At the end of the module it must not have accepted any request."""
    root = tmp_path_factory.mktemp("storage")
    Path(root, "videos").mkdir()
    (root.parent / "secret").write_text("not to be read")
    with serve_locally(str(root), http=HttpConfig(body=BODY)) as server:
        yield server
        # Nothing was accepted, and the server goes on.
        assert server.client.get("/v1/videos").json()["data"] == []
        assert server.client.get("/readyz").status_code == 200
        assert server.finish(server.submit())["status"] == "completed"
