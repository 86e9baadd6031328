"""The order of times: what is shorter must end before what is longer cuts it off."""

from collections.abc import Iterator

from tests.k8s.manifests_at_hand import Group, Manifests, number
from tests.k8s.rules.serve import placed_deployments, reading_problems

LONGEST_UNIT_S = 30.0
"""A unit at 768p: 4 s alone at a third of the length on an H200 (docs/performance.md), more later and among others."""
LONGEST_VIDEO_S = 31 * LONGEST_UNIT_S
MODEL_LOAD_S = 180.0
"""From a volume to the GPU, with warm-up: a guess, until someone measures it on a cluster."""
_MAKES_UNITS = ("Denoiser", "Decoder")


def problems(manifests: Manifests) -> Iterator[str]:
    spec = manifests.service["spec"]
    for group in manifests.groups:
        drain, grace = _drain_s(group), group.pod.get("terminationGracePeriodSeconds", 30)
        if not drain < grace:
            yield f"group {group.name}: the drain of {drain:g} s must be shorter than the grace period of {grace} s"
    delay = spec.get("rayClusterDeletionDelaySeconds", 60)
    strategy = spec.get("upgradeStrategy", {})
    if strategy.get("type") != "None" and delay < LONGEST_VIDEO_S:
        yield f"rayClusterDeletionDelaySeconds {delay}: the longest video takes {LONGEST_VIDEO_S:g} s"
    interval = strategy.get("clusterUpgradeOptions", {}).get("intervalSeconds", MODEL_LOAD_S)
    if interval < MODEL_LOAD_S:
        yield f"intervalSeconds {interval}: a model takes {MODEL_LOAD_S:g} s to load"
    for group in manifests.workers:
        if group.limit("nvidia.com/gpu") and group.spec.get("idleTimeoutSeconds", 0) < MODEL_LOAD_S:
            yield f"group {group.name}: idleTimeoutSeconds is shorter than a model takes to load"
    text = spec.get("serveConfigV2", "")
    if text and not reading_problems(text):
        yield from _serve_problems(manifests, text)


def _drain_s(group: Group) -> float:
    return float(group.env.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S") or 30)


def _serve_problems(manifests: Manifests, text: str) -> Iterator[str]:
    for each in placed_deployments(text):
        ends_s = each.graceful_shutdown_s
        if each.name.startswith(_MAKES_UNITS) and ends_s < LONGEST_UNIT_S:
            yield f"{each.name}: graceful_shutdown_timeout_s {ends_s:g} cuts off a unit of {LONGEST_UNIT_S:g} s"
        for group in manifests.workers_of(each.pool or ""):
            if ends_s > _drain_s(group):
                yield f"{each.name}: graceful_shutdown_timeout_s {ends_s:g} exceeds the drain of group {group.name}"
        if each.downscale_delay_s is not None and each.num_gpus and each.downscale_delay_s < MODEL_LOAD_S:
            yield f"{each.name}: downscale_delay_s is shorter than a model takes to load"


def way_in_problems(manifests: Manifests) -> Iterator[str]:
    """What lies between clients and the app must not cut off, hold back or refuse what the app sends and takes."""
    for ingress in manifests.all("Ingress"):
        annotations = {
            key.removeprefix("nginx.ingress.kubernetes.io/"): value
            for key, value in ingress["metadata"].get("annotations", {}).items()
        }
        for key in ("proxy-read-timeout", "proxy-send-timeout"):
            if float(annotations.get(key, 60)) < LONGEST_VIDEO_S:
                yield f"Ingress: {key} is shorter than the longest video takes"
        if annotations.get("proxy-buffering") != "off":
            yield "Ingress: proxy-buffering holds streams back"
        if number(annotations.get("proxy-body-size", "1m").removesuffix("m")) < 32:
            yield "Ingress: proxy-body-size is less than the app takes"
    for route in manifests.all("HTTPRoute"):
        if any(rule.get("timeouts", {}).get("request") != "0s" for rule in route["spec"]["rules"]):
            yield "HTTPRoute: a request that waits for its video is cut off: timeouts.request is not 0s"
