import asyncio
import time
from collections.abc import Callable

import pytest
from ray import exceptions
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from deployments.errors import DeviceFailedError, SupersededError
from deployments.rpc.retry import CAUSES, cause_of, is_worth_retrying, raised_there, retried, retries

pytestmark = pytest.mark.asyncio


def passed_on(error: Exception) -> RayTaskError:
    """An error as the caller of a replica gets it."""
    wrapped: RayTaskError = RayTaskError("call", "Traceback ...", error).as_instanceof_cause()
    return wrapped


def fails_with(*errors: BaseException) -> Callable[[], "asyncio.Future[str]"]:
    """A call that fails with each of these in turn, and succeeds after."""
    left = list(errors)

    def call() -> "asyncio.Future[str]":
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        if left:
            future.set_exception(left.pop(0))
        else:
            future.set_result("done")
        return future

    return call


LOST = [
    ActorDiedError(),
    exceptions.ActorUnavailableError("gone", b"1" * 16),
    exceptions.ObjectLostError("1", None, ""),
    exceptions.OwnerDiedError("1", None, ""),
    exceptions.ObjectFetchTimedOutError("1", None, ""),
    exceptions.ReferenceCountingAssertionError("1", None, ""),
    exceptions.ObjectReconstructionFailedError("1"),
    exceptions.OutOfMemoryError("no memory"),
    DeploymentUnavailableError(DeploymentID("Denoiser", "app")),
    BackPressureError(1, 1),
    DeviceFailedError("the device failed"),
    TimeoutError(),
]


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
async def test_what_is_lost_is_worth_another_try_however_often_it_was_passed_on(error: Exception) -> None:
    assert is_worth_retrying(error)
    assert is_worth_retrying(passed_on(error))
    twice = passed_on(passed_on(error))
    assert is_worth_retrying(twice)
    assert raised_there(twice) is error


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
async def test_what_is_lost_has_a_cause_of_a_few_however_often_it_was_passed_on(error: Exception) -> None:
    assert cause_of(error) == cause_of(passed_on(passed_on(error)))
    assert cause_of(error) in CAUSES.values()


async def test_causes_tell_a_lost_replica_from_one_whose_device_failed() -> None:
    assert cause_of(ActorDiedError()) == "replica_lost"
    assert cause_of(DeviceFailedError("x")) == "device_failed"
    assert cause_of(TimeoutError()) == "stalled"


@pytest.mark.parametrize("error", [ValueError("x"), RayError("x"), SupersededError("x"), asyncio.CancelledError()])
async def test_what_would_fail_again_is_not_tried_again(error: BaseException) -> None:
    retried_after: list[BaseException] = []
    with pytest.raises(type(error)):
        await retried(fails_with(error), on_retry=retried_after.append)
    assert retried_after == []
    assert not isinstance(error, Exception) or not is_worth_retrying(passed_on(error))


async def test_each_error_is_told_before_the_next_try_and_the_result_is_that_of_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deployments.rpc.retry._MAX_PAUSE_S", 0.0)
    lost, told = [ActorDiedError(), DeviceFailedError("x")], list[BaseException]()
    assert await retried(fails_with(lost[0], passed_on(lost[1])), on_retry=told.append) == "done"
    assert told == lost


async def test_the_last_error_is_raised_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.rpc.retry._MAX_PAUSE_S", 0.0)
    errors = [TimeoutError(str(index)) for index in range(4)]
    with pytest.raises(TimeoutError) as raised:
        await retried(fails_with(*errors), max_retries=2, on_retry=lambda _: None)
    assert raised.value is errors[2]


async def test_a_caller_may_name_more_errors() -> None:
    call = fails_with(SupersededError("x"))
    assert await retried(call, also=(SupersededError,), on_retry=lambda _: None) == "done"


async def test_pauses_grow_and_no_two_callers_have_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    async def pauses() -> list[float]:
        taken: list[float] = []

        async def sleep(seconds: float) -> None:
            taken.append(seconds)

        attempts = retries(on_retry=lambda _: None)
        attempts.sleep = sleep
        with pytest.raises(TimeoutError):
            async for attempt in attempts:
                with attempt:
                    raise TimeoutError
        return taken

    one, other = await pauses(), await pauses()
    assert len(one) == len(other) == 20
    assert all(0.05 <= pause <= 0.15 for pause in (one[0], other[0]))
    assert all(1.0 <= pause <= 3.0 for pause in one[-10:] + other[-10:])
    assert one != other and len(set(one[-10:])) == 10
    assert 16 < sum(one) < 52


async def test_a_caller_who_is_cancelled_in_a_pause_leaves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.rpc.retry._FIRST_PAUSE_S", 1000.0)
    monkeypatch.setattr("deployments.rpc.retry._MAX_PAUSE_S", 1000.0)
    is_lost = asyncio.Event()
    task = asyncio.create_task(retried(fails_with(TimeoutError()), on_retry=lambda _: is_lost.set()))
    await is_lost.wait()
    started = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - started < 5
