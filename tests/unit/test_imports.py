"""What is asked or restarted often must be there soon: it imports no torch, and torch no more than it needs."""

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


WITHOUT_A_COMPILER = (
    "deployments.app",
    "deployments.pools.decoder",
    "deployments.pools.denoiser",
    "deployments.pools.text_encoder",
    "pyramid_serve.pia.serving",
    "pyramid_serve.pyramid_flow.serving",
)


CHECK = """
import importlib, sys
absent, *modules = sys.argv[1:]
for module in modules:
    importlib.import_module(module)
    assert absent not in sys.modules, f"{module} imports {absent}"
"""


def check_that_none_imports(absent: str, modules: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", CHECK, absent, *modules]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_what_answers_clients_imports_no_torch() -> None:
    check_that_none_imports("torch", WITHOUT_TORCH)


def test_what_runs_models_imports_no_compiler_unless_it_compiles() -> None:
    check_that_none_imports("torch._dynamo", WITHOUT_A_COMPILER)
