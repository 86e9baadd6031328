"""What fails in the engine, and what goes on beside it."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence

import pytest
import torch

from deployments.errors import DeviceFailedError
from deployments.pools.compute_thread import ComputeThread
from deployments.pools.engine import Engine
from tests.unit.pools.engine_at_hand import Gate, Steps, Work, answer, unit

pytestmark = pytest.mark.asyncio


def broken_unit(num_good_steps: int) -> Steps:
    yield from unit("broken", num_good_steps)
    raise LookupError("a unit's own error")


@pytest.mark.parametrize("num_good_steps", [0, 2])
async def test_an_error_between_forwards_fails_its_unit_alone(num_good_steps: int) -> None:
    engine = Engine(answer)
    good, bad = await asyncio.gather(
        engine.run(unit("a", 5), submitted_at=0),
        engine.run(broken_unit(num_good_steps), submitted_at=0),
        return_exceptions=True,
    )
    assert isinstance(bad, LookupError)
    assert isinstance(good, list)
    assert len(good) == 5


async def test_of_a_failed_pack_only_what_fails_alone_fails() -> None:
    def failing(requests: Sequence[Work]) -> list[str]:
        if Work("b", 1) in requests:
            raise ArithmeticError("b1")
        return answer(requests)

    gate = Gate(failing)
    engine = Engine(gate)
    first = asyncio.create_task(engine.run(unit("x", 1), submitted_at=0))
    await gate.wait()
    rest = [asyncio.create_task(engine.run(unit(name, 3), submitted_at=at)) for at, name in enumerate("abc", start=1)]
    await asyncio.sleep(0)
    gate.let(10)
    a, b, c = await asyncio.gather(*rest, return_exceptions=True)
    assert await first == ["x0"]
    assert a == ["a0", "a1", "a2"]
    assert isinstance(b, ArithmeticError)
    assert c == ["c0", "c1", "c2"]
    assert gate.packs == ["x", "abc", "abc", "a", "b", "c", "ac"]


async def test_a_forward_that_runs_out_of_an_iterator_hangs_nobody() -> None:
    engine: Engine[Work, str] = Engine(lambda requests: [next(iter(()))])
    with pytest.raises(RuntimeError, match="a forward raised StopIteration"):
        await asyncio.wait_for(engine.run(unit("a", 1), submitted_at=0), timeout=5)


async def test_a_forward_with_too_few_responses_is_an_error() -> None:
    engine: Engine[Work, str] = Engine(lambda requests: [])
    with pytest.raises(ValueError, match="0 responses to 1 requests"):
        await engine.run(unit("a", 1), submitted_at=0)


def forward_within(num_tokens: int) -> Callable[[Sequence[Work]], list[str]]:
    def forward(requests: Sequence[Work]) -> list[str]:
        if sum(request.num_tokens for request in requests) > num_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answer(requests)

    return forward


@pytest.mark.parametrize("token_budget", [None, 1000])
async def test_out_of_memory_halves_the_budget_and_goes_on(token_budget: int | None) -> None:
    are_all_there = threading.Event()
    forward = forward_within(30)

    def waiting_forward(requests: Sequence[Work]) -> list[str]:
        are_all_there.wait(5)
        return forward(requests)

    engine = Engine(waiting_forward, token_budget=token_budget)
    units = [asyncio.create_task(engine.run(unit("a", 5, num_tokens=10), submitted_at=0)) for _ in range(8)]
    await asyncio.sleep(0)
    are_all_there.set()
    results = await asyncio.gather(*units)
    assert all(result == ["a0", "a1", "a2", "a3", "a4"] for result in results)
    budget = engine.stats().token_budget
    assert budget is not None
    assert 10 <= budget <= 40


async def test_a_unit_that_alone_is_out_of_memory_fails_alone() -> None:
    engine = Engine(forward_within(30), token_budget=100)
    small, big = await asyncio.gather(
        engine.run(unit("a", 5, num_tokens=10), submitted_at=0),
        engine.run(unit("b", 5, num_tokens=31), submitted_at=0),
        return_exceptions=True,
    )
    assert isinstance(small, list)
    assert len(small) == 5
    assert isinstance(big, torch.OutOfMemoryError)


async def test_each_forward_for_which_memory_is_too_little_is_told() -> None:
    told: list[None] = []
    engine = Engine(forward_within(30), token_budget=100, on_out_of_memory=lambda: told.append(None))
    await engine.run(unit("a", 5, num_tokens=10), submitted_at=0)
    assert len(told) == 0
    with pytest.raises(torch.OutOfMemoryError):
        await engine.run(unit("b", 5, num_tokens=31), submitted_at=0)
    assert len(told) == 1


async def test_a_device_that_failed_for_good_fails_all_units_and_takes_no_more() -> None:
    packs = []
    is_running, may_fail = threading.Event(), threading.Event()

    def forward(requests: Sequence[Work]) -> list[str]:
        packs.append(len(requests))
        is_running.set()
        may_fail.wait(5)
        raise torch.AcceleratorError("an illegal memory access was encountered")

    engine = Engine(forward)
    engine.check()
    first = asyncio.create_task(engine.run(unit("a", 2), submitted_at=0))
    await asyncio.to_thread(is_running.wait, 5)
    second = asyncio.create_task(engine.run(unit("b", 2), submitted_at=0))  # comes while the device fails
    await asyncio.sleep(0)
    assert engine.stats().num_present == 2
    may_fail.set()
    results = await asyncio.gather(first, second, return_exceptions=True)
    assert [type(result) for result in results] == [DeviceFailedError, DeviceFailedError]
    assert packs == [1]
    for work in (engine.run(unit("c", 1), submitted_at=0), engine.run_between_turns(lambda: None)):
        with pytest.raises(DeviceFailedError, match="illegal memory access"):
            await work
    with pytest.raises(DeviceFailedError, match="illegal memory access"):
        engine.check()


def fail() -> None:
    raise torch.AcceleratorError("an illegal memory access was encountered")


async def test_a_device_that_fails_between_turns_is_used_no_more() -> None:
    gate = Gate()
    engine = Engine(gate)
    running = asyncio.create_task(engine.run(unit("a", 3), submitted_at=0))
    await gate.wait()
    done: list[None] = []
    waiting = [
        asyncio.create_task(engine.run_between_turns(function)) for function in (fail, lambda: done.append(None))
    ]
    await asyncio.sleep(0)
    gate.let(3)
    for failed in (*waiting, running):
        with pytest.raises(DeviceFailedError, match="illegal memory access"):
            await failed
    assert gate.packs == ["a"] and done == []
    with pytest.raises(DeviceFailedError):
        engine.check()


@pytest.mark.parametrize("num_steps", [0, 1])
async def test_a_device_that_fails_between_forwards_fails_all_units(num_steps: int) -> None:
    def failing() -> Steps:
        yield from unit("b", num_steps)
        fail()
        return []

    gate = Gate()
    engine = Engine(gate)
    a = asyncio.create_task(engine.run(unit("a", 9), submitted_at=0))
    await gate.wait()
    b = asyncio.create_task(engine.run(failing(), submitted_at=1))
    await asyncio.sleep(0)
    gate.let(9)
    for failed in (a, b):
        with pytest.raises(DeviceFailedError, match="illegal memory access"):
            await failed
    assert gate.packs == ["a", "ab"][: 1 + num_steps]


async def test_a_device_that_hangs_fails_those_in_the_forward_and_those_that_wait_for_it() -> None:
    gate = Gate()  # which lets nothing through
    engine = Engine(gate, thread=ComputeThread("part", max_turn_s=0.2))
    first = asyncio.create_task(engine.run(unit("a", 2), submitted_at=0))
    await gate.wait()
    engine.check()
    waiting = asyncio.create_task(engine.run(unit("b", 2), submitted_at=1))
    between = asyncio.create_task(engine.run_between_turns(lambda: None))
    results = await asyncio.wait_for(asyncio.gather(first, waiting, between, return_exceptions=True), 5)
    assert [type(result) for result in results] == [DeviceFailedError] * 3
    assert engine.stats().num_present == 0
    with pytest.raises(DeviceFailedError, match="hangs"):
        engine.check()
    with pytest.raises(DeviceFailedError, match="hangs"):
        await asyncio.wait_for(engine.run(unit("c", 1), submitted_at=2), 0.1)
    gate.let(10)  # too late
    await asyncio.sleep(0.05)
    assert gate.packs == ["a"]


async def test_slots_that_run_alone_after_a_failed_forward_have_a_whole_turn_each() -> None:
    def forward(requests: Sequence[Work]) -> list[str]:
        time.sleep(0.3)
        if len(requests) > 1:
            raise ArithmeticError
        return answer(requests)

    engine = Engine(forward, thread=ComputeThread("part", max_turn_s=0.7))
    assert await asyncio.gather(*(engine.run(unit(name, 1), submitted_at=0) for name in "abc"))
    engine.check()
