from collections.abc import Iterator

import pytest

from deployments.http.answer_schema import VIDEO_EXAMPLE
from tests.serve.local_server import LocalServer, serve_locally


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with serve_locally(str(tmp_path_factory.mktemp("storage")), unit_seconds=0.05) as server:
        yield server


def test_every_field_of_a_video_is_in_the_openapi_document(server: LocalServer) -> None:
    schema = server.client.get("/openapi.json").json()["components"]["schemas"]["Video"]
    video = server.finish(server.submit(seconds="0.04"))
    assert list(schema["properties"]) == list(video)
    assert list(VIDEO_EXAMPLE) == list(video)
