"""One app for all tests of this folder, with the tiny checkpoint of miniFLUX."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.app import AppConfig, build
from pyramid_serve.api import VideoRequest
from pyramid_serve.storage import VideoStore
from tests.serve.conftest import QUICK, deployed

Handle = DeploymentHandle[Any]
APP = "pipeline"


def config_of(checkpoint: Path, storage: Path) -> AppConfig:
    pools: dict[str, Any] = {name: {**QUICK} for name in ("text_encoder", "denoiser", "decoder")}
    pools["orchestrator"] = {**QUICK, "settings": {"heartbeat_s": 0.3}}
    # Tests write records behind its back; it looks for such every 10 s unless told otherwise.
    pools["claims"] = {**QUICK, "settings": {"rescan_interval_s": 0.5}}
    return AppConfig.model_validate(
        {"model": {"source": str(checkpoint), "name": "mini", "dtype": "float32"}, "storage": str(storage), **pools}
    )


def request_of(
    seed: int = 1, *, seconds: float = 1, steps: int = 2, size: str = "128x64", **fields: Any
) -> VideoRequest:
    return VideoRequest(
        prompt=f"a red ball, {seed}",
        seed=seed,
        size=size,
        seconds=seconds,
        num_inference_steps=(steps,) * 3,
        video_num_inference_steps=(steps,) * 3,
        **fields,
    )


@pytest.fixture(scope="package")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="package")
def store(storage: Path) -> VideoStore:
    return VideoStore(str(storage))


@pytest.fixture(scope="package")
def handle(local_ray: None, miniflux: Path, storage: Path) -> Iterator[Handle]:
    with deployed(build(config_of(miniflux, storage)), APP):
        yield serve.get_deployment_handle("Orchestrator", APP)
