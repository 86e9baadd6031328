"""The control process of the head dies and comes back, with its state in a Redis, as in ``k8s/components/redis``."""

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from deployments.local.cluster import free_port
from pyramid_serve.storage import VideoStore
from tests.cluster.conftest import (
    Undisturbed,
    check,
    cluster_of,
    config_of,
    deploy,
    kill,
    replicas,
    request_of,
    until_units_done,
)

pytestmark = [pytest.mark.asyncio, pytest.mark.slow]


@pytest.fixture
def redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Redis of this test alone, which Ray's head is told to use."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("no redis-server; it is Debian's package of that name")
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--appendonly", "yes", "--dir", str(tmp_path)]
    process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    monkeypatch.setenv("RAY_REDIS_ADDRESS", f"127.0.0.1:{port}")
    try:
        yield
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def cluster(redis: None) -> Iterator[Cluster]:
    with cluster_of("denoiser", "decoder") as cluster:
        yield cluster


async def test_videos_go_on_while_the_head_is_away_and_replicas_are_replaced_when_it_is_back(
    cluster: Cluster, miniflux: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    store = VideoStore(str(tmp_path / "videos"))
    client = deploy(config_of(miniflux, Path(store.root)))
    record = await client.submit(request_of(70, seconds=5, steps=40))
    before = await until_units_done(client, record.id, 1, timeout_s=180)
    await asyncio.to_thread(cluster.head_node.kill_gcs_server)
    during = await until_units_done(client, record.id, before.num_units_done + 2, timeout_s=180)
    assert during.num_units_done >= before.num_units_done + 2 and not during.is_over
    await asyncio.to_thread(cluster.head_node.start_gcs_server)
    async with asyncio.timeout(180):
        record = await client.wait(record.id)
    check(record, store, undisturbed)
    assert record.attempts == 1
    (killed,) = replicas("Denoiser")
    kill(killed)
    async with asyncio.timeout(180):
        check(await client.generate(request_of(71)), store, undisturbed)
