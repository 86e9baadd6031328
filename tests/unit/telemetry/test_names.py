"""The names of metrics: those that alerts, dashboard and documentation know are those that the code has."""

import re
from pathlib import Path

import pytest
import yaml

from deployments.telemetry.queue import QueueMetrics
from deployments.telemetry.replicas import CallMetrics, ForwardMetrics, StateMetrics
from deployments.telemetry.storage import StorageMetrics
from deployments.telemetry.videos import VideoMetrics
from pyramid_serve.served_model import ServedModels
from tests.serve.local_server import MODEL
from tests.unit.metrics_at_hand import Told
from tools.dashboard.panels import ROWS

ROOT = Path(__file__).parents[3]
SUFFIXES = {"Counter": ["_total"], "Gauge": [""], "Histogram": ["_bucket", "_count"]}


@pytest.fixture
def kinds(told: Told) -> dict[str, str]:
    """The kind of each metric that there is, by name."""
    QueueMetrics(max_queued=1)
    VideoMetrics(ServedModels((MODEL,)))
    for metrics in (CallMetrics, ForwardMetrics, StateMetrics, StorageMetrics):
        metrics()
    return told.kinds


def exported(kinds: dict[str, str]) -> set[str]:
    """The names as Prometheus has them. No sums of histograms, which Ray only estimates."""
    return {f"ray_{name}{suffix}" for name, kind in kinds.items() for suffix in SUFFIXES[kind]}


def test_alerts_and_panels_ask_for_metrics_that_exist(kinds: dict[str, str]) -> None:
    alerts = yaml.safe_load((ROOT / "k8s/components/monitoring/alerts.yaml").read_text())["spec"]["groups"][0]["rules"]
    expressions = [rule["expr"] for rule in alerts]
    expressions += [query.expr for row in ROWS for panel in row.panels for query in panel.queries]
    asked = set(re.findall(r"\bray_pyramid_serve_\w+", " ".join(expressions)))
    assert len(asked) > 15
    assert asked <= exported(kinds)


def test_no_other_module_makes_metrics() -> None:
    files = [file for file in (ROOT / "deployments").rglob("*.py") if "telemetry" not in file.parts]
    assert [file for file in files if re.search(r"metrics\.(Counter|Gauge|Histogram)\(", file.read_text())] == []


def test_the_documentation_lists_every_metric_and_its_kind(kinds: dict[str, str]) -> None:
    section = (ROOT / "docs/operations.md").read_text().split("\n## Metrics\n")[1].split("\n## ")[0]
    told: dict[str, str] = {}
    for row in re.findall(r"^\| (`pyramid_serve.*)$", section, re.MULTILINE):
        names, its_kinds = (cell.strip() for cell in row.split(" | ")[:2])
        found = re.findall(r"`(\w+)`", names)
        stem = found[0].rpartition("_")[0]
        full = [name if name.startswith("pyramid_serve") else stem + name for name in found]
        each = its_kinds.split(", ")
        told |= dict(zip(full, each if len(each) == len(full) else each * len(full), strict=True))
    assert told == {name: kind.lower() for name, kind in kinds.items()}
