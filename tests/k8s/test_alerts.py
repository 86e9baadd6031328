"""The alerts: valid, tried out by promtool, and each explained in docs/operations.md."""

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.manifests_at_hand import K8S, ROOT

RULES: dict[str, Any] = yaml.safe_load((K8S / "components" / "monitoring" / "alerts.yaml").read_text())["spec"]
ALERTS: dict[str, dict[str, Any]] = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}
CASES = Path(__file__).with_name("alerts_test.yaml")


@pytest.fixture
def promtool(tmp_path: Path) -> Path:
    """A folder with the rules as Prometheus itself reads them, and the cases, for promtool to work in."""
    if shutil.which("promtool") is None:
        pytest.skip("no promtool; it is in Debian's package prometheus")
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(RULES))
    shutil.copy(CASES, tmp_path)
    return tmp_path


def said_by(*command: str, folder: Path) -> tuple[int, str]:
    done = subprocess.run(["promtool", *command], cwd=folder, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def test_prometheus_takes_the_rules(promtool: Path) -> None:
    status, said = said_by("check", "rules", "alerts.yaml", folder=promtool)
    assert status == 0, said
    assert f"{len(ALERTS)} rules found" in said


def test_alerts_fire_when_they_should_and_not_before(promtool: Path) -> None:
    status, said = said_by("test", "rules", CASES.name, folder=promtool)
    assert status == 0, said


def test_for_each_alert_it_is_tried_that_it_fires_and_that_it_does_not() -> None:
    fires = defaultdict[str, set[bool]](set)
    for test in yaml.safe_load(CASES.read_text())["tests"]:
        for case in test["alert_rule_test"]:
            fires[case["alertname"]].add(bool(case["exp_alerts"]))
    assert fires == {alert: {True, False} for alert in ALERTS}


def test_the_head_is_looked_for_under_the_labels_that_its_monitor_gives() -> None:
    monitors = yaml.safe_load_all((K8S / "components" / "monitoring" / "pod-monitors.yaml").read_text())
    given = {
        (f"videos/{monitor['metadata']['name']}", endpoint["port"])  # as the Prometheus operator names jobs
        for monitor in monitors
        for endpoint in monitor["spec"]["podMetricsEndpoints"]
    }
    asked = re.findall(r'up\{job=~"(.*?)", endpoint="(.*?)"\}', ALERTS["PyramidServeHeadDown"]["expr"])
    assert len(asked) == 2
    for job, endpoint in asked:
        assert [name for name, port in given if re.fullmatch(job, name) and port == endpoint] == [
            "videos/pyramid-serve-head"
        ]


def test_the_runbook_of_each_alert_is_a_heading_that_says_what_it_means_and_what_to_do() -> None:
    documentation = (ROOT / "docs" / "operations.md").read_text()
    for name, rule in ALERTS.items():
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"
        section = re.search(rf"^### {name}\n(.*?)(?=^##)", documentation, re.MULTILINE | re.DOTALL)
        assert section is not None, name
        assert "**What to do:**" in section[1], name
