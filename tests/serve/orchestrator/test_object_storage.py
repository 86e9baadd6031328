"""The whole pipeline on Ray Serve, with weights and videos on an object storage that goes wrong now and then."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.app import AppConfig, build
from pyramid_serve.api import Status, VideoRequest
from pyramid_serve.storage import VideoFile, VideoStore
from tests.faulty_proxy import Fault, FaultyProxy, faulty_proxy
from tests.object_storage import bucket_at, client, environment_for, reached_at
from tests.serve.conftest import QUICK, deployed

pytestmark = [pytest.mark.slow, pytest.mark.asyncio]

Handle = DeploymentHandle[Any]
APP = "object-storage"


@pytest.fixture
def proxy(s3_endpoint: str) -> Iterator[FaultyProxy]:
    with faulty_proxy(s3_endpoint) as proxy:
        yield proxy


@pytest.fixture
def root(s3_endpoint: str, proxy: FaultyProxy, miniflux: Path) -> Iterator[str]:
    """A bucket with the checkpoint in it."""
    with bucket_at(s3_endpoint) as root, reached_at(proxy.url):
        for file in [path for path in miniflux.rglob("*") if path.is_file()]:
            key = f"model/{file.relative_to(miniflux)}"
            client(s3_endpoint).put_object(Bucket=root.removeprefix("s3://"), Key=key, Body=file.read_bytes())
        yield root


def config_of(root: str, proxy: FaultyProxy, cache: Path) -> AppConfig:
    variables = {**environment_for(proxy.url), "XDG_CACHE_HOME": str(cache)}
    options = {**QUICK, "ray_actor_options": {"num_cpus": 0, "runtime_env": {"env_vars": variables}}}
    return AppConfig.model_validate(
        {
            "model": {"source": f"{root}/model", "name": "mini", "dtype": "float32"},
            "storage": f"{root}/videos",
            **dict.fromkeys(("text_encoder", "decoder", "orchestrator", "claims", "ingress"), options),
            "denoiser": {**options, "num_replicas": 2},
        }
    )


async def test_videos_are_made_at_their_first_attempt_and_weights_copied_once(
    local_ray: None, root: str, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with deployed(build(config_of(root, proxy, tmp_path)), APP):
        handle: Handle = serve.get_deployment_handle("Orchestrator", APP)
        weights = [request for request in proxy.requests if request.startswith("GET ") and "safetensors" in request]
        assert weights and len(set(weights)) == len(weights)
        proxy.share, proxy.wait_s = 0.2, 2.0

        async def make(seed: int) -> Any:
            request = VideoRequest(
                prompt="a red ball",
                seed=seed,
                size="64x64",
                seconds=1,
                num_inference_steps=(1, 1, 1),
                video_num_inference_steps=(1, 1, 1),
            )
            return await handle.generate.remote(request, f"key {seed}")

        async with asyncio.timeout(240):
            records = await asyncio.gather(*map(make, range(6)))
        proxy.share = 0.0
        store = VideoStore(f"{root}/videos")
        for record in records:
            assert record.status is Status.COMPLETED, record.error
            assert (record.attempts, record.num_failures, record.num_losses) == (1, 0, 0)
            assert store.files.size_of(record.id, VideoFile.VIDEO) > 0
        assert all(proxy.num_faults[fault] > 5 for fault in Fault)
