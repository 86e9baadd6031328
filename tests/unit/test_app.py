"""The deployments that an app is bound of."""

from deployments.app import build
from deployments.config import AppConfig


def test_no_limit_of_serve_queues_probes_behind_requests_that_the_app_would_refuse() -> None:
    config = AppConfig.model_validate({"models": [{}]})
    http = config.ingress.settings
    num_held = http.max_streams + http.max_waits + http.max_downloads + http.body.max_uploads
    assert build(config)._bound_deployment.max_ongoing_requests > 10 * num_held
