"""What ``kubectl kustomize`` makes of an overlay, and how the rules look at it."""

import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"

Object = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """Pods of one kind: the head, or a group of workers."""

    spec: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.spec.get("groupName", "head"))

    @property
    def pod(self) -> Mapping[str, Any]:
        return self.spec["template"]["spec"]

    @property
    def container(self) -> Mapping[str, Any]:
        """Ray's."""
        return self.pod["containers"][0]

    @property
    def labels(self) -> Mapping[str, str]:
        """Of the pod. KubeRay adds those of the Ray node to those of the template."""
        return {**self.spec["template"].get("metadata", {}).get("labels", {}), **self.spec.get("labels", {})}

    @property
    def pool(self) -> str:
        return self.labels.get("pool", "")

    @property
    def env(self) -> Mapping[str, str]:
        return {entry["name"]: entry.get("value", "") for entry in self.container.get("env", [])}

    @property
    def ports(self) -> Mapping[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container.get("ports", [])}

    @property
    def start_params(self) -> Mapping[str, str]:
        return self.spec.get("rayStartParams", {})

    def limit(self, resource: str) -> float:
        """Of Ray's container: CPUs, GPUs or bytes. 0 if there is none."""
        return number(self.container.get("resources", {}).get("limits", {}).get(resource, "0"))


@dataclass(frozen=True)
class Manifests:
    """The objects of one overlay."""

    objects: Sequence[Object]

    def all(self, kind: str) -> list[Object]:
        return [each for each in self.objects if each["kind"] == kind]

    def find(self, kind: str, name: str) -> Object:
        (found,) = (each for each in self.all(kind) if each["metadata"]["name"] == name)
        return found

    @property
    def service(self) -> Object:
        (service,) = self.all("RayService")
        return service

    @property
    def cluster(self) -> Mapping[str, Any]:
        return self.service["spec"]["rayClusterConfig"]

    @property
    def head(self) -> Group:
        return Group(self.cluster["headGroupSpec"])

    @property
    def workers(self) -> list[Group]:
        return [Group(spec) for spec in self.cluster["workerGroupSpecs"]]

    @property
    def groups(self) -> list[Group]:
        return [self.head, *self.workers]

    def workers_of(self, pool: str) -> list[Group]:
        return [group for group in self.workers if group.pool == pool]

    @cached_property
    def serve_config(self) -> Any:
        return yaml.safe_load(self.service["spec"]["serveConfigV2"])


def build(overlay: str, components: Iterable[str], folder: Path) -> Manifests:
    """An overlay with components on top, as a user would write it in ``folder``."""
    there = os.path.relpath(K8S, folder.resolve())
    kustomization = {
        "resources": [f"{there}/overlays/{overlay}"],
        "components": [f"{there}/components/{component}" for component in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return Manifests(list(yaml.safe_load_all(done.stdout)))


_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "m": 1e-3}


def number(quantity: str | float) -> float:
    """What a quantity of Kubernetes stands for: ``500m`` 0.5, ``1Gi`` 2^30."""
    text = str(quantity)
    for unit, factor in _UNITS.items():
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    return float(text)
