"""Clusters of several nodes on this machine, whose processes are killed by the tests that started them."""

import asyncio
import os
import random
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import imageio_ffmpeg
import numpy
import pytest
import ray
from numpy.typing import NDArray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client

from deployments.app import AppConfig, build
from deployments.client import Client
from deployments.local.cluster import start_ray
from pyramid_serve.api import Plan, Stage, Status, VideoRecord, VideoRequest
from pyramid_serve.media.fragments import encode_fragment, join_fragments
from pyramid_serve.pyramid_flow.pipeline import PyramidFlow, VideoInput
from pyramid_serve.pyramid_flow.planned import video_settings
from pyramid_serve.storage import VideoFile, VideoStore

ROOT = Path(__file__).parents[2]
APP = "pyramid"
STORE_BYTES = 80_000_000
WIDTH, HEIGHT = 128, 64
LEASE_S = 10.0
"""Longer than any process here is silent without being dead."""

Frames = NDArray[numpy.uint8]


class Replica(NamedTuple):
    """A replica of the app: its deployment, its process and the node that it is on."""

    deployment: str
    name: str
    pid: int
    node_id: str


def cluster_of(*pools: str) -> AbstractContextManager[Cluster]:
    """A cluster with a head in the pool ``front``, and a node for each of ``pools``; the driver is connected to it."""
    return cluster_with({"num_cpus": 16, "labels": {"pool": "front"}}, [node_of(pool) for pool in pools])


def node_of(pool: str) -> dict[str, Any]:
    return {"num_cpus": 16, "num_gpus": 1, "labels": {"pool": pool}}


@contextmanager
def cluster_with(head: dict[str, Any], nodes: Sequence[dict[str, Any]]) -> Iterator[Cluster]:
    """A cluster with these nodes, each what ``ray start`` takes; the driver is connected to it."""
    assert not ray.is_initialized(), "tests of clusters run before those that keep a Ray for the session"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    head = {
        **head,
        "include_dashboard": False,
        "object_store_memory": STORE_BYTES,
        "_system_config": {"health_check_period_ms": 500, "health_check_failure_threshold": 4},
    }
    cluster = start_ray(lambda: start_cluster(head, nodes))
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        serve.start(proxy_location="Disabled")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def start_cluster(head: dict[str, Any], nodes: Sequence[dict[str, Any]]) -> Cluster:
    """The cluster's nodes, all up."""
    cluster = Cluster()
    try:
        cluster.add_node(**head)
        for node in nodes:
            add_node(cluster, node)
        cluster.wait_for_nodes()
    except Exception:
        cluster.shutdown()
        raise
    return cluster


def add_node(cluster: Cluster, node: dict[str, Any]) -> Any:
    return cluster.add_node(**node, object_store_memory=STORE_BYTES, wait=False)


def config_of(checkpoint: Path, storage: Path, *, num_replicas: int = 1, **options: Any) -> AppConfig:
    """Every deployment in its own node pool; text encoder, orchestrator and claims in ``front``."""

    def pool(name: str, **more: Any) -> dict[str, Any]:
        return {
            "ray_actor_options": {"num_cpus": 0, "label_selector": {"pool": name}},
            "graceful_shutdown_wait_loop_s": 0.05,
            "graceful_shutdown_timeout_s": 1.0,
            "health_check_period_s": 1.0,
            "health_check_timeout_s": 20.0,
            **more,
        }

    pools = {
        "text_encoder": pool("front"),
        "denoiser": pool("denoiser", num_replicas=num_replicas),
        "decoder": pool("decoder", num_replicas=num_replicas),
        "orchestrator": pool("front", num_replicas=num_replicas, settings={"heartbeat_s": 0.5}),
        "ingress": pool("front"),
        "claims": pool("front", settings={"lease_s": LEASE_S, "sweep_interval_s": 0.5}),
    }
    model = {"source": str(checkpoint), "name": "mini"}
    return AppConfig.model_validate(
        {"model": model, "storage": str(storage), **{name: {**pools[name], **options.get(name, {})} for name in pools}}
    )


def deploy(config: AppConfig) -> Client:
    serve.run(build(config), name=APP, route_prefix=None)
    return Client.connect(APP)


def replicas(*deployments: str) -> list[Replica]:
    """The running replicas of these deployments, or of all."""
    serve_client = _get_global_client()
    assert serve_client is not None
    details: Any = ray.get(serve_client._controller.get_serve_instance_details.remote())
    return [
        Replica(name, replica["replica_id"], replica["pid"], replica["node_id"])
        for name, deployment in details["applications"][APP]["deployments"].items()
        for replica in deployment["replicas"]
        if replica["state"] == "RUNNING" and (not deployments or name in deployments)
    ]


def kill(replica: Replica) -> None:
    """``kill -9``. The pid is that of an actor of this test's own cluster."""
    os.kill(replica.pid, signal.SIGKILL)


def kill_random(generator: random.Random, *deployments: str) -> Replica | None:
    running = sorted(replicas(*deployments))
    if not running:
        return None
    chosen = generator.choice(running)
    try:
        kill(chosen)
    except ProcessLookupError:
        return None  # it was still listed
    return chosen


# --- videos ---------------------------------------------------------------------------------------------------------


def request_of(seed: int, *, seconds: float = 1.3, steps: int = 6) -> VideoRequest:
    return VideoRequest(
        prompt=f"a red ball, {seed}",
        seed=seed,
        size=f"{WIDTH}x{HEIGHT}",
        seconds=seconds,
        num_inference_steps=(steps,) * 3,
        video_num_inference_steps=(steps,) * 3,
    )


class Expected(NamedTuple):
    """A video as the library makes it: its latents (16, T, h, w), and its file."""

    latents: NDArray[numpy.float32]
    file: bytes


class Undisturbed:
    """What the library makes of requests in one process: what every disturbed video must be, too."""

    def __init__(self, checkpoint: Path) -> None:
        self._pipeline = PyramidFlow.from_pretrained(checkpoint)
        self._made: dict[str, Expected] = {}

    def video(self, plan: Plan) -> Expected:
        key = plan.model_dump_json()
        if key not in self._made:
            settings = video_settings(plan)
            latents = self._pipeline.generate_latents([VideoInput(plan.prompt, seed=plan.seed)], settings)
            units = enumerate(self._pipeline.decode(latents))
            fragments = [
                encode_fragment(frames[0].numpy(), index=unit, first_frame=plan.num_frames_before(unit), fps=plan.fps)
                for unit, frames in units
            ]
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "video.mp4"
                join_fragments(fragments, path)
                self._made[key] = Expected(latents[0].numpy(), path.read_bytes())
        return self._made[key]


def decode(file: bytes) -> Frames:
    arguments = ["-v", "error", "-i", "pipe:0", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *arguments], input=file, capture_output=True, check=True)
    return numpy.frombuffer(done.stdout, numpy.uint8).reshape(-1, HEIGHT, WIDTH, 3)


def check(record: VideoRecord, store: VideoStore, undisturbed: Undisturbed) -> None:
    """The video is done, and is what it would have been, bit for bit."""
    assert record.status is Status.COMPLETED, record.error
    expected = undisturbed.video(record.plan)
    latents = numpy.concatenate(store.files.load_latents(record.id), axis=1)
    assert numpy.array_equal(latents, expected.latents)
    made = store.files.fetch(record.id, VideoFile.VIDEO)
    assert made == expected.file
    stream = b"".join(store.files.load_fragment(record.id, unit) for unit in range(record.plan.num_units))
    assert numpy.array_equal(decode(stream), decode(made))
    assert record.num_units_done == record.num_units_denoised == record.plan.num_units


def times_made(record: VideoRecord, stage: Stage) -> list[int]:
    """How often each unit was made."""
    units = [entry.unit for entry in record.timeline if entry.stage is stage]
    return [units.count(unit) for unit in range(record.plan.num_units)]


async def until_units_done(client: Client, video_id: str, num_units: int, *, timeout_s: float = 60) -> VideoRecord:
    async with asyncio.timeout(timeout_s):
        while True:
            record = (await client.get(video_id)).record
            if record.num_units_done >= num_units or record.is_over:
                return record
            await asyncio.sleep(0.05)


@pytest.fixture(scope="session")
def undisturbed(miniflux: Path) -> Undisturbed:
    return Undisturbed(miniflux)
