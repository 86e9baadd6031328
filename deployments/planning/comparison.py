"""A bench beside a simulation of the same: so many videos at once, with the times that explain the bench."""

from collections.abc import Sequence
from dataclasses import dataclass

from deployments.planning.bench_times import Bench
from deployments.planning.simulation import Layout, simulate
from deployments.planning.sizing import quantile
from deployments.planning.stage_times import StageTimes, work_of
from pyramid_serve.families import Family


@dataclass(frozen=True)
class Compared:
    """One level of a bench: what was measured, and what is simulated."""

    concurrency: int
    measured_per_minute: float
    simulated_per_minute: float
    measured_p95_s: float
    simulated_p95_s: float
    measured_first_s: float
    """Median, as the simulated one."""
    simulated_first_s: float

    @property
    def throughput_error(self) -> float:
        """Of the simulation, as a share of what was measured."""
        return self.simulated_per_minute / self.measured_per_minute - 1

    @property
    def p95_error(self) -> float:
        return self.simulated_p95_s / self.measured_p95_s - 1


def compare(bench: Bench, times: StageTimes, family: Family, layout: Layout) -> list[Compared]:
    """Every level of a bench, whose videos all begin at once."""
    work = work_of(bench.plan, family, times)
    compared = []
    for level in bench.levels:
        pools = {name: use.num_replicas for name, use in level.pools.items()}
        videos = simulate(
            iter([(0.0, work)] * level.concurrency),
            times,
            Layout(
                num_denoisers=pools["Denoiser"],
                num_decoders=pools["Decoder"],
                max_running=layout.max_running,
                token_budget=layout.token_budget,
                max_slots=layout.max_slots,
                max_batch_size=layout.max_batch_size,
            ),
        ).videos
        last_s = max(video.latency_s for video in videos)
        compared.append(
            Compared(
                concurrency=level.concurrency,
                measured_per_minute=level.videos_per_minute,
                simulated_per_minute=60 * len(videos) / last_s,
                measured_p95_s=level.latency_p95,
                simulated_p95_s=quantile([video.latency_s for video in videos], 0.95),
                measured_first_s=level.time_to_first_frame,
                simulated_first_s=quantile([video.first_frame_s for video in videos], 0.5),
            )
        )
    return compared


def to_text(compared: Sequence[Compared]) -> str:
    """A table for people."""
    lines = [f"{'at once':>7} {'videos/min':>18} {'p95 s':>18} {'first frame s':>15}   (measured, simulated)"]
    for one in compared:
        lines.append(
            f"{one.concurrency:7} {one.measured_per_minute:6.2f} {one.simulated_per_minute:5.2f} "
            f"{one.throughput_error:+4.0%} {one.measured_p95_s:7.2f} {one.simulated_p95_s:5.2f} {one.p95_error:+4.0%} "
            f"{one.measured_first_s:9.2f} {one.simulated_first_s:5.2f}"
        )
    return "\n".join(lines)
