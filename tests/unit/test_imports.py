"""What is asked or restarted often must be there soon: it imports no torch."""

import subprocess
import sys

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


CHECK = """
import importlib, sys
for module in sys.argv[1:]:
    importlib.import_module(module)
    assert "torch" not in sys.modules, f"{module} imports torch"
"""


def test_what_answers_clients_imports_no_torch() -> None:
    checked = subprocess.run([sys.executable, "-c", CHECK, *WITHOUT_TORCH], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
