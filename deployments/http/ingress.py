"""The Ingress deployment: HTTP for the app. Keeps nothing of a video, so any replica answers for every one."""

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.http.app import HttpConfig, create_app
from deployments.telemetry.logs import configure_logging
from deployments.telemetry.replicas import replica_name
from deployments.videos.videos import ServedModel, Videos
from pyramid_serve.storage import VideoStore


@serve.deployment
@serve.ingress()
class Ingress:
    """The videos API over HTTP; see ``http_app``."""

    def __init__(
        self,
        storage: str,
        config: HttpConfig,
        model: ServedModel,
        *,
        claims: DeploymentHandle[Any],
        orchestrator: DeploymentHandle[Any],
    ) -> None:
        """``storage``: the root of the ``VideoStore``; ``orchestrator``: deployed with it, and asked through claims."""
        configure_logging(replica_name())
        self._videos = Videos(VideoStore(storage), claims, model)
        self._config = config
        self._orchestrator = orchestrator

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Serve calls to get the application, once the replica is there."""
        return create_app(self._videos, self._config)
