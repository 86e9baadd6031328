"""What a pod of this app needs: KubeRay lets all of it pass and something breaks later."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from tests.k8s.manifests_at_hand import ROOT, Group, Manifests, number

_PORTS = {"gcs-server": 6379, "dashboard": 8265, "serve": 8000}
_CREATED_BY_USERS = {"pyramid-serve-api-keys", "pyramid-serve-redis", "pyramid-serve-hub"}
_SECRET_NAMES = re.compile(r"PASSWORD|TOKEN|SECRET|CREDENTIAL|API_?KEY", re.IGNORECASE)


def problems(manifests: Manifests) -> Iterator[str]:
    yield from _head_problems(manifests)
    yield from _version_problems(manifests)
    yield from _selector_problems(manifests)
    yield from _reference_problems(manifests)
    yield from _secret_problems(manifests)
    for group in manifests.groups:
        for problem in _group_problems(group):
            yield f"group {group.name}: {problem}"
    for name, pod in all_pods(manifests).items():
        for problem in _pod_problems(pod):
            yield f"{name}: {problem}"


def all_pods(manifests: Manifests) -> Mapping[str, Mapping[str, Any]]:
    """The specification of every pod by what makes it."""
    own = {f"group {group.name}": group.pod for group in manifests.groups}
    others = [each for each in manifests.objects if each["kind"] in ("Job", "StatefulSet", "Deployment")]
    return own | {f"{each['kind']} {each['metadata']['name']}": each["spec"]["template"]["spec"] for each in others}


def _head_problems(manifests: Manifests) -> Iterator[str]:
    head = manifests.head
    for name, port in _PORTS.items():
        if head.ports.get(name) != port:
            yield f"the head has no port {port} named {name}"
    if head.spec.get("resources", {}).get("CPU") != "0" and head.start_params.get("num-cpus") != "0":
        yield "the head has CPUs in Ray, so replicas may be placed there"
    if not manifests.service["spec"].get("excludeHeadPodFromServeSvc"):
        yield "the head takes requests: excludeHeadPodFromServeSvc is not set"
    annotations = head.spec["template"].get("metadata", {}).get("annotations", {})
    if annotations.get("cluster-autoscaler.kubernetes.io/safe-to-evict") != "false":
        yield "the head may be evicted to save a node: safe-to-evict is not false"
    if manifests.cluster.get("authOptions", {}).get("mode") != "token":
        yield "the dashboard is open: authOptions.mode is not token"


def _version_problems(manifests: Manifests) -> Iterator[str]:
    version = manifests.cluster.get("rayVersion")
    images = {group.container["image"] for group in manifests.groups}
    if len(images) > 1:
        yield f"Ray pods have different images: {', '.join(sorted(images))}"
    for image in images:
        if f"-ray{version}" not in image.partition(":")[2]:
            yield f"image {image}: its tag does not name Ray {version}, which is rayVersion"
    (ray,) = (line for line in _dependencies() if line.startswith("ray["))
    lowest = ray.partition(">=")[2].partition(",")[0]
    if not str(version).startswith(f"{lowest}."):
        yield f"rayVersion {version} is not the one of pyproject.toml, {ray}"


def _dependencies() -> list[str]:
    dependencies: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return dependencies


def _selector_problems(manifests: Manifests) -> Iterator[str]:
    """Every selector finds pods, and every group of pods has a budget and a network policy."""
    labels = [{**group.labels, "ray.io/node-type": _node_type(group)} for group in manifests.groups]
    labels += [each["spec"]["template"]["metadata"]["labels"] for each in manifests.all("StatefulSet")]

    def selects(selector: Mapping[str, str], pod: Mapping[str, str]) -> bool:
        return selector.items() <= pod.items()

    covered: dict[str, list[Mapping[str, str]]] = {"PodDisruptionBudget": [], "NetworkPolicy": []}
    for each in manifests.objects:
        spec, name = each.get("spec", {}), f"{each['kind']} {each['metadata']['name']}"
        match each["kind"]:
            case "Service":
                selector = spec["selector"]
            case "PodDisruptionBudget":
                selector = spec["selector"]["matchLabels"]
            case "NetworkPolicy":
                selector = spec["podSelector"]["matchLabels"]
            case "PodMonitor":
                selector = spec["selector"]["matchLabels"]
                yield from _monitor_problems(manifests, name, spec)
            case _:
                continue
        if not any(selects(selector, pod) for pod in labels):
            yield f"{name}: selects no pod"
        if each["kind"] in covered:
            covered[each["kind"]].append(selector)
    for group in manifests.groups:
        for kind, selectors in covered.items():
            if not any(selects(selector, group.labels) for selector in selectors):
                yield f"group {group.name}: no {kind} selects its pods"
    clients = manifests.find("Service", "pyramid-serve")["spec"]["selector"]
    if {group.pool for group in manifests.groups if selects(clients, group.labels)} != {"api"}:
        yield "Service pyramid-serve: must select the api pods alone"


def _node_type(group: Group) -> str:
    return "head" if group.name == "head" else "worker"


def _monitor_problems(manifests: Manifests, name: str, spec: Mapping[str, Any]) -> Iterator[str]:
    """KubeRay adds the port named metrics where there is none."""
    for group in manifests.groups:
        if spec["selector"]["matchLabels"].items() <= {**group.labels, "ray.io/node-type": _node_type(group)}.items():
            for endpoint in spec["podMetricsEndpoints"]:
                if endpoint["port"] not in {*group.ports, "metrics"}:
                    yield f"{name}: group {group.name} has no port {endpoint['port']}"


def _reference_problems(manifests: Manifests) -> Iterator[str]:
    """What pods and routes name is there, or is a Secret that users make."""
    names = {(each["kind"], each["metadata"]["name"]) for each in manifests.objects}
    for where, pod in all_pods(manifests).items():
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        for volume in volumes.values():
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim and ("PersistentVolumeClaim", claim) not in names:
                yield f"{where}: no PersistentVolumeClaim {claim}"
            secret = volume.get("secret", {}).get("secretName")
            if secret and secret not in _CREATED_BY_USERS:
                yield f"{where}: nobody makes Secret {secret}"
        account = pod.get("serviceAccountName")
        if account and ("ServiceAccount", account) not in names:
            yield f"{where}: no ServiceAccount {account}"
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in volumes and mount["name"] != "state":
                    yield f"{where}: no volume {mount['name']}"
    for route in manifests.all("HTTPRoute"):
        for rule in route["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                if ("Service", backend["name"]) not in names:
                    yield f"HTTPRoute {route['metadata']['name']}: no Service {backend['name']}"


def _secret_problems(manifests: Manifests) -> Iterator[str]:
    for where, pod in all_pods(manifests).items():
        for container in pod["containers"]:
            for entry in container.get("env", []):
                if _SECRET_NAMES.search(entry["name"]) and entry.get("value"):
                    yield f"{where}: a secret is in the manifests: {entry['name']}"
    for secret in manifests.all("Secret"):
        yield f"Secret {secret['metadata']['name']}: a secret is in the manifests"
    if manifests.cluster.get("gcsFaultToleranceOptions", {}).get("redisPassword", {}).get("value"):
        yield "a secret is in the manifests: redisPassword"


def _group_problems(group: Group) -> Iterator[str]:
    if group.labels.get("app") != "pyramid-serve" or not group.pool:
        yield "its pods need the labels app and pool"
    if "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S" not in group.env:
        yield "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S is not set"
    if group.limit("nvidia.com/gpu"):
        tolerated = {toleration["key"] for toleration in group.pod.get("tolerations", [])}
        if "nvidia.com/gpu" not in tolerated:
            yield "its pods do not tolerate the taint of GPU nodes"
    if group.name == "head":
        return
    store = int(group.start_params.get("object-store-memory", 0))
    if not store:
        yield "object-store-memory is not set, so it depends on the node"
    # KubeRay makes /dev/shm as large as the memory limit, and what is in it counts towards that limit.
    if store > group.limit("memory") / 2:
        yield "the object store takes more than half of the memory limit"


def _pod_problems(pod: Mapping[str, Any]) -> Iterator[str]:
    security = pod.get("securityContext", {})
    if not security.get("runAsNonRoot"):
        yield "runs as root"
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        name, resources = container["name"], container.get("resources", {})
        for resource in ("cpu", "memory"):
            if not {"requests", "limits"} <= resources.keys() or not all(
                resource in each for each in resources.values()
            ):
                yield f"container {name}: no request and limit of {resource}"
            elif number(resources["requests"][resource]) > number(resources["limits"][resource]):
                yield f"container {name}: requests more {resource} than its limit"
        gpu = {key: each.get("nvidia.com/gpu") for key, each in resources.items()}
        if len(set(gpu.values())) > 1:
            yield f"container {name}: the request and limit of GPUs differ"
        if "preStop" in container.get("lifecycle", {}):
            yield f"container {name}: a preStop hook comes before the drain"
        if container.get("securityContext", {}).get("allowPrivilegeEscalation") is not False:
            yield f"container {name}: may gain privileges"
        if ":" not in container["image"] or container["image"].endswith(":latest"):
            yield f"container {name}: image {container['image']} has no fixed tag"
