import json
from collections.abc import Iterator

import pytest

from tests.serve.local_server import MODEL, LocalServer, serve_locally


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with serve_locally(str(tmp_path_factory.mktemp("storage")), unit_seconds=0.05) as server:
        yield server


def test_the_openapi_document_has_every_route_with_examples(server: LocalServer) -> None:
    document = server.client.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/videos",
        "/v1/videos/sync",
        "/v1/videos/{video_id}",
        "/v1/videos/{video_id}/cancel",
        "/v1/videos/{video_id}/content",
        "/v1/videos/{video_id}/stream",
        "/v1/videos/{video_id}/events",
        "/v1/models",
        "/v1/models/{model}",
        "/v1/status",
        "/v1/videos/{video_id}/remix",
        "/healthz",
        "/readyz",
    }
    body = document["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "multipart/form-data"}
    for example in body["application/json"]["examples"].values():
        answer = server.client.post("/v1/videos", json=example["value"] | {"seconds": "0.4"})
        assert answer.status_code == 200, answer.text
    assert "HTTPValidationError" not in json.dumps(document)
    assert [path for path, operations in document["paths"].items() if "422" in json.dumps(operations)] == [
        "/v1/videos/sync"
    ]


def test_the_openapi_document_tells_the_limits_of_this_server(server: LocalServer) -> None:
    document = server.client.get("/openapi.json").json()
    for path in ("/v1/videos", "/v1/videos/sync"):
        for body in document["paths"][path]["post"]["requestBody"]["content"].values():
            fields = body["schema"]["properties"]
            assert set(fields) == set(MODEL.known_fields)
            assert fields["prompt"]["maxLength"] == fields["negative_prompt"]["maxLength"] == 500
            assert fields["model"]["enum"] == ["tiny"]
            assert fields["size"]["enum"] == ["128x64", "64x64"]
            assert (fields["width"]["enum"], fields["height"]["enum"]) == ([64, 128], [64])
            assert fields["num_frames"]["maximum"] == 121
            assert "at most 5.042" in fields["seconds"]["description"]
            assert fields["fps"]["enum"] == [24]
            assert (fields["seed"]["minimum"], fields["seed"]["maximum"]) == (-1, 2**64 - 1)
            steps = fields["num_inference_steps"]["oneOf"]
            assert steps[0]["maximum"] == steps[1]["items"]["maximum"] == 100
            assert fields["metadata"]["maxProperties"] == 16
