"""One local Ray for all tests of the deployments. Deploy with ``deployed``, which takes the application down again."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve

from deployments.local.cluster import start_ray

ROOT = Path(__file__).parents[2]

QUICK: dict[str, Any] = {
    "ray_actor_options": {"num_cpus": 0},
    "graceful_shutdown_wait_loop_s": 0.01,
    "graceful_shutdown_timeout_s": 0.1,
}
"""Options of a deployment that comes and goes quickly, and asks for no CPU of its own."""


def quick(deployment: Any, **options: Any) -> Any:
    """A deployment of a class with ``QUICK`` and these options: ``quick(Denoiser, max_ongoing_requests=8).bind(x)``."""
    return serve.deployment(deployment).options(**{**QUICK, **options})


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Ray and Serve on this machine, with no HTTP proxy: tests talk to handles."""
    # Workers start with this process's environment, and have to find the project.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["RAY_SERVE_STATUS_GAUGE_REPORT_INTERVAL_S"] = "1"  # else Ray drops these gauges between two reports
    start_ray(_start_local_ray)
    serve.start(proxy_location="Disabled")
    yield
    serve.shutdown()
    ray.shutdown()


def _start_local_ray() -> None:
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=300_000_000,
        log_to_driver=False,
        _system_config={"metrics_report_interval_ms": 2000},  # instead of 10 s, for which tests would wait
    )


@contextmanager
def deployed(application: serve.Application, name: str) -> Iterator[Any]:
    """A handle of the application's ingress deployment, for as long as the block runs.

    ``Any``, for a ``DeploymentHandle`` is typed as if each of its calls might be a stream and might be none.
    """
    handle = serve.run(application, name=name, route_prefix=None)
    try:
        yield handle
    finally:
        serve.delete(name)
