"""``pyramid-serve bench``: how fast the app is, compared with the library's plain loop over the same videos.

Everything is computed from the records (timelines) and the totals that replicas keep; the clocks of all nodes must
agree.
"""

import asyncio
import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

from ray import serve

from deployments.client import Client
from deployments.config import ModelOptions
from deployments.telemetry.forwards import ReplicaStats
from deployments.telemetry.timelines import StageSeconds, handover_seconds, hidden_share, stage_seconds
from pyramid_serve.api import Plan, Status, VideoRecord, VideoRequest
from pyramid_serve.families import family_of

POOLS = ("TextEncoder", "Denoiser", "Decoder")
"""Of the first model. There is no Decoder where decoding runs in the denoiser's replicas."""
_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class PoolUse:
    """What one deployment did during a level: the share of time that its replicas computed, and units per forward."""

    num_replicas: int
    busy_share: float
    mean_pack: float
    mean_tokens: float


@dataclass(frozen=True)
class Level:
    """The figures of one level of concurrency. Times are in seconds."""

    concurrency: int
    wall: float
    videos_per_minute: float
    latency_p50: float
    latency_p95: float
    time_to_first_frame: float
    """Median, from the acceptance of a video to its first frame that can be watched."""
    real_time_factor: float
    """Wall time divided by the length of all videos together; below 1 is faster than watching them."""
    decode_hidden: float | None
    """Mean share of the decoding time, without the last unit, during which a later unit of the video was denoised."""
    transfer_bytes: int
    """Bytes of tensors that one video sends between deployments: histories, latents and frames."""
    transfer_seconds: float
    """Median over videos of the time between the end of a unit at a denoiser and the start of the next, summed."""
    pools: Mapping[str, PoolUse]
    stages: StageSeconds


@dataclass(frozen=True)
class Loop:
    """The figures of the plain loop: the videos of the largest level one after another, each written as an MP4."""

    num_videos: int
    wall: float
    videos_per_minute: float
    seconds_per_video: float


@dataclass(frozen=True)
class Report:
    """The figures of a bench."""

    model: str
    size: str
    num_frames: int
    num_steps: int
    loop: Loop
    levels: tuple[Level, ...]
    plan: Plan
    """Of the first video."""

    def to_json(self) -> str:
        fields = {name: value for name, value in vars(self).items() if name not in ("loop", "levels", "plan")}
        fields |= {"loop": asdict(self.loop), "levels": [asdict(level) for level in self.levels]}
        return json.dumps({**fields, "plan": self.plan.model_dump(mode="json")}, indent=1)

    def to_text(self) -> str:
        """A table for people."""
        pools = [name for name in POOLS if all(name in level.pools for level in self.levels)]
        lines = [
            f"{self.model}: {self.num_frames} frames of {self.size}, {self.num_steps} steps",
            f"plain loop: {self.loop.seconds_per_video:.2f} s a video, {self.loop.videos_per_minute:.2f} videos/min",
            "",
            f"{'at once':>7} {'videos/min':>10} {'of loop':>7} {'p50 s':>7} {'p95 s':>7} {'first s':>7} "
            f"{'RTF':>5} {'hidden':>6} {'pack':>5} {'busy: ' + '/'.join(pools):>31} {'MB':>6} {'handover s':>10}",
        ]
        for level in self.levels:
            busy = "/".join(f"{level.pools[name].busy_share:.0%}" for name in pools)
            hidden = "-" if level.decode_hidden is None else f"{level.decode_hidden:.0%}"
            lines.append(
                f"{level.concurrency:7} {level.videos_per_minute:10.2f} "
                f"{level.videos_per_minute / self.loop.videos_per_minute:6.2f}x {level.latency_p50:7.2f} "
                f"{level.latency_p95:7.2f} {level.time_to_first_frame:7.2f} {level.real_time_factor:5.2f} {hidden:>6} "
                f"{level.pools['Denoiser'].mean_pack:5.1f} {busy:>31} {level.transfer_bytes / 1e6:6.1f} "
                f"{level.transfer_seconds:10.2f}"
            )
        return "\n".join(lines)


def run_bench(request: VideoRequest, *, app: str, model: ModelOptions, levels: Sequence[int]) -> Report:
    """Measure an app in the Ray cluster that this process is connected to. Raises ``RuntimeError`` if a video fails.

    request: its seed is that of the first video, and counts up from there. model: the model that the app serves, which
    the plain loop loads. levels: numbers of videos at once.
    """
    return asyncio.run(_measure(request, app=app, model=model, levels=levels))


async def _measure(request: VideoRequest, *, app: str, model: ModelOptions, levels: Sequence[int]) -> Report:
    client = Client.connect(app)
    requests = _requests(request, max(levels))
    plan = (await _make_all(client, requests[:1]))[0].plan  # warms up every deployment, and has the defaults
    measured = tuple([await _measure_level(client, app, requests[:level]) for level in levels])
    loop = await asyncio.to_thread(_run_loop, [plan.model_copy(update={"seed": r.seed}) for r in requests], model)
    return Report(
        model=plan.model,
        size=plan.size,
        num_frames=plan.num_frames,
        num_steps=plan.num_steps,
        loop=loop,
        levels=measured,
        plan=plan,
    )


def _requests(request: VideoRequest, num_videos: int) -> list[VideoRequest]:
    first = request.seed or 0
    return [request.model_copy(update={"seed": first + index}) for index in range(num_videos)]


async def _make_all(client: Client, requests: Sequence[VideoRequest]) -> list[VideoRecord]:
    records = list(await asyncio.gather(*map(client.generate, requests)))
    for record in records:
        if record.status is not Status.COMPLETED:
            raise RuntimeError(f"{record.id} failed: {record.error}")
    return records


async def _measure_level(client: Client, app: str, requests: Sequence[VideoRequest]) -> Level:
    deployed = serve.status().applications[app].deployments
    before = {name: await _pool_stats(name, app) for name in POOLS if name in deployed}
    started = time.perf_counter()
    records = await _make_all(client, requests)
    wall = time.perf_counter() - started
    after = {name: await _pool_stats(name, app) for name in before}
    latencies = sorted((record.completed_at or 0) - record.created_at for record in records)
    hidden = [share for record in records if (share := hidden_share(record.timeline)) is not None]
    firsts = [record.first_frame_at - record.created_at for record in records if record.first_frame_at is not None]
    plan = records[0].plan
    return Level(
        concurrency=len(requests),
        wall=wall,
        videos_per_minute=60 * len(records) / wall,
        latency_p50=statistics.median(latencies),
        latency_p95=latencies[min(int(0.95 * len(latencies)), len(latencies) - 1)],
        time_to_first_frame=statistics.median(firsts),
        real_time_factor=wall / (len(records) * plan.num_frames / plan.fps),
        decode_hidden=statistics.mean(hidden) if hidden else None,
        transfer_bytes=_transfer_bytes(plan),
        transfer_seconds=statistics.median(handover_seconds(record.timeline) for record in records),
        pools={name: _pool_use(before[name], after[name], wall) for name in before},
        stages=stage_seconds(records),
    )


async def _pool_stats(name: str, app: str) -> dict[str, ReplicaStats]:
    responses = serve.get_deployment_handle(name, app).broadcast("stats")
    found: list[ReplicaStats] = await responses.results_async(timeout_s=10.0)
    return {stats.replica: stats for stats in found}


def _pool_use(before: Mapping[str, ReplicaStats], after: Mapping[str, ReplicaStats], wall: float) -> PoolUse:
    """What replicas did between two readings of their totals. For a replica that is new, all that it did."""

    def total(name: str) -> float:
        earlier = sum(float(getattr(stats, name)) for replica, stats in before.items() if replica in after)
        return sum(float(getattr(stats, name)) for stats in after.values()) - earlier

    num_forwards = total("num_forwards")
    return PoolUse(
        num_replicas=len(after),
        busy_share=total("busy_seconds") / (wall * max(len(after), 1)),
        mean_pack=total("num_slots") / num_forwards if num_forwards else 0.0,
        mean_tokens=total("num_tokens") / num_forwards if num_forwards else 0.0,
    )


def _transfer_bytes(plan: Plan) -> int:
    """Tensors of one video that go between deployments: to the denoiser each unit's history, back its latents; to the
    decoder the latents, back the frames."""
    latents = [math.prod(plan.unit(unit).latent_shape) * _FLOAT32_BYTES for unit in range(plan.num_units)]
    histories = sum(accumulate(latents[:-1]))
    return histories + 2 * sum(latents) + plan.num_frames * plan.width * plan.height * 3


def _run_loop(plans: Sequence[Plan], model: ModelOptions) -> Loop:
    from transformers.utils import logging as transformers_logging

    from pyramid_serve.media.writers import write_video

    transformers_logging.disable_progress_bar()
    family = family_of(model.source, model.family)
    pipeline = family.load_pipeline(
        model.source, variant=model.variant, dtype=model.dtype, device="cpu", options=family.pipeline_options()
    )

    def make(plan: Plan, folder: str) -> None:
        write_video(pipeline.stream(plan), Path(folder, "video.mp4"), fps=plan.fps)

    with tempfile.TemporaryDirectory() as folder:
        make(plans[0], folder)  # warm
        started = time.perf_counter()
        for plan in plans:
            make(plan, folder)
        wall = time.perf_counter() - started
    return Loop(
        num_videos=len(plans),
        wall=wall,
        videos_per_minute=60 * len(plans) / wall,
        seconds_per_video=wall / len(plans),
    )


def parse_levels(text: str) -> list[int]:
    """The levels in a text like ``1,2,4,8``. Raises ``ValueError``."""
    levels = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(levels) < 1:
        raise ValueError(f"--concurrency {text}: must be whole numbers of at least 1, like 1,2,4,8")
    return levels
