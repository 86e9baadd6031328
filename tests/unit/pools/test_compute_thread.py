"""A device that stops in the middle of a turn: who waits for it is told, and nobody waits for it again."""

import asyncio
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from deployments.errors import DeviceFailedError
from deployments.pools.compute_thread import LONGEST_TURNS, ComputeThread

pytestmark = pytest.mark.asyncio


@pytest.fixture
def device() -> Iterator[threading.Event]:
    """Until it is set, what waits for it hangs."""
    device = threading.Event()
    yield device
    device.set()  # or the thread would keep this process alive


def failures_of(failures: list[None]) -> ComputeThread:
    return ComputeThread("part", max_turn_s=0.2, on_failure=lambda: failures.append(None))


async def test_everybody_who_waits_for_a_thread_that_hangs_is_told_and_no_more_are_taken(
    device: threading.Event,
) -> None:
    failures: list[None] = []
    thread = failures_of(failures)
    thread.check()
    waiting = [asyncio.create_task(thread.run(device.wait)), asyncio.create_task(thread.run(lambda: None))]
    started = time.monotonic()
    for error in await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5):
        assert isinstance(error, DeviceFailedError) and "a turn of the part has taken more than 0.2 s" in str(error)
    assert 0.2 <= time.monotonic() - started < 2
    with pytest.raises(DeviceFailedError, match="hangs"):
        thread.check()
    started = time.monotonic()
    with pytest.raises(DeviceFailedError, match="hangs"):
        await thread.run(lambda: None)
    assert time.monotonic() - started < 0.1
    assert failures == [None]


async def test_a_thread_that_hangs_is_noticed_though_nobody_waits_for_it(device: threading.Event) -> None:
    thread = failures_of([])
    leaving = asyncio.create_task(thread.run(device.wait))
    await asyncio.sleep(0.05)
    leaving.cancel()
    await asyncio.sleep(0.3)
    with pytest.raises(DeviceFailedError, match="hangs"):
        thread.check()


async def test_a_thread_that_hung_is_used_no_more_even_if_it_goes_on(device: threading.Event) -> None:
    thread = failures_of([])
    with pytest.raises(DeviceFailedError):
        await thread.run(device.wait)
    device.set()
    await asyncio.sleep(0.05)
    with pytest.raises(DeviceFailedError, match="hangs"):
        await thread.run(lambda: None)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("deployments.pools.compute_thread.time", SimpleNamespace(monotonic=lambda: self.now))


async def test_only_a_turn_has_a_limit_and_not_the_time_between_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, thread = Clock(monkeypatch), failures_of([])
    for _ in range(3):
        clock.now += 60
        thread.check()
        with thread.turn():
            clock.now += 0.19
            thread.check()


async def test_a_turn_within_a_turn_has_the_whole_time_and_so_has_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, thread = Clock(monkeypatch), ComputeThread("part", max_turn_s=10)
    with thread.turn():
        clock.now += 9
        with thread.turn():
            clock.now += 9
            thread.check()
        clock.now += 9
        thread.check()
        clock.now += 90
        with pytest.raises(DeviceFailedError, match="more than 90"):
            thread.check()


async def test_a_turn_may_take_a_multiple_of_the_longest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, thread = Clock(monkeypatch), ComputeThread("part", max_turn_s=10)
    with thread.turn():
        clock.now += 9
    with thread.turn():
        clock.now += 9 * LONGEST_TURNS
        thread.check()
        clock.now += 1
        with pytest.raises(DeviceFailedError, match="hangs"):
            thread.check()


async def test_without_a_limit_a_turn_takes_as_long_as_it_takes() -> None:
    thread = ComputeThread("part")
    assert await thread.run(lambda: time.sleep(0.1) or "done") == "done"
    thread.check()


async def test_a_device_error_is_told_once_and_for_good() -> None:
    failures: list[None] = []
    thread = failures_of(failures)

    def fail() -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    for _ in range(2):
        with pytest.raises(DeviceFailedError, match="illegal memory access"):
            await thread.run(fail)
    assert failures == [None]
