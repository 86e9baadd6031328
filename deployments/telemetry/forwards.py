"""What the forwards of a replica did: one forward, an engine's totals, and a replica's totals as it tells them."""

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Forward:
    """One forward of a pack: its slots and tokens, and when it ran in unix seconds."""

    num_slots: int
    num_tokens: int
    started: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.started


@dataclass(frozen=True)
class EngineStats:
    """Totals since the engine began, forwards that failed left out, and how it stands now.

    num_slots, num_tokens: summed over the forwards; queue_depth: slots that are in no forward now; token_budget: as it
    is now, which is less than configured for a while after memory ran out.
    """

    num_forwards: int = 0
    num_slots: int = 0
    num_tokens: int = 0
    busy_seconds: float = 0.0
    num_present: int = 0
    queue_depth: int = 0
    token_budget: int | None = None

    @property
    def mean_slots(self) -> float:
        return self.num_slots / self.num_forwards if self.num_forwards else 0.0

    @property
    def mean_tokens(self) -> float:
        return self.num_tokens / self.num_forwards if self.num_forwards else 0.0


@dataclass(frozen=True)
class ReplicaStats:
    """What a replica has done since it started, as totals, so two snapshots give what happened between them.

    at: unix seconds of the snapshot; num_slots: units (Denoiser, Decoder) or prompts (TextEncoder), summed over the
    forwards; busy_seconds: of its compute thread; num_present: calls in work or waiting; queue_depth: those waiting;
    num_memories, memory_bytes: decoder memories kept, those in host memory among them.
    """

    replica: str
    at: float
    num_forwards: int
    num_slots: int
    num_tokens: int
    busy_seconds: float
    num_present: int
    queue_depth: int
    num_memories: int = 0
    memory_bytes: int = 0

    @property
    def mean_slots(self) -> float:
        return self.num_slots / self.num_forwards if self.num_forwards else 0.0

    @property
    def mean_tokens(self) -> float:
        return self.num_tokens / self.num_forwards if self.num_forwards else 0.0


def replica_stats(replica: str, stats: EngineStats) -> ReplicaStats:
    """The totals of a replica's engine at this moment."""
    return ReplicaStats(
        replica=replica,
        at=time.time(),
        num_forwards=stats.num_forwards,
        num_slots=stats.num_slots,
        num_tokens=stats.num_tokens,
        busy_seconds=stats.busy_seconds,
        num_present=stats.num_present,
        queue_depth=stats.queue_depth,
    )
