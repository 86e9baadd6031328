"""Every overlay, alone and with components, keeps every rule."""

from tests.k8s.conftest import BUILDS
from tests.k8s.manifests_at_hand import K8S, Manifests
from tests.k8s.rules import operator, pods, serve, times
from tests.k8s.rules.schemas import Schemas


def test_every_overlay_and_component_is_built_somewhere() -> None:
    overlays = {overlay for overlay, _ in BUILDS.values()}
    components = {component for _, components in BUILDS.values() for component in components} | {"videos-pvc"}
    assert overlays == {folder.name for folder in (K8S / "overlays").iterdir()}
    assert components == {folder.name for folder in (K8S / "components").iterdir()}


def test_no_object_has_an_unknown_or_wrong_field(manifests: Manifests, schemas: Schemas) -> None:
    assert list(schemas.problems(manifests)) == []


def test_the_operator_takes_it(manifests: Manifests) -> None:
    assert list(operator.problems(manifests)) == []


def test_every_pod_has_what_it_needs(manifests: Manifests) -> None:
    assert list(pods.problems(manifests)) == []


def test_every_key_of_the_serve_configuration_is_known_and_every_replica_has_a_place(manifests: Manifests) -> None:
    assert list(serve.problems(manifests)) == []


def test_what_is_shorter_ends_before_what_is_longer(manifests: Manifests) -> None:
    assert list(times.problems(manifests)) == []


def test_nothing_between_clients_and_the_app_cuts_them_off(manifests: Manifests) -> None:
    assert list(times.way_in_problems(manifests)) == []
