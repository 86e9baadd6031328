"""The overlay that ``pyramid-serve plan --write`` writes keeps the rules, and has the replicas of the plan."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from deployments.planning.overlay import Overlay
from deployments.planning.simulation import Layout
from tests.k8s.manifests_at_hand import K8S, Manifests
from tests.k8s.rules import operator, pods, serve, times
from tests.k8s.rules.schemas import Schemas

LAYOUT = Layout(num_text_encoders=2, num_denoisers=12, num_decoders=5, num_save_cores=3, max_running=70)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Manifests:
    if shutil.which("kubectl") is None:
        pytest.skip('no kubectl; pip install -e ".[kubectl]" brings one')
    folder = tmp_path_factory.mktemp("overlay") / "planned"
    Overlay.read(K8S / "overlays" / "pools").write(
        folder, LAYOUT, model="rain1011/pyramid-flow-sd3", variant="768p", family=None, default_size=(1280, 768)
    )
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Manifests(list(yaml.safe_load_all(done.stdout)))


def test_it_keeps_every_rule(planned: Manifests, schemas: Schemas) -> None:
    problems = [
        *schemas.problems(planned),
        *operator.problems(planned),
        *pods.problems(planned),
        *serve.problems(planned),
        *times.problems(planned),
        *times.way_in_problems(planned),
    ]
    assert problems == []


def test_every_pool_has_the_replicas_of_the_plan_and_a_pod_for_each(planned: Manifests) -> None:
    counts = {"api": 3, "text": 2, "denoise": 12, "decode": 5}
    for group in planned.workers:
        spec = group.spec
        assert (spec["replicas"], spec["minReplicas"], spec["maxReplicas"]) == (counts[group.name],) * 3
    args = planned.serve_config["applications"][0]["args"]
    (model,) = args["models"]
    assert (model["source"], model["variant"]) == ("rain1011/pyramid-flow-sd3", "768p")
    for pool, count in (("text_encoder", 2), ("denoiser", 12), ("decoder", 5)):
        scaling = model[pool]["autoscaling_config"]
        assert (scaling["min_replicas"], scaling["max_replicas"]) == (count, count)
        assert scaling["downscale_delay_s"] == 600
    assert args["orchestrator"]["num_replicas"] == 3
    assert args["claims"]["settings"]["max_running"] == 70
    assert args["claims"]["settings"]["lease_s"] == 15.0


def test_the_configuration_beside_it_is_the_one_in_the_cluster(tmp_path: Path) -> None:
    overlay = Overlay.read(K8S / "overlays" / "pools")
    overlay.write(
        tmp_path,
        LAYOUT,
        model="rain1011/pyramid-flow-miniflux",
        variant="768p",
        family=None,
        default_size=(1280, 768),
    )
    beside = yaml.safe_load((tmp_path / "serve_config.yaml").read_text())
    patched = yaml.safe_load((tmp_path / "serve.yaml").read_text())["spec"]["serveConfigV2"]
    assert yaml.safe_load(patched) == beside
    assert beside["applications"][0]["args"]["models"][0]["name"] == "miniflux"
