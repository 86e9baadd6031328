"""Pools of several replicas, which grow and shrink: the videos are the same, and none is lost."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray import serve
from ray.cluster_utils import Cluster

from pyramid_serve.api import Stage
from pyramid_serve.storage import VideoStore
from tests.cluster.conftest import (
    APP,
    Undisturbed,
    check,
    cluster_of,
    config_of,
    deploy,
    replicas,
    request_of,
    until_units_done,
)

pytestmark = [pytest.mark.asyncio, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with cluster_of("denoiser", "decoder") as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def _deleted(cluster: Cluster) -> Iterator[None]:
    yield
    serve.delete(APP)


async def eventually(condition: Callable[[], bool], *, timeout_s: float = 60) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.2)


async def test_eight_videos_at_once_on_three_replicas_of_each(
    miniflux: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    store = VideoStore(str(tmp_path))
    client = deploy(config_of(miniflux, tmp_path, num_replicas=3))
    records = await asyncio.gather(*(client.generate(request_of(40 + index % 4)) for index in range(8)))
    for record in records:
        check(record, store, undisturbed)
    used = {entry.replica for record in records for entry in record.timeline if entry.stage is Stage.DENOISE}
    assert len(used) == 3


async def test_a_redeploy_that_takes_replicas_away_loses_nothing(
    miniflux: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    store = VideoStore(str(tmp_path))
    client = deploy(config_of(miniflux, tmp_path, num_replicas=2))
    records = [await client.submit(request_of(50 + index, seconds=2)) for index in range(3)]
    await until_units_done(client, records[0].id, 1)
    client = deploy(config_of(miniflux, tmp_path, num_replicas=1, claims={"settings": {"lease_s": 4.0}}))
    for record in records:
        async with asyncio.timeout(120):
            check(await client.wait(record.id), store, undisturbed)


async def test_a_pool_grows_under_load_and_goes_to_zero_after(
    miniflux: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    scaling = {
        "min_replicas": 0,
        "max_replicas": 2,
        "target_ongoing_requests": 1,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 1.0,
        "downscale_to_zero_delay_s": 1.0,
        "metrics_interval_s": 0.5,
        "look_back_period_s": 1.0,
    }
    store = VideoStore(str(tmp_path))
    denoiser = {"num_replicas": None, "autoscaling_config": scaling}
    client = deploy(config_of(miniflux, tmp_path, denoiser=denoiser))
    await eventually(lambda: not replicas("Denoiser"))
    records = [await client.submit(request_of(60 + index, seconds=2, steps=20)) for index in range(4)]
    await eventually(lambda: len(replicas("Denoiser")) == 2)
    for record in records:
        async with asyncio.timeout(120):
            check(await client.wait(record.id), store, undisturbed)
    await eventually(lambda: not replicas("Denoiser"))
