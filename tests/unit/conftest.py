"""What tests of several rooms share."""

import pytest
from ray.serve import metrics

from tests.unit.metrics_at_hand import Told, kept_metric


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """What is told to the metrics that are made while the test runs."""
    told = Told()
    for kind, method in (("Counter", "inc"), ("Gauge", "set"), ("Histogram", "observe")):
        monkeypatch.setattr(metrics, kind, kept_metric(told, kind, method))
    return told
