"""Kill processes at random while videos are made, and count what was lost, doubled or redone.

``python -m benchmarks.faults`` makes 1,000 short videos with the tiny checkpoint of the tests on a cluster of several
nodes on this machine, under 100 kills (kill -9) of replicas of any deployment, a tenth of them of whole nodes.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from ray.exceptions import RayError

from deployments.client import Client
from pyramid_serve.api import Stage, Status, VideoRecord, VideoRequest
from pyramid_serve.storage import VideoFile, VideoStore
from tests.cluster.conftest import add_node, cluster_of, config_of, deploy, kill_random, node_of, replicas

CHECKPOINT = Path(__file__).parent.parent / "tests" / "golden" / "miniflux" / "checkpoint"
POOLS = ("denoiser", "denoiser", "decoder", "decoder")
NUM_REPLICAS = 9
DEPLOYMENTS = ("Denoiser", "Decoder", "Orchestrator", "Claims", "TextEncoder", "Ingress")


@dataclass
class Kill:
    """A process that was killed, and how long it took until all was well again, in seconds."""

    kind: str
    at: float
    until_next_unit_s: float | None = None
    until_replaced_s: float | None = None


@dataclass
class Run:
    """What happens during the benchmark."""

    ids: list[str] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)
    is_over: bool = False


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--videos", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--unfinished", type=int, default=24, help="videos in work or waiting at any time")
    parser.add_argument("--minutes", type=float, default=60.0, help="no more kills after so long")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, cluster_of(*POOLS) as cluster:
        client = deploy(config_of(CHECKPOINT, Path(folder), num_replicas=2))
        store = VideoStore(folder)
        started = time.monotonic()
        run = asyncio.run(disturbed(client, cluster, given))
        print(f"{given.videos} videos, {len(run.kills)} kills, {time.monotonic() - started:.0f} s")
        records = [store.read(video_id) for video_id in run.ids]
        tell(run, records, store)


async def disturbed(client: Client, cluster: Cluster, given: argparse.Namespace) -> Run:
    run = Run()
    killing = asyncio.create_task(kill_some(run, cluster, given))
    unfinished: set[asyncio.Task[VideoRecord]] = set()
    told_at = time.monotonic()
    while len(run.ids) < given.videos or not killing.done() or unfinished:
        # Once all videos are submitted, more are made for the kills that are left.
        while len(unfinished) < given.unfinished and (len(run.ids) < given.videos or not killing.done()):
            record = await client.submit(request_of(len(run.ids)))
            run.ids.append(record.id)
            unfinished.add(asyncio.create_task(client.wait(record.id)))
        done, unfinished = await asyncio.wait(unfinished, return_when=asyncio.FIRST_COMPLETED, timeout=300)
        if not done:
            print("no video has ended for five minutes")
            break
        for task in done:
            task.result()
        if time.monotonic() - told_at > 30:
            told_at = time.monotonic()
            print(f"{len(run.ids)} videos, {len(run.kills)} kills", flush=True)
    run.is_over = True
    await killing
    return run


def request_of(index: int) -> VideoRequest:
    return VideoRequest(
        prompt=f"a red ball, {index}",
        seed=index,
        size="128x64",
        seconds=1.0,
        num_inference_steps=(1, 1, 1),
        video_num_inference_steps=(1, 1, 1),
    )


async def kill_some(run: Run, cluster: Cluster, given: argparse.Namespace) -> None:
    """Kill one after another, each as soon as the replicas of the one before are there again, at the earliest."""
    generator = random.Random(given.seed)
    until = time.monotonic() + 60 * given.minutes
    while len(run.kills) < given.kills and not run.is_over and time.monotonic() < until:
        await asyncio.sleep(generator.uniform(0.5, 3.0))
        at = time.time()
        clock = time.monotonic()
        if generator.random() < 0.1:
            kind = await lose_node(cluster, generator)
        else:
            victim = await asyncio.to_thread(kill_random, generator, *DEPLOYMENTS)
            kind = None if victim is None else victim.deployment
        if kind is None:
            continue
        kill = Kill(kind, at)
        run.kills.append(kill)
        while await asyncio.to_thread(num_replicas) < NUM_REPLICAS:
            if time.monotonic() - clock > 300:
                print(f"not replaced for five minutes: {kind}")
                return
            await asyncio.sleep(0.2)
        kill.until_replaced_s = time.monotonic() - clock


def num_replicas() -> int:
    """How many replicas run; none while the controller cannot be asked."""
    try:
        return len(replicas())
    except (RayError, KeyError) as error:
        print(f"the controller does not answer: {type(error).__name__}")
        return 0


async def lose_node(cluster: Cluster, generator: random.Random) -> str | None:
    """Remove a node with all its processes, and add another; None if no node is up that can be removed."""
    pools = {node["NodeID"]: node["Labels"]["pool"] for node in ray.nodes() if node["Alive"]}
    nodes = [node for node in cluster.worker_nodes if node.node_id in pools]
    if not nodes:
        return None
    node = generator.choice(sorted(nodes, key=lambda node: str(node.node_id)))
    pool = pools[node.node_id]
    await asyncio.to_thread(cluster.remove_node, node, allow_graceful=False)
    add_node(cluster, node_of(pool))  # on the main thread, for Ray handles signals there
    return f"node of {pool}"


def tell(run: Run, records: Sequence[VideoRecord], store: VideoStore) -> None:
    statuses = Counter(str(record.status) for record in records)
    print("ended:", dict(statuses))
    for record in records:
        if record.error is not None:
            print(record.id, record.error)
    whole = [record for record in records if record.status is Status.COMPLETED]
    assert all(store.files.size_of(record.id, VideoFile.VIDEO) for record in whole)
    print(f"lost: {len(records) - len(whole)}, left unfinished in the storage: {len(store.holds.terms())}")
    print("attempts of a video:", dict(sorted(Counter(record.attempts for record in records).items())))
    for stage in (Stage.DENOISE, Stage.DECODE):
        again = Counter(max(times_again(record, stage), default=0) for record in records)
        total = sum(sum(times_again(record, stage)) for record in records)
        print(f"units finished twice, {stage}: {total}; the same unit at most {max(again)} times more")
    print("calls made again:", sum(record.num_units_retried for record in records))
    ends = sorted(entry.end for record in records for entry in record.timeline if entry.stage is Stage.SAVE)
    by_kind: dict[str, list[Kill]] = defaultdict(list)
    for kill in run.kills:
        after = [end for end in ends if end > kill.at]
        kill.until_next_unit_s = after[0] - kill.at if after else None
        by_kind[kill.kind].append(kill)
    print(f"{'killed':20} {'times':>5} {'replaced after s':>20} {'next unit saved after s':>24}   (median, largest)")
    for kind, kills in sorted(by_kind.items()):
        replaced = [kill.until_replaced_s for kill in kills if kill.until_replaced_s is not None]
        unit = [kill.until_next_unit_s for kill in kills if kill.until_next_unit_s is not None]
        print(f"{kind:20} {len(kills):5} {_two(replaced):>20} {_two(unit):>24}")


def times_again(record: VideoRecord, stage: Stage) -> list[int]:
    """How often each unit was made once more."""
    units = [entry.unit for entry in record.timeline if entry.stage is stage]
    return [max(units.count(unit) - 1, 0) for unit in range(record.plan.num_units)]


def _two(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.1f}, {max(seconds):.1f}" if seconds else "-"


if __name__ == "__main__":
    main()
