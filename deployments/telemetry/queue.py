"""What claims measures about the queue, for dashboards and alerts."""

import time

from ray.serve import metrics


class QueueMetrics:
    """The metrics of the claims replica. The gauges show how things stood at its last sweep."""

    def __init__(self, *, max_queued: int) -> None:
        """max_queued: how many videos may wait."""
        self._max_queued = max_queued
        self._outcomes = metrics.Counter(
            "pyramid_serve_videos", description="Videos by how they ended.", tag_keys=("outcome",)
        )
        self._queued = metrics.Gauge("pyramid_serve_videos_queued", description="Videos that wait for a denoiser.")
        self._limit = metrics.Gauge("pyramid_serve_videos_queued_limit", description="Videos that may wait at most.")
        self._in_progress = metrics.Gauge("pyramid_serve_videos_in_progress", description="Videos that are being made.")
        self._oldest = metrics.Gauge(
            "pyramid_serve_oldest_queued_seconds",
            description="Seconds since the acceptance of the oldest video that waits for a denoiser; 0 if none waits.",
        )
        self._unreadable = metrics.Gauge("pyramid_serve_records_unreadable", description="Records that cannot be read.")
        self._swept = metrics.Gauge(
            "pyramid_serve_sweep_timestamp_seconds",
            description="Unix time at which claims last looked after all videos, as it does every second or so.",
        )

    def ended(self, outcome: str) -> None:
        """A video has ended. outcome: ``completed``, ``cancelled`` or an error's code."""
        self._outcomes.inc(tags={"outcome": outcome})

    def swept(
        self, *, num_queued: int, num_in_progress: int, oldest_queued_at: float | None, num_unreadable: int
    ) -> None:
        """A sweep was done, which found so many videos. oldest_queued_at: unix seconds, None if none waits."""
        now = time.time()
        self._queued.set(num_queued)
        self._limit.set(self._max_queued)
        self._in_progress.set(num_in_progress)
        self._oldest.set(0.0 if oldest_queued_at is None else max(now - oldest_queued_at, 0.0))
        self._unreadable.set(num_unreadable)
        self._swept.set(now)
