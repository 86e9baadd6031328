"""A real Prometheus scrapes the running app, and is asked everything that the dashboard and the alerts ask."""

import asyncio
import functools
import math
import operator
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import ray
import yaml
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES
from ray.serve.context import _get_global_client

from deployments.local.cluster import free_port
from pyramid_serve.api import Status
from pyramid_serve.storage import VideoStore
from tests.serve.conftest import ROOT
from tests.serve.orchestrator.conftest import APP, Handle, request_of
from tools.dashboard.grafana import expression
from tools.dashboard.panels import ROWS, Panel

pytestmark = pytest.mark.asyncio

JOB = "test/pyramid-serve-head"
ALERTS: list[dict[str, Any]] = yaml.safe_load((ROOT / "k8s/components/monitoring/alerts.yaml").read_text())["spec"][
    "groups"
]
PANELS = [panel for row in ROWS for panel in row.panels]
FROM_THE_FIRST_EVENT_ON = {
    "ray_pyramid_serve_calls_retried_total",
    "ray_pyramid_serve_out_of_memory_total",
    "ray_pyramid_serve_storage_failures_total",
    "ray_serve_health_check_failures_total",
}
"""Counters that Ray shows only once something has gone wrong."""


class Prometheus:
    """A Prometheus on a port of its own."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=10, trust_env=False)

    def get(self, path: str, **parameters: str) -> Any:
        answer = self._client.get(path, params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def values(self, query: str) -> list[float]:
        """The values of all series that a query gives now."""
        return [float(series["value"][1]) for series in self.get("/api/v1/query", query=query)["result"]]

    @property
    def is_ready(self) -> bool:
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False


def until(condition: Any, *, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def prometheus(handle: Handle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It scrapes the node of the app under the labels that the head's PodMonitor gives, and has the alerts as rules."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no prometheus; it is Debian's package of that name")
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "alerts.yaml").write_text(yaml.safe_dump({"groups": ALERTS}))
    target = f"127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}"
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["alerts.yaml"],
        "scrape_configs": [
            {"job_name": JOB, "static_configs": [{"targets": [target], "labels": {"endpoint": "metrics"}}]}
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    options = {
        "config.file": folder / "prometheus.yml",
        "storage.tsdb.path": folder / "data",
        "web.listen-address": f"127.0.0.1:{port}",
        "log.level": "error",
    }
    process = subprocess.Popen([program, *(f"--{name}={value}" for name, value in options.items())], cwd=folder)
    try:
        server = Prometheus(f"http://127.0.0.1:{port}")
        until(lambda: server.is_ready)
        yield server
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def scraped(prometheus: Prometheus, handle: Handle) -> Prometheus:
    """After a video, and another one during the time over which rates are taken."""
    counts = f'{{__name__=~"ray_pyramid_serve_(videos_total|decode_hidden_share_count)", application="{APP}"}}'
    busy = f'ray_pyramid_serve_busy_seconds_total{{application="{APP}"}}'

    def is_told(num_videos: float, busy_before: list[float]) -> bool:
        """Whether claims, the orchestrator and the three pools have told of what they did."""
        now = prometheus.values(busy)
        is_busy = len(now) == 3 and all(map(operator.ne, now, busy_before or [0.0] * 3))
        return is_busy and sum(prometheus.values(counts)) >= num_videos + 2

    for seed in (1, 2):
        num_videos, busy_before = sum(prometheus.values(counts)), prometheus.values(busy)
        record: Any = handle.generate.remote(request_of(seed)).result()
        assert record.status is Status.COMPLETED, record.error
        until(functools.partial(is_told, num_videos, busy_before))
    return prometheus


async def answered(prometheus: Prometheus, panel: Panel) -> list[list[float]]:
    """What each query of a panel gives, as Grafana asks it for this app."""
    queries = (expression(query.expr, app=f'application="{APP}"', cluster=f'job="{JOB}"') for query in panel.queries)
    return [await asyncio.to_thread(prometheus.values, query.replace("$__rate_interval", "30s")) for query in queries]


@pytest.mark.parametrize("panel", [panel for panel in PANELS if not panel.needs_gpu], ids=lambda panel: panel.title)
async def test_every_query_of_the_dashboard_gives_numbers(scraped: Prometheus, panel: Panel) -> None:
    for values in await answered(scraped, panel):
        assert values and not any(map(math.isnan, values))
        assert all(value >= 0 for value in values)


async def test_the_panels_about_gpus_ask_for_what_ray_reports_of_them() -> None:
    panels = [panel for panel in PANELS if panel.needs_gpu]
    names = re.findall(r"\bray_(\w+)", " ".join(query.expr for panel in panels for query in panel.queries))
    assert names and set(names) <= set(METRICS_GAUGES)


async def test_numbers_are_those_of_the_videos(scraped: Prometheus, store: VideoStore) -> None:
    app = f'application="{APP}"'
    videos = [record for record in map(store.read, store.ids()) if record.status is Status.COMPLETED]
    assert scraped.values(f'ray_pyramid_serve_videos_total{{{app}, outcome="completed"}}') == [len(videos)]
    assert scraped.values(f'sum(ray_pyramid_serve_queue_wait_seconds_count{{{app}, model="mini"}})') == [len(videos)]
    units = f'sum by (stage) (ray_pyramid_serve_stage_seconds_count{{{app}, stage=~"denoise|decode"}})'
    assert scraped.values(units) == [sum(video.plan.num_units for video in videos)] * 2
    (since_sweep,) = scraped.values(f"time() - ray_pyramid_serve_sweep_timestamp_seconds{{{app}}}")
    assert 0 < since_sweep < 30


async def test_every_alert_is_evaluated_on_series_that_exist_and_none_is_raised_in_a_healthy_app(
    scraped: Prometheus,
) -> None:
    names = set(scraped.get("/api/v1/label/__name__/values"))
    (group,) = scraped.get("/api/v1/rules", type="alert")["groups"]
    assert [rule["name"] for rule in group["rules"]] == [rule["alert"] for rule in ALERTS[0]["rules"]]
    for rule in group["rules"]:
        assert rule["health"] == "ok" and rule["state"] != "firing", rule  # pending: other apps of this Ray just ended
        asked = set(re.findall(r"\bray_\w+|\bup\b", rule["query"]))
        assert asked and asked - FROM_THE_FIRST_EVENT_ON <= names, rule["name"]


def pid_of(deployment: str) -> int:
    """The process of a deployment's one replica."""
    client = _get_global_client()
    assert client is not None
    details: Any = ray.get(client._controller.get_serve_instance_details.remote())
    (replica,) = details["applications"][APP]["deployments"][deployment]["replicas"]
    pid: int = replica["pid"]
    return pid


@pytest.mark.slow
async def test_a_replica_that_dies_is_counted_under_the_labels_that_the_alerts_ask_for(
    scraped: Prometheus, handle: Handle
) -> None:
    making = asyncio.ensure_future(handle.generate.remote(request_of(3, seconds=5, steps=10)))
    await asyncio.sleep(2)
    os.kill(pid_of("Denoiser"), signal.SIGKILL)  # of the app that this test's folder started
    record: Any = await making
    assert record.status is Status.COMPLETED and record.num_units_retried > 0, record.error
    causes = f'sum by (cause) (ray_pyramid_serve_calls_retried_total{{application="{APP}"}})'
    died = f'sum(ray_serve_health_check_failures_total{{application="{APP}", deployment="Denoiser"}})'
    await asyncio.to_thread(until, lambda: scraped.values(causes) and scraped.values(died))
    (retried,) = scraped.get("/api/v1/query", query=causes)["result"]
    assert retried["metric"] == {"cause": "replica_lost"}
