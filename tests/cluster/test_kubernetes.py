"""The Serve configuration of ``k8s/overlays/pools`` on Ray nodes with the labels and resources that its pods have."""

import asyncio
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from deployments.client import Client
from deployments.config import AppConfig
from pyramid_serve.api import Stage
from pyramid_serve.storage import VideoStore
from tests.cluster.conftest import (
    Replica,
    Undisturbed,
    add_node,
    check,
    cluster_with,
    deploy,
    replicas,
    request_of,
    times_made,
    until_units_done,
)
from tests.k8s.manifests_at_hand import Group, Manifests, build

pytestmark = [pytest.mark.asyncio, pytest.mark.slow]

POOLS = {"TextEncoder": "text", "Denoiser": "denoise", "Decoder": "decode"}


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> Manifests:
    if shutil.which("kubectl") is None:
        pytest.skip('no kubectl; pip install -e ".[kubectl]" brings one')
    return build("pools", (), tmp_path_factory.mktemp("overlay"))


def node_like(group: Group) -> dict[str, Any]:
    """A Ray node as KubeRay starts it in a pod of this group."""
    return {
        "num_cpus": int(group.limit("cpu")),
        "num_gpus": int(group.limit("nvidia.com/gpu")),
        "labels": dict(group.spec["labels"]),
    }


@pytest.fixture(scope="module")
def cluster(manifests: Manifests) -> Iterator[Cluster]:
    """Each group has as many pods as it starts with; the head has no CPU."""
    head = {"num_cpus": int(manifests.head.spec["resources"]["CPU"]), "labels": dict(manifests.head.spec["labels"])}
    nodes = [node_like(group) for group in manifests.workers for _ in range(group.spec["replicas"])]
    with cluster_with(head, nodes) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> VideoStore:
    return VideoStore(str(tmp_path_factory.mktemp("videos")))


@pytest.fixture(scope="module")
def client(cluster: Cluster, manifests: Manifests, miniflux: Path, store: VideoStore) -> Client:
    """The app of the overlay, with a tiny model, and without what only its pods have: the bucket and the keys."""
    args = manifests.serve_config["applications"][0]["args"]
    (model,) = args["models"]
    model |= {"source": str(miniflux), "variant": None, "name": "mini"}
    for pool in ("denoiser", "decoder"):
        del model[pool]["settings"]["warm_up_size"]
    del args["ingress"]["settings"]["api_keys_folder"]
    return deploy(AppConfig.model_validate({**args, "storage": store.root}))


def pools_of_nodes() -> dict[str, str]:
    return {node["NodeID"]: node["Labels"]["pool"] for node in ray.nodes() if node["Alive"]}


async def with_another_pod(cluster: Cluster, group: Group, *, timeout_s: float = 90) -> None:
    """What the autoscaler does for replicas that have no place."""
    node = add_node(cluster, node_like(group))
    async with asyncio.timeout(timeout_s):
        while node.node_id not in pools_of_nodes():
            await asyncio.sleep(0.2)


def drain(cluster: Cluster, replica: Replica, *, seconds: float) -> None:
    """What Ray does in a pod that is told to go, with ``seconds`` until its processes end."""
    is_accepted, reason = GcsClient(address=cluster.address).drain_node(
        replica.node_id,
        DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "this test",
        int((time.time() + seconds) * 1000),
    )
    assert is_accepted, reason


async def until_gone(replica: Replica, *, timeout_s: float = 90) -> None:
    """The node of a replica is gone, and another replica is there."""
    async with asyncio.timeout(timeout_s):
        while replica.node_id in pools_of_nodes() or not replicas(replica.deployment):
            await asyncio.sleep(0.5)


async def test_every_replica_is_on_a_node_of_its_pool(client: Client) -> None:
    pools = pools_of_nodes()
    placed = {(replica.deployment, pools[replica.node_id]) for replica in replicas()}
    assert placed == {*POOLS.items(), ("Ingress", "api"), ("Orchestrator", "api"), ("Claims", "api")}
    for name in ("Ingress", "Orchestrator"):
        assert len({replica.node_id for replica in replicas(name)}) == 2


@pytest.mark.parametrize("deployment", ["Denoiser", "Decoder"])
async def test_a_drained_node_of_a_pool_loses_no_video_and_at_most_one_unit(
    cluster: Cluster,
    manifests: Manifests,
    client: Client,
    store: VideoStore,
    undisturbed: Undisturbed,
    deployment: str,
) -> None:
    (group,) = manifests.workers_of(POOLS[deployment])
    await with_another_pod(cluster, group)
    record = await client.submit(request_of(1, seconds=3, steps=20))
    await until_units_done(client, record.id, 1, timeout_s=180)
    (drained,) = replicas(deployment)
    drain(cluster, drained, seconds=60)
    async with asyncio.timeout(180):
        record = await client.wait(record.id)
    check(record, store, undisturbed)
    stage = Stage.DENOISE if deployment == "Denoiser" else Stage.DECODE
    assert sum(times_made(record, stage)) <= record.plan.num_units + 1
    assert record.attempts == 1
    await until_gone(drained)


async def test_a_drained_node_of_an_orchestrator_loses_no_video(
    cluster: Cluster, manifests: Manifests, client: Client, store: VideoStore, undisturbed: Undisturbed
) -> None:
    (group,) = manifests.workers_of("api")
    await with_another_pod(cluster, group)
    record = await client.submit(request_of(2, seconds=3, steps=20))
    record = await until_units_done(client, record.id, 1, timeout_s=180)
    (drained,) = (replica for replica in replicas("Orchestrator") if replica.name == record.owner)
    drain(cluster, drained, seconds=60)
    async with asyncio.timeout(180):
        record = await client.wait(record.id)
    check(record, store, undisturbed)
    # The next attempt makes again what was under way: a unit, and one more whose latents were not saved yet.
    assert sum(times_made(record, Stage.DENOISE)) <= record.plan.num_units + 2
    assert record.attempts <= 2
    await until_gone(drained)
