"""The Ingress deployment: HTTP for the app. It keeps no state of videos, so any replica can answer for any video."""

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.http.app import create_app
from deployments.http.config import HttpConfig
from deployments.http.listener import Listener
from deployments.http.pools import PoolHandles
from deployments.telemetry.logs import configure_logging
from deployments.telemetry.replicas import replica_name
from deployments.videos.videos import Videos
from pyramid_serve.served_model import ServedModels
from pyramid_serve.storage import VideoStore


@serve.deployment
@serve.ingress()
class Ingress:
    """The videos API over HTTP; see ``deployments.http.app``."""

    def __init__(
        self,
        storage: str,
        config: HttpConfig,
        models: ServedModels,
        *,
        claims: DeploymentHandle[Any],
        orchestrator: DeploymentHandle[Any],
        pools: PoolHandles,
    ) -> None:
        """storage: the root of the ``VideoStore``. orchestrator: only bound so that it is deployed; claims call it.
        pools: whose work ``/v1/status`` tells."""
        configure_logging(replica_name())
        self._videos = Videos(VideoStore(storage), claims, models)
        self._config = config
        self._orchestrator = orchestrator
        self._pools = pools
        self._listener: Listener | None = None

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """The application. Serve calls this when the replica has started.

        Raises ``OSError`` if the replica is to listen at a port that cannot be had.
        """
        app = create_app(self._videos, self._config, pools=self._pools)
        if self._config.listen is not None:
            self._listener = await Listener.start(app, self._config.listen, self._config.connections)
        return app

    async def check_health(self) -> None:
        """Serve replaces a replica whose server has ended."""
        if self._listener is not None:
            self._listener.check()

    async def __del__(self) -> None:
        """Serve calls this once, when it stops the replica."""
        if self._listener is not None:
            await self._listener.stop()
