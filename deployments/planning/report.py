"""A plan as people and programs read it."""

import json
from dataclasses import dataclass
from statistics import mean
from typing import Any

from deployments.planning.published import (
    GB,
    Card,
    Published,
    decoder_gpu_bytes,
    denoiser_gpu_bytes,
    text_encoder_gpu_bytes,
)
from deployments.planning.sizing import Sized
from deployments.planning.stage_times import StageTimes

_PROGRESS_A_SECOND = 2.0
"""Updates to claims of each running video: the denoiser tells of its steps every half second."""
_UPDATES_A_UNIT = 4
"""Beside those: latents made, latents saved, frames decoded, frames saved."""
CLAIMS_UPDATES_A_SECOND = 350
"""What one core takes (``python -m benchmarks.claims``, docs/planning.md); claims has no more."""


@dataclass(frozen=True)
class Needs:
    """What a replica of each part takes of its card, in bytes."""

    text_encoder: float
    denoiser: float
    decoder: float

    def problems(self, card: Card, *, share_one: bool) -> list[str]:
        """Each part that the card is too small for; or that it is so for all of them, where they share one."""
        if share_one:
            together = sum(vars(self).values())
            too_many = f"all pools take {together / GB:.0f} GB of a card that has {card.num_bytes / GB:.0f}"
            return [too_many] if together > card.num_bytes else []
        return [
            f"{name} takes {num_bytes / GB:.0f} GB of a card that has {card.num_bytes / GB:.0f}"
            for name, num_bytes in vars(self).items()
            if num_bytes > card.num_bytes
        ]


def needs_of(published: Published, *, memory_budget_bytes: float, max_batch_size: int | None) -> Needs:
    """What replicas of a model take with these settings of the decoder."""
    return Needs(
        text_encoder_gpu_bytes(published),
        denoiser_gpu_bytes(published),
        decoder_gpu_bytes(published, memory_budget_bytes=memory_budget_bytes, max_batch_size=max_batch_size),
    )


@dataclass(frozen=True)
class Report:
    """A plan, with what it rests on."""

    model: str
    times: StageTimes
    sized: Sized
    gpu: str | None
    needs: Needs | None
    """None for a model whose memory is not known."""
    memory_problems: tuple[str, ...]
    price_per_gpu_hour: float | None
    knows_text: bool
    """Whether the times say anything of prompts that are not cached."""

    @property
    def gpu_seconds(self) -> float:
        """Of all cards together, whether they compute or not, for each video."""
        return self.sized.num_gpus / self.sized.demand.videos_per_s

    @property
    def updates_per_s(self) -> float:
        """What claims hears from running videos."""
        num_units = mean(len(kind.units) for kind in self.sized.demand.kinds)
        of_units = _UPDATES_A_UNIT * num_units * self.sized.demand.videos_per_s
        return _PROGRESS_A_SECOND * self.sized.mean_running + of_units

    def fields(self) -> dict[str, Any]:
        """The figures by name, in seconds where nothing else is said."""
        sized, layout = self.sized, self.sized.layout
        replicas = {
            "TextEncoder": layout.num_text_encoders,
            "Denoiser": layout.num_denoisers,
            "Decoder": layout.num_decoders,
        }
        fields: dict[str, Any] = {
            "model": self.model,
            "videos": [kind.name for kind in sized.demand.kinds],
            "stage_times": self.times.source,
            "videos_per_minute": 60 * sized.demand.videos_per_s,
            "latency_p95_asked_for": sized.demand.latency_p95_s,
            "is_fast_enough": sized.is_fast_enough,
            "gpu": self.gpu,
            "num_gpus": sized.num_gpus,
            "pools": {
                name: {
                    "replicas": replicas[name],
                    "busy_share": sized.text_busy_share if name == "TextEncoder" else pool.busy_share,
                    "mean_pack": pool.mean_pack,
                }
                for name, pool in sized.simulated.pools.items()
            },
            "orchestrator_cores": layout.num_save_cores,
            "orchestrator_busy_share": sized.simulated.save_busy_share,
            "max_running": layout.max_running,
            "mean_running": sized.mean_running,
            "updates_to_claims_per_s": self.updates_per_s,
            "rebuilt_units": sized.simulated.num_rebuilt,
            "gpu_seconds_per_video": self.gpu_seconds,
        }
        for name, of in (("queue_wait", sized.wait), ("first_frame", sized.first_frame), ("latency", sized.latency)):
            fields |= {f"{name}_p50": of(0.5), f"{name}_p95": of(0.95)}
        if self.price_per_gpu_hour is not None:
            fields["cost_per_video"] = self.gpu_seconds * self.price_per_gpu_hour / 3600
        fields["memory_bytes"] = None if self.needs is None else vars(self.needs)
        fields["memory_problems"] = list(self.memory_problems)
        return fields

    def to_json(self) -> str:
        return json.dumps(self.fields(), indent=1)

    def to_text(self) -> str:
        """The figures for people."""
        f = self.fields()
        lines = [
            f"{self.model}, {', '.join(f['videos'])}: {f['videos_per_minute']:.3g} videos a minute",
            f"Stage times: {self.times.source}",
            "",
            f"{'pool':<12} {'replicas':>8} {'busy':>5} {'in a forward':>12}",
        ]
        for name, pool in f["pools"].items():
            lines.append(f"{name:<12} {pool['replicas']:8} {pool['busy_share']:5.0%} {pool['mean_pack']:12.1f}")
        cores, share = f["orchestrator_cores"], f["orchestrator_busy_share"]
        lines.append(f"{'Orchestrator':<12} {cores:8} {share:5.0%}   (a core each)")
        lines += [
            f"{f['num_gpus']} GPUs" + (f" ({self.gpu})" if self.gpu else ", one for each replica of the first three"),
            "",
            f"{'seconds':<12} {'p50':>8} {'p95':>8}",
        ]
        for name in ("queue_wait", "first_frame", "latency"):
            lines.append(f"{name.replace('_', ' '):<12} {f[f'{name}_p50']:8.2f} {f[f'{name}_p95']:8.2f}")
        lines += ["", f"{f['gpu_seconds_per_video']:.1f} GPU-seconds a video"]
        if "cost_per_video" in f:
            lines[-1] += f", {f['cost_per_video']:.4g} of the currency of the price"
        lines.append(
            f"{f['mean_running']:.1f} videos at once; max_running {f['max_running']}; claims hears "
            f"{f['updates_to_claims_per_s']:.0f} updates a second"
        )
        if self.updates_per_s > CLAIMS_UPDATES_A_SECOND:
            lines.append(
                f"Claims takes about {CLAIMS_UPDATES_A_SECOND} updates a second, so this is more than one app can do: "
                "divide it among apps with a storage each (docs/planning.md)"
            )
        if self.needs is None:
            lines.append("Memory: not known of this model")
        elif self.gpu is not None:
            lines += [f"Memory: {problem}" for problem in self.memory_problems] or [
                "Memory: every replica fits its card"
            ]
        if f["rebuilt_units"]:
            lines.append(f"{f['rebuilt_units']} units were decoded again: decoders remember too few videos")
        if not self.knows_text:
            lines.append("The text pool is not sized: bench sends one prompt, which is cached after the first video")
        if not f["is_fast_enough"]:
            lines.append(f"Too slow: {f['latency_p95_asked_for']:.3g} s were asked for")
        return "\n".join(lines)
