"""Calls to other deployments for a video: cancelled with their caller, made again when a replica is lost."""

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy
from numpy.typing import NDArray

from deployments.rpc.retry import RETRIED, retried

if TYPE_CHECKING:  # it imports torch, and clients need none of it
    from deployments.pools.wire import WireTensor

__all__ = ["RETRIED", "Latents", "call", "latents_from_wire", "latents_to_wire", "retrying"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Latents = NDArray[numpy.float32]


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


def latents_to_wire(latents: Latents) -> "WireTensor":
    from deployments.pools.wire import WireTensor

    flat = numpy.ascontiguousarray(latents).reshape(-1)
    return WireTensor(flat.view(numpy.uint8), "float32", latents.shape)


def latents_from_wire(wire: "WireTensor") -> Latents:
    """Raises ``ValueError`` for any other dtype than float32."""
    if wire.dtype != "float32":
        raise ValueError(f"latents: {wire.dtype}, must be float32")
    return wire.data.view(numpy.float32).reshape(wire.shape)
