"""The orchestrators, as claims sees them."""

import asyncio
import logging
from typing import Any, Protocol

from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

logger = logging.getLogger(__name__)

_STOP_S = 5.0


class Orchestrators(Protocol):
    """What claims asks of the orchestrators."""

    async def run(self, video_id: str) -> None:
        """Make a video. Returns when the attempt has ended, whatever its outcome.

        Raises ``RayActorError`` when the replica died.
        """

    async def stop(self, video_id: str) -> None:
        """Stop working on a video, on whichever replica it is."""

    async def are_ready(self) -> bool:
        """Whether the whole app is up, so that videos can be made."""


class OrchestratorHandles:
    """The orchestrators of the same app. Their handle is made when it is first used: they are deployed after claims."""

    def __init__(self, deployment: str) -> None:
        self._deployment = deployment
        self._handle: DeploymentHandle[Any] | None = None

    @property
    def handle(self) -> DeploymentHandle[Any]:
        if self._handle is None:
            self._handle = serve.get_deployment_handle(self._deployment, serve.get_replica_context().app_name)
        return self._handle

    async def run(self, video_id: str) -> None:
        await self.handle.run.remote(video_id)

    async def are_ready(self) -> bool:
        app = serve.get_replica_context().app_name
        status = (await asyncio.to_thread(serve.status)).applications.get(app)
        return status is not None and status.status == ApplicationStatus.RUNNING

    async def stop(self, video_id: str) -> None:
        responses = self.handle.broadcast("stop", video_id)
        for result in await responses.results_async(timeout_s=_STOP_S, return_exceptions=True):
            if isinstance(result, Exception):
                logger.warning("a replica could not be told to stop", extra={"video_id": video_id}, exc_info=result)
