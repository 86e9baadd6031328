"""What KubeRay 1.7 refuses a RayService for, beyond the schema of its CRD (its ``validation.go``)."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tests.k8s.manifests_at_hand import Group, Manifests

_DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_DURATION = re.compile(r"[1-9][0-9]*|([0-9.]+(h|ms|m|s))+")
_UPGRADES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
_RESOURCE_PARAMS = {"num-cpus", "num-gpus", "memory", "resources"}
_GATED = {"networkPolicy", "tlsOptions", "historyServerOptions"}
_REDIS_ENV = {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}
_REDIS_PARAMS = {"redis-password", "redis-username"}
_FT_ANNOTATIONS = {"ray.io/ft-enabled", "ray.io/external-storage-namespace"}


def problems(manifests: Manifests) -> Iterator[str]:
    """The sentences of the table that do not hold."""
    for sentence, holds in RULES.items():
        if not holds(manifests):
            yield sentence


def _name(m: Manifests) -> str:
    return str(m.service["metadata"]["name"])


def _annotations(m: Manifests) -> Mapping[str, str]:
    return m.service["metadata"].get("annotations", {})


def _options(m: Manifests) -> Mapping[str, Any]:
    return m.cluster.get("autoscalerOptions", {})


def _is_v2(m: Manifests) -> bool:
    return bool(_options(m).get("version") == "v2")


def _ft(m: Manifests) -> Mapping[str, Any]:
    return m.cluster.get("gcsFaultToleranceOptions", {})


def _auth(m: Manifests) -> Mapping[str, Any]:
    return m.cluster.get("authOptions", {})


def _strategy(m: Manifests) -> Mapping[str, Any]:
    return m.service["spec"].get("upgradeStrategy", {})


def _ray_is_at_least(m: Manifests, minor: int) -> bool:
    version = re.fullmatch(r"(\d+)\.(\d+)\.\d+", str(m.cluster.get("rayVersion", "")))
    return version is not None and (int(version[1]), int(version[2])) >= (2, minor)


def _replicas(group: Group, key: str) -> int:
    return int(group.spec.get(key, 0))


def _labels_are_labels(group: Group) -> bool:
    return all(
        _LABEL_KEY.fullmatch(key) and _LABEL_VALUE.fullmatch(str(value))
        for key, value in group.spec.get("labels", {}).items()
    )


def _is_incremental(m: Manifests) -> bool:
    return bool(_strategy(m).get("type") == "NewClusterWithIncrementalUpgrade")


def _steps_are_in_range(m: Manifests) -> bool:
    options = _strategy(m).get("clusterUpgradeOptions", {})
    surge, step = options.get("maxSurgePercent", 100), options.get("stepSizePercent", -1)
    return bool(0 <= step <= surge <= 100 and options.get("intervalSeconds", 0) > 0 and options.get("gatewayClassName"))


RULES: Mapping[str, Callable[[Manifests], bool]] = {
    "the name of a RayService has at most 47 characters": lambda m: len(_name(m)) <= 47,
    "the name of a RayService is a DNS label that begins with a letter": lambda m: bool(_DNS_LABEL.fullmatch(_name(m))),
    "ray.io/initializing-timeout is a positive duration": lambda m: bool(
        _DURATION.fullmatch(_annotations(m).get("ray.io/initializing-timeout", "1h"))
    ),
    # --- pods ---
    "the head and every group have a container": lambda m: all(group.pod.get("containers") for group in m.groups),
    "rayStartParams is written, if only as {}": lambda m: all("rayStartParams" in group.spec for group in m.groups),
    "resources are in rayStartParams or in resources, not in both": lambda m: (
        not any(group.spec.get("resources") and _RESOURCE_PARAMS & group.start_params.keys() for group in m.groups)
    ),
    "labels of Ray nodes are in labels, not in rayStartParams": lambda m: (
        not any("labels" in group.start_params for group in m.groups)
    ),
    "labels of Ray nodes have the syntax of Kubernetes": lambda m: all(map(_labels_are_labels, m.groups)),
    "the service of the head has no name of its own": lambda m: not m.head.spec.get("headService"),
    # --- numbers of pods ---
    "the names of groups differ": lambda m: len({group.name for group in m.workers}) == len(m.workers),
    "minReplicas and maxReplicas are written": lambda m: all(
        {"minReplicas", "maxReplicas"} <= group.spec.keys() for group in m.workers
    ),
    "no number of replicas is negative": lambda m: all(
        _replicas(group, key) >= 0 for group in m.workers for key in ("replicas", "minReplicas", "maxReplicas")
    ),
    "minReplicas is at most maxReplicas": lambda m: all(
        _replicas(group, "minReplicas") <= _replicas(group, "maxReplicas") for group in m.workers
    ),
    # --- autoscaling ---
    "idleTimeoutSeconds of a group needs autoscaler v2": lambda m: (
        _is_v2(m) or not any("idleTimeoutSeconds" in group.spec for group in m.workers)
    ),
    "no idleTimeoutSeconds is negative": lambda m: all(
        spec.get("idleTimeoutSeconds", 0) >= 0 for spec in (_options(m), *(group.spec for group in m.workers))
    ),
    "priority of a group needs autoscaler v2 and Ray 2.56": lambda m: (
        (_is_v2(m) and _ray_is_at_least(m, 56)) or not any(group.spec.get("priority") for group in m.workers)
    ),
    "autoscalerOptions.version and RAY_enable_autoscaler_v2 are not both given": lambda m: (
        not ("version" in _options(m) and "RAY_enable_autoscaler_v2" in m.head.env)
    ),
    "with autoscaler v2 restartPolicy is Never or left out": lambda m: (
        not _is_v2(m) or all(group.pod.get("restartPolicy", "Never") == "Never" for group in m.groups)
    ),
    "no group is suspended while autoscaling is on": lambda m: (
        not any(group.spec.get("suspend") for group in m.workers)
    ),
    "autoscalerOptions.env leaves KubeRay's own variable alone": lambda m: (
        not any(entry["name"] == "KUBERAY_GEN_AUTOSCALER_START_CMD" for entry in _options(m).get("env", []))
    ),
    # --- authentication ---
    "authOptions.mode token needs Ray 2.52": lambda m: _auth(m).get("mode") != "token" or _ray_is_at_least(m, 52),
    "enableK8sTokenAuth is not for a RayService": lambda m: not _auth(m).get("enableK8sTokenAuth"),
    # --- fault tolerance ---
    "fault tolerance is asked for in gcsFaultToleranceOptions alone": lambda m: (
        not (
            _FT_ANNOTATIONS & _annotations(m).keys()
            or _REDIS_ENV & m.head.env.keys()
            or _REDIS_PARAMS & m.head.start_params.keys()
        )
    ),
    "the backend rocksdb needs a feature gate": lambda m: _ft(m).get("backend") != "rocksdb",
    "storage is for the backend rocksdb": lambda m: "storage" not in _ft(m),
    "fault tolerance by Redis has an address": lambda m: not _ft(m) or bool(_ft(m).get("redisAddress")),
    # --- upgrades ---
    "upgradeStrategy.type is one of three": lambda m: _strategy(m).get("type", "None") in _UPGRADES,
    "rayClusterConfig has no upgradeStrategy": lambda m: "upgradeStrategy" not in m.cluster,
    "rayClusterDeletionDelaySeconds is not negative": lambda m: (
        m.service["spec"].get("rayClusterDeletionDelaySeconds", 60) >= 0
    ),
    "an incremental upgrade needs autoscaling": lambda m: (
        not _is_incremental(m) or bool(m.cluster.get("enableInTreeAutoscaling"))
    ),
    "an incremental upgrade has its four options, within their ranges": lambda m: (
        not _is_incremental(m) or _steps_are_in_range(m)
    ),
    "networkPolicy, tlsOptions and historyServerOptions need feature gates": lambda m: not _GATED & m.cluster.keys(),
}
