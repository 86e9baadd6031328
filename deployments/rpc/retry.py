"""Which failed calls are worth another try, and how they are tried again."""

from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential,
    wait_random_exponential,
)

from deployments.errors import DeviceFailedError

Result = TypeVar("Result")

RETRIED = (
    RayActorError,  # a replica died, or cannot be reached
    OutOfMemoryError,  # its node ended it because memory ran out
    ObjectLostError,  # its result was lost with the node or the process that held it; and the classes under this one
    ReplicaUnavailableError,
    DeploymentUnavailableError,
    BackPressureError,  # its queue is full
    DeviceFailedError,
    TimeoutError,  # it hangs
)
"""The errors after which the same call may yet succeed."""
CAUSES: Mapping[type[Exception], str] = {
    RayActorError: "replica_lost",
    OutOfMemoryError: "out_of_memory",
    ObjectLostError: "result_lost",
    ReplicaUnavailableError: "unavailable",
    DeploymentUnavailableError: "unavailable",
    BackPressureError: "queue_full",
    DeviceFailedError: "device_failed",
    TimeoutError: "stalled",
}
"""What each of these errors is called in metrics."""

MAX_RETRIES = 20
"""Half a minute in all, in which Serve starts another replica."""
_FIRST_PAUSE_S = 0.1
_MAX_PAUSE_S = 2.0


def raised_there(error: BaseException) -> BaseException:
    """The error as it was raised in the replica, without the wrapping that Ray adds with each process it passes."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def is_worth_retrying(error: BaseException, *, also: tuple[type[Exception], ...] = ()) -> bool:
    """Whether an error is one of ``RETRIED`` or of ``also``, however often Ray has wrapped it."""
    return isinstance(raised_there(error), RETRIED + also)


def cause_of(error: BaseException) -> str:
    """What an error that is one of ``RETRIED`` is called in metrics."""
    return next((cause for kind, cause in CAUSES.items() if isinstance(raised_there(error), kind)), "other")


def retries(
    *,
    on_retry: Callable[[BaseException], None],
    max_retries: int = MAX_RETRIES,
    also: tuple[type[Exception], ...] = (),
) -> AsyncRetrying:
    """The attempts at one piece of work, for ``async for attempt in retries(...): with attempt: ...``.

    After an error that is worth it there is another attempt, at most ``max_retries`` times; ``on_retry`` is called with
    that error before the pause. Pauses grow from 0.1 s to 2 s on average, half of each being random, so that callers
    who lost the same replica do not come back together. Other errors and the last one are raised as they are.
    """

    def tell(state: RetryCallState) -> None:
        assert state.outcome is not None
        error = state.outcome.exception()
        assert error is not None
        on_retry(raised_there(error))

    half_fixed = wait_exponential(multiplier=_FIRST_PAUSE_S / 2, max=_MAX_PAUSE_S / 2)
    half_random = wait_random_exponential(multiplier=_FIRST_PAUSE_S, max=_MAX_PAUSE_S)
    return AsyncRetrying(
        retry=retry_if_exception(lambda error: is_worth_retrying(error, also=also)),
        stop=stop_after_attempt(max_retries + 1),
        wait=half_fixed + half_random,
        before_sleep=tell,
        reraise=True,
    )


async def retried(
    call: Callable[[], Awaitable[Result]],
    *,
    on_retry: Callable[[BaseException], None],
    max_retries: int = MAX_RETRIES,
    also: tuple[type[Exception], ...] = (),
) -> Result:
    """The result of ``call``, which is made again as ``retries`` says. It must be harmless to repeat."""

    async def attempt() -> Result:
        return await call()

    result: Result = await retries(on_retry=on_retry, max_retries=max_retries, also=also)(attempt)
    return result
