"""How the rest of the app asks claims, whose one replica may be away for a while."""

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ray.exceptions import RayTaskError

from deployments.errors import SupersededError
from deployments.rpc.retry import RETRIED, raised_there, retried

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

UNREACHABLE = (*RETRIED, SupersededError)
"""Claims is being replaced, or has too much to do; it will be back."""


async def ask_claims(call: Callable[[], Awaitable[Result]]) -> Result:
    """The answer of claims, waiting while its replica is replaced. ``call`` must be harmless to repeat.

    Raises the last error after about half a minute, and what claims itself raises at once: just that, without the
    traceback and the address of its replica, which Ray puts in the message.
    """
    try:
        return await retried(call, also=(SupersededError,), on_retry=_tell)
    except RayTaskError as error:
        raise raised_there(error) from None


def _tell(error: BaseException) -> None:
    logger.info("claims is away: %s", type(error).__name__)
