"""Calls to other deployments for a video: cancelled with their caller, made again when a replica is lost."""

import contextvars
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from deployments.rpc.retry import RETRIED, cause_of, retried

__all__ = ["RETRIED", "call", "retrying", "under_an_id_of_its_own"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def under_an_id_of_its_own(remote: Callable[..., Result], *arguments: Any) -> Result:
    """What a handle's ``remote`` gives, for a call that its router is to tell from others of the same request.

    Calls that are made while a request is answered have its id, and Serve's consistent-hash router (Ray 2.60) keeps
    waiting calls by that id alone: of two that wait at the same time, one is lost. Serve does not cancel such a call
    with the request that it is part of; ``call`` does.
    """
    return contextvars.Context().run(remote, *arguments)


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
    attempt: Callable[[], Awaitable[Result]], *, video_id: str, max_retries: int, on_retry: Callable[[str], None]
) -> Result:
    """The result of ``attempt``, a call for a video, which is made again as ``retry.retries`` says.

    on_retry: called before each further try with the cause, one of ``retry.CAUSES``.
    """

    def tell(error: BaseException) -> None:
        logger.warning("call lost: %s, trying again", type(error).__name__, extra={"video_id": video_id})
        on_retry(cause_of(error))

    return await retried(attempt, max_retries=max_retries, on_retry=tell)
