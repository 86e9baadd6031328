"""What is asked or restarted often must be there soon: it imports no torch."""

import subprocess
import sys

import pytest

WITHOUT_TORCH = (
    "deployments.client",
    "deployments.errors",
    "deployments.http.app",
    "deployments.http.ingress",
    "deployments.orchestrator.deployment",
    "deployments.videos.videos",
    "pyramid_serve.api",
    "pyramid_serve.families",
    "pyramid_serve.media.fragments",
    "pyramid_serve.media.previews",
    "pyramid_serve.pyramid_flow.family",
    "pyramid_serve.served_model",
    "deployments.rpc.calls",
    "deployments.rpc.retry",
    "deployments.claims.asking",
    "deployments.claims.deployment",
    "deployments.telemetry.logs",
    "pyramid_serve.outputs",
    "pyramid_serve.storage",
)


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_a_module_of_the_control_plane_imports_no_torch(module: str) -> None:
    check = f"import sys, {module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
