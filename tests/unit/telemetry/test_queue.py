import time

import pytest

from deployments.telemetry.queue import QueueMetrics
from tests.unit.metrics_at_hand import Told


def test_a_sweep_tells_how_the_queue_stands_and_when(told: Told) -> None:
    metrics = QueueMetrics(max_queued=50)
    metrics.swept(num_queued=3, num_in_progress=2, oldest_queued_at=time.time() - 40, num_unreadable=1)
    values = {name: told.of(f"pyramid_serve_{name}") for name in ("videos_queued", "videos_in_progress")}
    assert values == {"videos_queued": [3], "videos_in_progress": [2]}
    assert told.of("pyramid_serve_videos_queued_limit") == [50]
    assert told.of("pyramid_serve_records_unreadable") == [1]
    assert told.of("pyramid_serve_oldest_queued_seconds") == [pytest.approx(40, abs=5)]
    assert told.of("pyramid_serve_sweep_timestamp_seconds") == [pytest.approx(time.time(), abs=5)]


def test_nobody_is_the_oldest_of_an_empty_queue(told: Told) -> None:
    QueueMetrics(max_queued=50).swept(num_queued=0, num_in_progress=0, oldest_queued_at=None, num_unreadable=0)
    assert told.of("pyramid_serve_oldest_queued_seconds") == [0.0]


def test_outcomes_are_counted_apart(told: Told) -> None:
    metrics = QueueMetrics(max_queued=50)
    for outcome in ("completed", "server_error", "completed"):
        metrics.ended(outcome)
    assert told.of("pyramid_serve_videos", outcome="completed") == [1, 1]
    assert told.of("pyramid_serve_videos", outcome="server_error") == [1]
