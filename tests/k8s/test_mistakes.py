"""Mistakes planted in the manifests, each of which must be caught and named."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from tests.k8s.manifests_at_hand import Manifests
from tests.k8s.rules import operator, pods, serve, times
from tests.k8s.rules.schemas import Schemas

EVERYTHING = "pools with everything"


class Mistake(NamedTuple):
    what: str
    plant: Callable[[Manifests], Any]
    said: str
    """A part of what must be said of it."""
    overlay: str = EVERYTHING


def spec(m: Manifests) -> Any:
    return m.service["spec"]


def cluster(m: Manifests) -> Any:
    return spec(m)["rayClusterConfig"]


def head(m: Manifests) -> Any:
    return cluster(m)["headGroupSpec"]


def group(m: Manifests, name: str) -> Any:
    (found,) = (each for each in cluster(m)["workerGroupSpecs"] if each["groupName"] == name)
    return found


def pod(each: Any) -> Any:
    return each["template"]["spec"]


def ray(each: Any) -> Any:
    return pod(each)["containers"][0]


def limit(each: Any, resource: str, value: str) -> None:
    for kind in ("requests", "limits"):
        ray(each)["resources"][kind][resource] = value


def env(each: Any, name: str, value: str) -> None:
    entries = ray(each)["env"]
    entries[:] = [entry for entry in entries if entry["name"] != name] + [{"name": name, "value": value}]


def without_port(m: Manifests, name: str) -> None:
    ports = ray(head(m))["ports"]
    ports[:] = [port for port in ports if port["name"] != name]


def in_serve_config(old: str, new: str) -> Callable[[Manifests], None]:
    def plant(m: Manifests) -> None:
        text = spec(m)["serveConfigV2"]
        assert old in text
        spec(m)["serveConfigV2"] = text.replace(old, new, 1)

    return plant


def annotate(m: Manifests, key: str, value: str) -> None:
    m.all("Ingress")[0]["metadata"]["annotations"][f"nginx.ingress.kubernetes.io/{key}"] = value


def route(m: Manifests) -> Any:
    return m.all("HTTPRoute")[0]["spec"]["rules"][0]


DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"

BY_THE_CRD = [
    Mistake(
        "a typo in a key of a group",
        lambda m: group(m, "text").update(maxReplica=2),
        "'maxReplica' was unexpected",
    ),
    Mistake(
        "a typo in a key of a container",
        lambda m: ray(group(m, "text")).update(volumeMount=[]),
        "'volumeMount' was unexpected",
    ),
    Mistake("a number as text", lambda m: group(m, "text").update(maxReplicas="2"), "is not of type 'integer'"),
]

MISTAKES = [
    # --- schemas ---
    Mistake(
        "a typo in a core kind",
        lambda m: m.find("Service", "pyramid-serve")["spec"].update(selectors={}),
        "'selectors' was unexpected",
    ),
    Mistake("a route's timeout misspelt", lambda m: route(m).update(timeout={}), "timeout: Extra inputs"),
    Mistake(
        "an alert without its expression",
        lambda m: m.find("PrometheusRule", "pyramid-serve")["spec"]["groups"][0]["rules"][0].pop("expr"),
        "expr: Field required",
    ),
    Mistake(
        "a time of an alert misspelt",
        lambda m: m.find("PrometheusRule", "pyramid-serve")["spec"]["groups"][0]["rules"][0].update({"for": "10min"}),
        "for: String should match pattern",
    ),
    # --- KubeRay ---
    Mistake("a long name", lambda m: m.service["metadata"].update(name="p" * 48), "at most 47 characters"),
    Mistake("rayStartParams left out", lambda m: head(m).pop("rayStartParams"), "rayStartParams is written"),
    Mistake(
        "resources given twice",
        lambda m: head(m)["rayStartParams"].update({"num-cpus": "0"}),
        "resources are in rayStartParams or in resources, not in both",
    ),
    Mistake(
        "labels among the start parameters",
        lambda m: group(m, "text")["rayStartParams"].update(labels="pool=text"),
        "labels of Ray nodes are in labels",
    ),
    Mistake(
        "minReplicas left out", lambda m: group(m, "text").pop("minReplicas"), "minReplicas and maxReplicas are written"
    ),
    Mistake("min above max", lambda m: group(m, "text").update(minReplicas=3), "minReplicas is at most maxReplicas"),
    Mistake("two groups of one name", lambda m: group(m, "text").update(groupName="api"), "the names of groups differ"),
    Mistake(
        "autoscaler v1",
        lambda m: cluster(m)["autoscalerOptions"].update(version="v1"),
        "priority of a group needs autoscaler v2",
    ),
    Mistake("an old Ray", lambda m: cluster(m).update(rayVersion="2.50.0"), "authOptions.mode token needs Ray 2.52"),
    Mistake("pods that restart", lambda m: pod(head(m)).update(restartPolicy="Always"), "restartPolicy is Never"),
    Mistake(
        "Redis twice",
        lambda m: env(head(m), "RAY_REDIS_ADDRESS", "redis:6379"),
        "fault tolerance is asked for in gcsFaultToleranceOptions alone",
    ),
    Mistake("an unknown upgrade", lambda m: spec(m)["upgradeStrategy"].update(type="Rolling"), "is one of three"),
    Mistake(
        "a step larger than the surge",
        lambda m: spec(m)["upgradeStrategy"]["clusterUpgradeOptions"].update(stepSizePercent=50),
        "has its four options, within their ranges",
    ),
    Mistake(
        "an incremental upgrade without autoscaling",
        lambda m: cluster(m).update(enableInTreeAutoscaling=False),
        "an incremental upgrade needs autoscaling",
    ),
    Mistake("a field behind a gate", lambda m: cluster(m).update(networkPolicy={}), "need feature gates"),
    # --- pods ---
    Mistake("no port named serve", lambda m: without_port(m, "serve"), "the head has no port 8000 named serve"),
    Mistake("no port of the dashboard", lambda m: without_port(m, "dashboard"), "no port 8265 named dashboard"),
    Mistake("replicas on the head", lambda m: head(m).pop("resources"), "replicas may be placed there"),
    Mistake("an open dashboard", lambda m: cluster(m).pop("authOptions"), "the dashboard is open"),
    Mistake(
        "another Ray in the image", lambda m: ray(head(m)).update(image="x:1-ray2.59.0"), "does not name Ray 2.60.0"
    ),
    Mistake(
        "one pool of another release",
        lambda m: ray(group(m, "text")).update(image="pyramid-serve:0.0.9-ray2.60.0"),
        "Ray pods have different images",
    ),
    Mistake("a moving tag", lambda m: ray(group(m, "text")).update(image="pyramid-serve:latest"), "has no fixed tag"),
    Mistake(
        "a budget for nobody",
        lambda m: m.find("PodDisruptionBudget", "pyramid-serve-text")["spec"]["selector"]["matchLabels"].update(
            pool="txt"
        ),
        "group text: no PodDisruptionBudget selects its pods",
    ),
    Mistake(
        "clients on GPU pods",
        lambda m: m.find("Service", "pyramid-serve")["spec"]["selector"].pop("pool"),
        "must select the api pods alone",
    ),
    Mistake(
        "a volume that nobody makes",
        lambda m: m.objects.remove(m.find("PersistentVolumeClaim", "pyramid-serve-models")),  # type: ignore[attr-defined]
        "no PersistentVolumeClaim pyramid-serve-models",
    ),
    Mistake(
        "a secret in the environment",
        lambda m: env(group(m, "api"), "HF_TOKEN", "hf_x"),
        "a secret is in the manifests",
    ),
    Mistake("no memory limit", lambda m: ray(group(m, "text"))["resources"]["limits"].pop("memory"), "limit of memory"),
    Mistake(
        "no toleration", lambda m: pod(group(m, "decode")).update(tolerations=[]), "do not tolerate the taint of GPU"
    ),
    Mistake(
        "a hook that stops Ray",
        lambda m: ray(group(m, "denoise")).update(lifecycle={"preStop": {"exec": {"command": ["ray", "stop"]}}}),
        "a preStop hook comes before the drain",
    ),
    Mistake("root", lambda m: pod(group(m, "api"))["securityContext"].update(runAsNonRoot=False), "runs as root"),
    Mistake(
        "an object store as large as the pod",
        lambda m: group(m, "api")["rayStartParams"].update({"object-store-memory": "8589934592"}),
        "takes more than half of the memory limit",
    ),
    Mistake(
        "a monitor of a port that is not there",
        lambda m: without_port(m, "as-metrics"),
        "PodMonitor pyramid-serve-head: group head has no port as-metrics",
    ),
    # --- Serve ---
    Mistake("HeadOnly", in_serve_config("EveryNode", "HeadOnly"), "proxy_location must be EveryNode"),
    Mistake("a typo in Serve's part", in_serve_config("http_options", "http_option"), "did you mean http_options?"),
    Mistake(
        "a typo in our part", in_serve_config("lease_s: 15.0", "lease: 15.0"), "claims.settings.lease: unknown key"
    ),
    Mistake(
        "a typo in the autoscaling",
        in_serve_config("downscale_delay_s", "downscale_delays"),
        "downscale_delays: unknown key",
    ),
    Mistake(
        "keys in the configuration",
        in_serve_config("api_keys_folder: /etc/pyramid-serve/api-keys", "api_keys: [x]"),
        "a secret is in the Serve configuration",
    ),
    Mistake(
        "a pool that is not there", in_serve_config("pool: text", "pool: texts"), "no group has the label pool: texts"
    ),
    Mistake(
        "no pool",
        in_serve_config("num_cpus: 0.5, label_selector: { pool: api }", "num_cpus: 0.5"),
        "Claims: without a label_selector",
    ),
    Mistake("too many replicas", in_serve_config("max_replicas: 8", "max_replicas: 9"), "maxReplicas is too small"),
    Mistake("a group too large", lambda m: group(m, "decode").update(maxReplicas=5), "more than its replicas can use"),
    Mistake(
        "a group without GPUs",
        lambda m: limit(group(m, "decode"), "nvidia.com/gpu", "0"),
        "Decoder: a replica does not fit",
    ),
    Mistake("too few CPUs", lambda m: limit(group(m, "decode"), "cpu", "1"), "Decoder: a replica does not fit"),
    Mistake("too little memory", lambda m: limit(group(m, "decode"), "memory", "32Gi"), "group decode: Decoder take"),
    Mistake(
        "a decoder that keeps more than its card has",
        in_serve_config("max_batch_size: 2", "max_batch_size: 4"),
        "of a card that has 47",
    ),
    Mistake(
        "three parts on a card of 24 GB",
        lambda m: pod(group(m, "gpu"))["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
            "nodeSelectorTerms"
        ][0]["matchExpressions"][0].update(values=["22000"]),
        "of a card that has 23",
        "single-gpu",
    ),
    Mistake(
        "a storage that is not mounted",
        in_serve_config("storage: /videos", "storage: /video"),
        "has no volume there",
        "dev",
    ),
    Mistake("a model that is not downloaded", in_serve_config("flow-miniflux", "flow-sd3"), "does not download"),
    # --- times ---
    Mistake(
        "a short grace period",
        lambda m: pod(group(m, "api")).update(terminationGracePeriodSeconds=600),
        "shorter than the grace",
    ),
    Mistake("a short drain", lambda m: env(group(m, "denoise"), DRAIN, "45"), "exceeds the drain of group denoise"),
    Mistake(
        "units cut off",
        in_serve_config("graceful_shutdown_timeout_s: 60 # at least", "graceful_shutdown_timeout_s: 5 # at least"),
        "cuts off a unit",
    ),
    Mistake("videos cut off", lambda m: spec(m).update(rayClusterDeletionDelaySeconds=60), "the longest video takes"),
    Mistake(
        "pods that come and go",
        lambda m: group(m, "denoise").update(idleTimeoutSeconds=60),
        "than a model takes to load",
    ),
    Mistake("nginx gives up", lambda m: annotate(m, "proxy-read-timeout", "60"), "shorter than the longest video"),
    Mistake("nginx holds back", lambda m: annotate(m, "proxy-buffering", "on"), "holds streams back"),
    Mistake("nginx refuses", lambda m: annotate(m, "proxy-body-size", "1m"), "less than the app takes"),
    Mistake("the gateway gives up", lambda m: route(m).update(timeouts={"request": "15s"}), "is cut off"),
]


def problems(manifests: Manifests, schemas: Schemas) -> list[str]:
    found = [*schemas.problems(manifests), *operator.problems(manifests), *pods.problems(manifests)]
    return [*found, *serve.problems(manifests), *times.problems(manifests), *times.way_in_problems(manifests)]


def planted(mistake: Mistake, overlays: dict[str, Manifests]) -> Manifests:
    manifests = Manifests(copy.deepcopy(list(overlays[mistake.overlay].objects)))
    mistake.plant(manifests)
    return manifests


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what)
def test_a_mistake_is_caught_and_named(mistake: Mistake, overlays: dict[str, Manifests], schemas: Schemas) -> None:
    found = problems(planted(mistake, overlays), schemas)
    assert any(mistake.said in problem for problem in found), found


@pytest.mark.parametrize("mistake", BY_THE_CRD, ids=lambda mistake: mistake.what)
def test_a_mistake_is_caught_by_the_schema(mistake: Mistake, overlays: dict[str, Manifests], schemas: Schemas) -> None:
    found = list(schemas.problems(planted(mistake, overlays)))
    assert any(mistake.said in problem for problem in found), found


@pytest.mark.parametrize("overlay", ["dev", "single-gpu", EVERYTHING])
def test_without_mistakes_nothing_is_said(overlay: str, overlays: dict[str, Manifests], schemas: Schemas) -> None:
    assert problems(overlays[overlay], schemas) == []
