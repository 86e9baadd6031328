"""Processes and nodes die in the middle of videos. Every accepted video is finished, with the frames it always has."""

import asyncio
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

from deployments.client import Client
from pyramid_serve.api import Stage, Status, VideoRecord
from pyramid_serve.storage import VideoStore
from tests.cluster.conftest import (
    APP,
    LEASE_S,
    Undisturbed,
    add_node,
    check,
    cluster_of,
    config_of,
    deploy,
    kill,
    kill_random,
    node_of,
    replicas,
    request_of,
    times_made,
    until_units_done,
)

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with cluster_of("denoiser", "denoiser", "decoder", "decoder") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> VideoStore:
    return VideoStore(str(tmp_path_factory.mktemp("videos")))


@pytest.fixture(scope="module")
def client(cluster: Cluster, miniflux: Path, store: VideoStore) -> Client:
    return deploy(config_of(miniflux, Path(store.root), num_replicas=2))


async def finished(client: Client, record: VideoRecord) -> VideoRecord:
    async with asyncio.timeout(120):
        return await client.wait(record.id)


@pytest.fixture(autouse=True)
def _whole(client: Client) -> None:
    """Every replica that a test before has killed is replaced."""
    deadline = time.monotonic() + 180
    while len(replicas()) < 9:
        assert time.monotonic() < deadline, replicas()
        time.sleep(0.2)


async def test_replicas_are_in_the_pools_of_their_deployments(client: Client) -> None:
    pools = {node["NodeID"]: node["Labels"]["pool"] for node in ray.nodes() if node["Alive"]}
    expected = {"Denoiser": "denoiser", "Decoder": "decoder"}
    for replica in replicas():
        assert pools[replica.node_id] == expected.get(replica.deployment, "front")


@pytest.mark.parametrize("deployment", ["Denoiser", "Decoder"])
async def test_a_worker_is_killed(client: Client, store: VideoStore, undisturbed: Undisturbed, deployment: str) -> None:
    record = await client.submit(request_of(1))
    record = await until_units_done(client, record.id, 1)
    stage = Stage.DENOISE if deployment == "Denoiser" else Stage.DECODE
    (used, *_) = {entry.replica for entry in record.timeline if entry.stage is stage}
    (victim,) = (replica for replica in replicas(deployment) if replica.name == used)
    kill(victim)
    record = await finished(client, record)
    check(record, store, undisturbed)
    assert times_made(record, stage) == [1] * record.plan.num_units
    assert record.attempts == 1 and record.num_units_retried <= 2


async def test_an_orchestrator_is_killed(client: Client, store: VideoStore, undisturbed: Undisturbed) -> None:
    record = await client.submit(request_of(2, seconds=2, steps=20))
    record = await until_units_done(client, record.id, 2)
    (victim,) = (replica for replica in replicas("Orchestrator") if replica.name == record.owner)
    killed_at = time.time()
    kill(victim)
    record = await finished(client, record)
    check(record, store, undisturbed)
    assert record.attempts == 2
    # Only what was under way is made again: one unit, and one more whose latents were not saved yet.
    assert sum(times_made(record, Stage.DENOISE)) <= record.plan.num_units + 2
    resumed_at = min(entry.end for entry in record.timeline if entry.end > killed_at and entry.stage is Stage.DENOISE)
    assert resumed_at - killed_at < LEASE_S  # its death was noticed, not only its silence


async def test_claims_is_killed(client: Client, store: VideoStore, undisturbed: Undisturbed) -> None:
    records = [await client.submit(request_of(seed)) for seed in (3, 4)]
    await until_units_done(client, records[0].id, 1)
    kill(*replicas("Claims"))
    records += [await client.submit(request_of(5))]
    for record in records:
        done = await finished(client, record)
        check(done, store, undisturbed)
        assert done.attempts == 1


async def test_a_node_is_lost(cluster: Cluster, client: Client, store: VideoStore, undisturbed: Undisturbed) -> None:
    records = [await client.submit(request_of(seed)) for seed in (6, 7)]
    record = await until_units_done(client, records[0].id, 1)
    (used, *_) = {entry.replica for entry in record.timeline if entry.stage is Stage.DENOISE}
    (node_id,) = {replica.node_id for replica in replicas("Denoiser") if replica.name == used}
    (node,) = (node for node in cluster.worker_nodes if node.unique_id and node.node_id == node_id)
    await asyncio.to_thread(cluster.remove_node, node, allow_graceful=False)
    add_node(cluster, node_of("denoiser"))
    for record in records:
        check(await finished(client, record), store, undisturbed)


async def test_a_cancel_frees_every_deployment(client: Client) -> None:
    record = await client.submit(request_of(8, seconds=5, steps=40))
    await until_units_done(client, record.id, 2)
    await client.cancel(record.id)
    denoiser, decoder = (serve.get_deployment_handle(name, APP) for name in ("Denoiser", "Decoder"))
    before = sum(stats.num_forwards for stats in await denoiser.broadcast("stats").results_async())
    await asyncio.sleep(1.0)
    after = await denoiser.broadcast("stats").results_async()
    assert sum(stats.num_forwards for stats in after) - before <= 2
    assert all(stats.num_present == 0 for stats in after)
    for stats in await decoder.broadcast("stats").results_async():
        assert (stats.num_present, stats.num_memories) == (0, 0)
    assert (await client.get(record.id)).record.status is Status.FAILED


async def disturb(
    client: Client, store: VideoStore, undisturbed: Undisturbed, *, num_videos: int, num_kills: int
) -> None:
    """Kill replicas at random while videos are made, until the kills are done; then see that none is lost or twice."""
    generator = random.Random(0)
    known = set(store.ids())
    records = [await client.submit(request_of(100 + index)) for index in range(num_videos)]
    killed: list[str] = []
    while len(killed) < num_kills:
        await asyncio.sleep(generator.uniform(0.3, 1.5))
        victim = kill_random(generator, "Denoiser", "Decoder", "Orchestrator", "Claims", "TextEncoder")
        if victim is not None:
            killed.append(victim.deployment)
        if all([(await client.get(record.id)).record.is_over for record in records]):
            records.append(await client.submit(request_of(100 + len(records) % num_videos)))
    for record in records:
        check(await finished(client, record), store, undisturbed)
    assert set(store.ids()) - known == {record.id for record in records}


async def test_random_kills(client: Client, store: VideoStore, undisturbed: Undisturbed) -> None:
    await disturb(client, store, undisturbed, num_videos=3, num_kills=4)


@pytest.mark.slow
async def test_twenty_random_kills_during_twelve_videos(
    client: Client, store: VideoStore, undisturbed: Undisturbed
) -> None:
    await disturb(client, store, undisturbed, num_videos=12, num_kills=20)
