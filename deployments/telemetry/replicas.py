"""What replicas report about themselves: metrics for dashboards, and totals for the bench."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ray import serve
from ray.serve import metrics

from deployments.telemetry.forwards import EngineStats, Forward

# Ray's default boundaries jump from 10 s to 60 s.
_SECONDS: list[float] = [0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]
_SIZES: list[float] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64]
_TOKENS: list[float] = [100, 300, 1_000, 3_000, 10_000, 30_000, 100_000, 300_000]


def replica_name() -> str:
    """The name that Serve gave to the replica in which this runs."""
    return serve.get_replica_context().replica_tag


class ForwardMetrics:
    """Measures each forward of a replica: seconds, tokens, and slots, units or prompts in its pack; the queue; how
    long its thread computes, which is the same on a GPU and on a CPU; and when memory runs out.
    """

    def __init__(self) -> None:
        self._seconds = metrics.Histogram(
            "pyramid_serve_forward_seconds", description="Seconds of one forward.", boundaries=_SECONDS
        )
        self._slots = metrics.Histogram(
            "pyramid_serve_forward_slots", description="Slots, units or prompts in one forward.", boundaries=_SIZES
        )
        self._tokens = metrics.Histogram(
            "pyramid_serve_forward_tokens", description="Tokens in one forward.", boundaries=_TOKENS
        )
        # Means are computed from these: Ray estimates the sums of histograms from their buckets.
        self._total_slots = metrics.Counter("pyramid_serve_slots", description="Slots of all forwards together.")
        self._total_tokens = metrics.Counter("pyramid_serve_tokens", description="Tokens of all forwards together.")
        self._queue_depth = metrics.Gauge(
            "pyramid_serve_queue_depth", description="Slots waiting, beside those in the forward."
        )
        self._busy = metrics.Counter(
            "pyramid_serve_busy_seconds", description="Seconds in which the replica's compute thread worked."
        )
        self._out_of_memory = metrics.Counter(
            "pyramid_serve_out_of_memory", description="Forwards for which the device had too little memory."
        )
        self._busy_seconds = 0.0

    def record(self, forward: Forward, stats: EngineStats) -> None:
        """Count a forward. ``stats``: those of the engine after it."""
        self._seconds.observe(forward.seconds)
        self._slots.observe(forward.num_slots)
        self._total_slots.inc(forward.num_slots)
        if forward.num_tokens:  # a text encoder does not count them
            self._tokens.observe(forward.num_tokens)
            self._total_tokens.inc(forward.num_tokens)
        self._queue_depth.set(stats.queue_depth)
        if stats.busy_seconds > self._busy_seconds:
            self._busy.inc(stats.busy_seconds - self._busy_seconds)
            self._busy_seconds = stats.busy_seconds

    def out_of_memory(self) -> None:
        """The device had too little memory for a forward."""
        self._out_of_memory.inc()


class StateMetrics:
    """Counts the states of units that a denoiser was given to go on from."""

    def __init__(self) -> None:
        self._states = metrics.Counter(
            "pyramid_serve_unit_states",
            description="States of units that were to be gone on from.",
            tag_keys=("outcome",),
        )
        self._steps = metrics.Counter(
            "pyramid_serve_steps_restored", description="Steps not made again, since the unit went on from a state."
        )

    def restored(self, num_steps: int) -> None:
        """A unit goes on after so many steps."""
        self._states.inc(tags={"outcome": "restored"})
        self._steps.inc(num_steps)

    def refused(self) -> None:
        """A state was damaged or did not fit."""
        self._states.inc(tags={"outcome": "refused"})


class CallMetrics:
    """Measures each call to a replica, by method: its seconds, waiting included, and how it ended."""

    def __init__(self) -> None:
        self._seconds = metrics.Histogram(
            "pyramid_serve_call_seconds",
            description="Seconds from a call to its result, waiting included.",
            boundaries=_SECONDS,
            tag_keys=("method",),
        )
        self._calls = metrics.Counter(
            "pyramid_serve_calls",
            description="Calls by how they ended.",
            tag_keys=("method", "outcome"),  # type: ignore[arg-type]  # annotated as a tuple of one
        )

    @contextmanager
    def of(self, method: str) -> Iterator[None]:
        """Measure the block as a call of a method."""
        started, outcome = time.perf_counter(), "left"
        try:
            yield
            outcome = "done"
        except Exception:
            outcome = "failed"
            raise
        finally:
            self._calls.inc(tags={"method": method, "outcome": outcome})
            if outcome == "done":
                self._seconds.observe(time.perf_counter() - started, tags={"method": method})
