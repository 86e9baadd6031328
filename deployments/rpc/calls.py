"""Calls to other deployments for a video: cancelled with their caller, made again when a replica is lost."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from deployments.rpc.retry import RETRIED, retried

__all__ = ["RETRIED", "call", "retrying"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


async def call(response: Any) -> Any:
    """The result of a ``DeploymentResponse``; the call is cancelled when its caller is."""
    is_done = False
    try:
        result = await response
        is_done = True
        return result
    finally:
        if not is_done:
            response.cancel()


async def retrying(
    attempt: Callable[[], Awaitable[Result]], *, video_id: str, max_retries: int, on_retry: Callable[[], None]
) -> Result:
    """The result of ``attempt``, a call for a video, which is made again as ``retry.retries`` says."""

    def tell(error: BaseException) -> None:
        logger.warning("call lost: %s, trying again", type(error).__name__, extra={"video_id": video_id})
        on_retry()

    return await retried(attempt, max_retries=max_retries, on_retry=tell)
