"""Every object by the schema of its kind, with unknown keys refused."""

import gzip
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import jsonschema
import kubernetes_validate
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tests.k8s.manifests_at_hand import Manifests

KUBERNETES = "1.34"
CRDS = Path(__file__).parent.parent / "crds"
"""The CustomResourceDefinition of a RayService, as KubeRay 1.7 installs it (Apache-2.0)."""


class Schemas:
    """The schemas of the core kinds, those of CRDs, and models of what is used of other kinds."""

    def __init__(self) -> None:
        self._validators = dict(_validators_in(CRDS))

    def problems(self, manifests: Manifests) -> Iterator[str]:
        for each in manifests.objects:
            name = f"{each['kind']} {each['metadata']['name']}"
            for problem in self._of(each):
                yield f"{name}: {problem}"

    def _of(self, each: dict[str, Any]) -> Iterator[str]:
        kind = each["kind"]
        if kind in self._validators:
            for error in self._validators[kind].iter_errors(each):
                yield f"{error.json_path}: {error.message}"
        elif kind in _OTHER_KINDS:
            try:
                _OTHER_KINDS[kind].model_validate(each)
            except ValidationError as error:
                for problem in error.errors():
                    yield f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
        else:
            yield from _problems_of_core_kind(json.dumps(each, sort_keys=True))


@cache
def _problems_of_core_kind(text: str) -> list[str]:
    try:
        kubernetes_validate.validate(json.loads(text), KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


def _validators_in(folder: Path) -> Iterator[tuple[str, Any]]:
    for file in sorted(folder.glob("*.yaml.gz")):
        with gzip.open(file) as opened:
            crd = yaml.load(opened, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        (version,) = (version for version in crd["spec"]["versions"] if version["storage"])
        schema = version["schema"]["openAPIV3Schema"]
        _close(schema)
        yield crd["spec"]["names"]["kind"], jsonschema.Draft7Validator(schema)


def _close(schema: Any) -> None:
    """Refuse keys that an object's schema does not name, as the API server would drop them."""
    if isinstance(schema, dict):
        is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
        if "properties" in schema and not is_open:
            schema["additionalProperties"] = False
        for value in schema.values():
            _close(value)
    elif isinstance(schema, list):
        for value in schema:
            _close(value)


# --- the Gateway API and the Prometheus operator: the part of them that is used here ------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Metadata(_Strict):
    name: str
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class _Listener(_Strict):
    name: str
    protocol: str
    port: int


class _GatewaySpec(_Strict):
    gatewayClassName: str  # noqa: N815
    listeners: list[_Listener]


class _Gateway(_Strict):
    apiVersion: str  # noqa: N815
    kind: str
    metadata: _Metadata
    spec: _GatewaySpec


class _Parent(_Strict):
    name: str


class _Backend(_Strict):
    name: str
    port: int


class _Timeouts(_Strict):
    request: str


class _RouteRule(_Strict):
    backendRefs: list[_Backend]  # noqa: N815
    timeouts: _Timeouts


class _RouteSpec(_Strict):
    parentRefs: list[_Parent]  # noqa: N815
    rules: list[_RouteRule]


class _HTTPRoute(_Strict):
    apiVersion: str  # noqa: N815
    kind: str
    metadata: _Metadata
    spec: _RouteSpec


class _Selector(_Strict):
    matchLabels: dict[str, str]  # noqa: N815


class _Endpoint(_Strict):
    port: str


class _MonitorSpec(_Strict):
    selector: _Selector
    podTargetLabels: list[str] = []  # noqa: N815
    podMetricsEndpoints: list[_Endpoint]  # noqa: N815


class _PodMonitor(_Strict):
    apiVersion: str  # noqa: N815
    kind: str
    metadata: _Metadata
    spec: _MonitorSpec


class _Alert(_Strict):
    alert: str
    expr: str
    duration: Annotated[str, Field(alias="for", pattern=r"^\d+[smh]$")] = "0s"
    labels: dict[str, str]
    annotations: dict[str, str]


class _AlertGroup(_Strict):
    name: str
    rules: list[_Alert]


class _RuleSpec(_Strict):
    groups: list[_AlertGroup]


class _PrometheusRule(_Strict):
    apiVersion: str  # noqa: N815
    kind: str
    metadata: _Metadata
    spec: _RuleSpec


_OTHER_KINDS: dict[str, type[_Strict]] = {
    "Gateway": _Gateway,
    "HTTPRoute": _HTTPRoute,
    "PodMonitor": _PodMonitor,
    "PrometheusRule": _PrometheusRule,
}
