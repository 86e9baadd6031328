"""The unmodified ``openai`` SDK as a client."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError, AsyncOpenAI, BadRequestError, ConflictError, NotFoundError, OpenAI, RateLimitError
from PIL import Image

from deployments.claims.config import ClaimsConfig
from tests.serve.http.http_at_hand import png
from tests.serve.local_server import LocalServer, probe, serve_locally

# The SDK says of each of these calls that its vendor retires the service.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with serve_locally(str(tmp_path_factory.mktemp("storage")), unit_seconds=0.02) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: LocalServer) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_it_creates_polls_lists_downloads_and_deletes(client: OpenAI, tmp_path: Path) -> None:
    video = client.videos.create(prompt="a ball", seconds="1", size="128x64")  # type: ignore[arg-type]
    assert video.status in ("queued", "in_progress")
    assert (video.prompt, video.seconds, video.size) == ("a ball", "1", "128x64")
    video = client.videos.poll(video.id)
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    assert client.videos.retrieve(video.id) == video
    assert client.videos.list(limit=1).data == [video]
    client.videos.download_content(video.id).write_to_file(tmp_path / "video.mp4")
    assert probe(tmp_path / "video.mp4") == (25, 128, 64)
    for variant in ("thumbnail", "spritesheet"):
        content = client.videos.download_content(video.id, variant=variant).read()
        assert Image.open(io.BytesIO(content)).format == "WEBP"
    deleted = client.videos.delete(video.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (video.id, "video.deleted", True)
    with pytest.raises(NotFoundError):
        client.videos.retrieve(video.id)


def test_it_sends_a_picture_as_a_file_or_a_data_url(client: OpenAI, tmp_path: Path) -> None:
    (tmp_path / "in.png").write_bytes(png(100, 50))
    url = f"data:image/png;base64,{base64.b64encode(png(100, 50)).decode()}"
    videos = [
        client.videos.create_and_poll(prompt="a", input_reference=tmp_path / "in.png"),
        client.videos.create_and_poll(prompt="a", input_reference=("in.png", png(100, 50), "image/png")),
        client.videos.poll(client.videos.create(prompt="a", extra_body={"input_reference": {"image_url": url}}).id),
    ]
    for video in videos:
        assert video.status == "completed"
        assert video.model_extra and video.model_extra["has_input_reference"] is True


def test_it_sends_our_settings_as_extra_fields(client: OpenAI) -> None:
    extra: dict[str, Any] = {
        "seed": 7,
        "negative_prompt": "blurry",
        "num_inference_steps": [3, 2, 1],
        "video_num_inference_steps": 2,
        "guidance_scale": 2.5,
        "video_guidance_scale": 3,
    }
    extra |= {"user": "me", "metadata": {"scene": "12", "größe": "ü"}}
    video = client.videos.create(prompt="a", extra_body=extra)
    assert video.model_extra is not None
    for name, value in (extra | {"video_num_inference_steps": [2, 2, 2]}).items():
        assert video.model_extra[name] == value


def test_it_sends_what_other_servers_call_otherwise(client: OpenAI) -> None:
    extra = {"width": 64, "height": 64, "num_frames": 49, "fps": 24, "seed": -1, "linear_guidance_alpha": 0.5}
    video = client.videos.create(prompt="a", extra_body=extra)
    assert (video.size, video.seconds) == ("64x64", "2.04")
    assert video.model_extra is not None
    assert video.model_extra["num_frames"] == 49
    assert video.model_extra["linear_guidance_alpha"] == 0.5


def test_it_turns_the_pages(client: OpenAI) -> None:
    made = [client.videos.create(prompt="a", seconds="0.4").id for _ in range(5)]  # type: ignore[arg-type]
    listed = [video.id for video in client.videos.list(limit=2)]
    assert listed[:5] == made[::-1]
    assert [video.id for video in client.videos.list(limit=2, order="asc")] == listed[::-1]
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_its_errors_name_the_field(client: OpenAI, server: LocalServer) -> None:
    with pytest.raises(BadRequestError) as wrong:
        client.videos.create(prompt="a", size="1280x720")
    assert (wrong.value.param, wrong.value.type) == ("size", "invalid_request_error")
    assert "128x64" in wrong.value.message
    with pytest.raises(BadRequestError) as unknown:
        client.videos.create(prompt="a", extra_body={"fps": 30})
    assert unknown.value.param == "fps"
    with pytest.raises(NotFoundError) as other_model:
        client.videos.create(prompt="a", model="sora-2")
    assert (other_model.value.param, other_model.value.code) == ("model", "model_not_found")
    with pytest.raises(NotFoundError):
        client.models.retrieve("sora-2")
    holding = server.submit("hold")
    with pytest.raises(ConflictError):
        client.videos.download_content(holding)
    client.videos.delete(holding)


def test_it_sees_a_cancelled_video_as_failed(client: OpenAI, server: LocalServer) -> None:
    video_id = server.submit("hold")
    server.client.post(f"/v1/videos/{video_id}/cancel")
    video = client.videos.poll(video_id)
    assert video.status == "failed"
    assert video.error is not None
    assert video.error.code == "cancelled"


def test_its_repeated_request_makes_one_video(client: OpenAI) -> None:
    headers = {"Idempotency-Key": "from the SDK"}
    ids = {client.videos.create(prompt="once", extra_headers=headers).id for _ in range(3)}
    assert len(ids) == 1


def test_it_comes_again_when_the_queue_was_full(tmp_path: Path) -> None:
    with serve_locally(str(tmp_path), claims=ClaimsConfig(max_running=1, max_queued=1)) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        holding = server.submit("hold")
        server.until(holding, lambda video: video["status"] == "in_progress")
        waiting = client.videos.create(prompt="a")
        with pytest.raises(RateLimitError) as full:
            client.videos.create(prompt="a")
        assert int(full.value.response.headers["retry-after"]) >= 1
        client.videos.delete(holding)
        assert client.videos.poll(waiting.id).status == "completed"


@pytest.mark.asyncio
async def test_the_async_client_works_too(server: LocalServer) -> None:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        video = await client.videos.create_and_poll(prompt="a", poll_interval_ms=50)
        assert video.status == "completed"
        content = await client.videos.download_content(video.id)
        assert b"moov" in content.read()
        with pytest.raises(APIStatusError):
            await client.videos.create(prompt="")
