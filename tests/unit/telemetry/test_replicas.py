from deployments.telemetry.forwards import EngineStats, Forward
from deployments.telemetry.replicas import ForwardMetrics
from tests.unit.metrics_at_hand import Told


def test_busy_seconds_grow_by_what_the_thread_worked_since_the_last_forward(told: Told) -> None:
    metrics = ForwardMetrics()
    forward = Forward(num_slots=2, num_tokens=10, started=0.0, ended=1.0)
    for busy_seconds in (1.5, 1.5, 4.0):
        metrics.record(forward, EngineStats(busy_seconds=busy_seconds))
    assert told.of("pyramid_serve_busy_seconds") == [1.5, 2.5]
    assert told.of("pyramid_serve_slots") == [2, 2, 2]
