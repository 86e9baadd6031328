"""The overlays, built once, and the rules that each must keep."""

import shutil

import pytest

from tests.k8s.manifests_at_hand import Manifests, build
from tests.k8s.rules.schemas import Schemas

BUILDS = {
    "dev": ("dev", ()),
    "single-gpu": ("single-gpu", ()),
    "pools": ("pools", ()),
    "single-gpu with its weights on a volume": ("single-gpu", ("models-pvc",)),
    "pools with spot": ("pools", ("spot",)),
    "pools with everything": ("pools", ("models-pvc", "spot", "redis", "gateway", "ingress-nginx", "monitoring")),
}
"""What is built: an overlay, and the components on top of it."""


@pytest.fixture(scope="session")
def overlays(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifests]:
    if shutil.which("kubectl") is None:
        pytest.skip('no kubectl; pip install -e ".[kubectl]" brings one')
    return {
        name: build(overlay, components, tmp_path_factory.mktemp("overlay"))
        for name, (overlay, components) in BUILDS.items()
    }


@pytest.fixture(scope="session")
def schemas() -> Schemas:
    return Schemas()


@pytest.fixture(params=BUILDS)
def manifests(request: pytest.FixtureRequest, overlays: dict[str, Manifests]) -> Manifests:
    return overlays[request.param]
