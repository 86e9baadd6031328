"""Calls to other deployments: cancelled with their caller, made again where a replica is lost under them."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import numpy
from numpy.typing import NDArray
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from deployments.pools.engine import DeviceFailedError
from deployments.pools.wire import WireTensor

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Latents = NDArray[numpy.float32]

RETRIED = (RayActorError, BackPressureError, DeviceFailedError, TimeoutError)
"""A replica died, is going or hangs, its device failed, its queue is full: the same call may yet succeed."""
_MAX_BACKOFF_S = 2.0


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
    """The result of ``attempt``, made again at most ``max_retries`` times, with growing pauses, where it is lost."""
    for num_failed in range(max_retries):
        try:
            return await attempt()
        except RETRIED as error:
            logger.warning("call lost: %s, trying again", type(error).__name__, extra={"video_id": video_id})
            on_retry()
            await asyncio.sleep(min(0.1 * 2**num_failed, _MAX_BACKOFF_S))
    return await attempt()


def latents_to_wire(latents: Latents) -> WireTensor:
    flat = numpy.ascontiguousarray(latents).reshape(-1)
    return WireTensor(flat.view(numpy.uint8), "float32", latents.shape)


def latents_from_wire(wire: WireTensor) -> Latents:
    """``ValueError`` for any other dtype than float32."""
    if wire.dtype != "float32":
        raise ValueError(f"latents: {wire.dtype}, must be float32")
    return wire.data.view(numpy.float32).reshape(wire.shape)
