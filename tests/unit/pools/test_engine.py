"""The engine with no Ray and, but for the last test, no model: a unit is a generator, a forward a function."""

import asyncio
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deployments.errors import DeviceFailedError
from deployments.pools.engine import PATIENCE, REGROW_FORWARDS, Engine, Slot, TokenBudget, choose_pack
from deployments.telemetry.forwards import Forward
from pyramid_serve.pyramid_flow.attention import block_attention
from pyramid_serve.pyramid_flow.noise import SeededNoise
from pyramid_serve.pyramid_flow.pack import ClipSequence, PromptEmbeds
from pyramid_serve.pyramid_flow.parts import load_transformer
from pyramid_serve.pyramid_flow.sampler import UnitSteps, denoise_unit, run_units
from pyramid_serve.pyramid_flow.settings import SamplingSettings
from pyramid_serve.pyramid_flow.shapes import LatentShape

pytestmark = pytest.mark.asyncio

Steps = Generator[Sequence["Work"], Sequence[str], list[str]]


@dataclass(frozen=True)
class Work:
    """A request: step ``step`` of the unit ``name``."""

    name: str
    step: int
    num_tokens: int = 1
    shape: int = 0


def unit(name: str, num_steps: int, *, num_tokens: int = 1, shape: int = 0) -> Steps:
    """Asks for ``num_steps`` steps of one request each; returns the responses."""
    responses: list[str] = []
    for step in range(num_steps):
        responses.extend((yield (Work(name, step, num_tokens, shape),)))
    return responses


def answer(requests: Sequence[Work]) -> list[str]:
    return [f"{request.name}{request.step}" for request in requests]


class Gate:
    """A forward that tells what it was given and waits to be let through, a forward at a time."""

    def __init__(self, answer: Callable[[Sequence[Work]], list[str]] = answer) -> None:
        self.packs: list[str] = []
        self._answer = answer
        self._begun = threading.Semaphore(0)
        self._allowed = threading.Semaphore(0)

    def __call__(self, requests: Sequence[Work]) -> list[str]:
        self.packs.append("".join(request.name for request in requests))
        self._begun.release()
        assert self._allowed.acquire(timeout=10)
        return self._answer(requests)

    async def wait(self) -> str:
        """Until the next forward has begun: its slots' names."""
        assert await asyncio.to_thread(self._begun.acquire, timeout=10)
        return self.packs[-1]

    def let(self, num_forwards: int = 1) -> None:
        self._allowed.release(num_forwards)


async def test_a_unit_gets_its_own_responses_and_its_result_comes_back() -> None:
    engine = Engine(answer)
    results = await asyncio.gather(*(engine.run(unit(name, 3), submitted_at=0) for name in "abc"))
    assert results == [["a0", "a1", "a2"], ["b0", "b1", "b2"], ["c0", "c1", "c2"]]


async def test_units_join_and_leave_between_steps() -> None:
    gate = Gate()
    engine = Engine(gate)
    a = asyncio.create_task(engine.run(unit("a", 4), submitted_at=0))
    assert await gate.wait() == "a"
    b = asyncio.create_task(engine.run(unit("b", 2), submitted_at=1))
    await asyncio.sleep(0)
    gate.let(4)
    assert await a == ["a0", "a1", "a2", "a3"]
    assert await b == ["b0", "b1"]
    assert gate.packs == ["a", "ab", "ab", "a"]
    assert engine.stats().num_present == engine.stats().queue_depth == 0


async def test_the_oldest_go_first_up_to_the_budget() -> None:
    gate = Gate()
    engine = Engine(gate, token_budget=5)
    waiting = [engine.run(unit("x", 1, num_tokens=5), submitted_at=-1)]
    waiting += [engine.run(unit(name, 1, num_tokens=2), submitted_at=at) for name, at in (("c", 3), ("a", 1), ("b", 2))]
    tasks = [asyncio.create_task(run) for run in waiting]
    assert await gate.wait() == "x"
    gate.let(3)
    await asyncio.gather(*tasks)
    assert gate.packs == ["x", "ab", "c"]


async def test_a_unit_larger_than_the_budget_runs_alone() -> None:
    packs: list[list[str]] = []

    def forward(requests: Sequence[Work]) -> list[str]:
        packs.append(sorted({request.name for request in requests}))
        return answer(requests)

    engine = Engine(forward, token_budget=10)
    big = engine.run(unit("big", 5, num_tokens=25), submitted_at=0)
    small = [engine.run(unit(name, 5, num_tokens=3), submitted_at=1) for name in "ab"]
    assert len((await asyncio.gather(big, *small))[0]) == 5
    assert packs.count(["big"]) == 5
    assert all(pack == ["big"] or "big" not in pack for pack in packs)


async def test_at_most_max_slots_share_a_forward() -> None:
    gate = Gate()
    engine = Engine(gate, max_slots=2)
    tasks = [asyncio.create_task(engine.run(unit(name, 1), submitted_at=at)) for at, name in enumerate("xabc")]
    await gate.wait()
    gate.let(10)
    await asyncio.gather(*tasks)
    assert max(map(len, gate.packs)) == 2


async def test_only_requests_that_go_together_share_a_forward() -> None:
    gate = Gate()
    engine = Engine(gate, packs_with=lambda work: work.shape)
    tasks = [asyncio.create_task(engine.run(unit("x", 1, shape=9), submitted_at=0))]
    await gate.wait()
    for at, (name, shape) in enumerate([("a", 1), ("b", 2), ("c", 1), ("d", 2)], start=1):
        tasks.append(asyncio.create_task(engine.run(unit(name, 1, shape=shape), submitted_at=at)))
    await asyncio.sleep(0)
    gate.let(3)
    await asyncio.gather(*tasks)
    assert gate.packs == ["x", "ac", "bd"]


@pytest.mark.parametrize("big_is_older", [True, False])
async def test_none_starves_in_a_steady_stream_of_big_and_small(big_is_older: bool) -> None:
    """Simulated turns: new units come in as fast as the budget lets them, always older than what waits already."""
    loop = asyncio.get_running_loop()

    def slot(submitted_at: float, num_tokens: int) -> Slot:
        made = Slot(unit("x", 1), submitted_at=submitted_at, loop=loop)
        made.num_tokens = num_tokens
        return made

    waiting_big = slot(1.0 if big_is_older else 3.0, num_tokens=100)
    waiting_small = slot(3.0 if big_is_older else 1.0, num_tokens=10)
    too_big = slot(2.0, num_tokens=1000)
    watched = [waiting_big, waiting_small, too_big]
    served = {id(one): 0 for one in watched}
    longest = 0
    for turn in range(300):
        # Each stays: a video whose next unit comes at once. Beside them three new ones a turn, older than all.
        slots = [*watched, *(slot(0.5, num_tokens=size) for size in (100, 60, 10))]
        pack = choose_pack(slots, token_budget=120, max_slots=None)
        assert pack, turn
        assert sum(one.num_tokens for one in pack) <= 120 or len(pack) == 1
        for one in watched:
            one.missed_turns = 0 if one in pack else one.missed_turns + 1
            served[id(one)] += one in pack
            longest = max(longest, one.missed_turns)
    assert longest <= PATIENCE + len(watched)
    assert min(served.values()) >= 300 // (PATIENCE + 1 + len(watched))


async def test_young_units_end_while_older_ones_fill_the_budget_without_end() -> None:
    engine = Engine(answer, token_budget=10)
    endless = [unit("old", 10**9, num_tokens=num_tokens) for num_tokens in (10, 10, 6, 25)]
    older = [asyncio.create_task(engine.run(steps, submitted_at=0)) for steps in endless]
    young = [engine.run(unit("y", 20, num_tokens=num_tokens), submitted_at=1) for num_tokens in (1, 9, 40)]
    results = await asyncio.wait_for(asyncio.gather(*young), timeout=20)
    assert [len(result) for result in results] == [20, 20, 20]
    for task in older:
        task.cancel()
    await asyncio.gather(*older, return_exceptions=True)


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


async def test_a_cancelled_unit_is_out_before_the_next_forward() -> None:
    gate = Gate()
    engine = Engine(gate)
    closed = threading.Event()

    def noticing() -> Steps:
        try:
            return (yield from unit("b", 100))
        finally:
            closed.set()

    a = asyncio.create_task(engine.run(unit("a", 3), submitted_at=0))
    b = asyncio.create_task(engine.run(noticing(), submitted_at=1))
    await gate.wait()
    if gate.packs == ["a"]:
        gate.let()
        await gate.wait()
    assert gate.packs[-1] == "ab"
    b.cancel()
    with pytest.raises(asyncio.CancelledError):
        await b
    assert engine.stats().num_present == 1
    gate.let(10)
    await a
    assert gate.packs[-1] == "a"
    assert gate.packs.count("ab") == 1
    assert closed.wait(timeout=5)


async def test_a_unit_that_timed_out_leaves() -> None:
    def slow_answer(requests: Sequence[Work]) -> list[str]:
        time.sleep(0.005)
        return answer(requests)

    engine = Engine(slow_answer)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await engine.run(unit("a", 10_000), submitted_at=0)
    await engine.run_between_turns(lambda: None)  # the forward that was under way has ended
    before = engine.stats()
    for _ in range(3):
        await engine.run_between_turns(lambda: None)
    assert engine.stats().num_forwards == before.num_forwards
    assert before.num_present == 0


async def test_one_cancelled_before_it_began_never_runs() -> None:
    gate = Gate()
    engine = Engine(gate)
    a = asyncio.create_task(engine.run(unit("a", 1), submitted_at=0))
    await gate.wait()
    b = asyncio.create_task(engine.run(unit("b", 1), submitted_at=0))
    await asyncio.sleep(0)
    b.cancel()
    await asyncio.gather(b, return_exceptions=True)
    gate.let(10)
    await a
    await engine.run(unit("c", 1), submitted_at=0)
    assert gate.packs == ["a", "c"]


async def test_the_event_loop_is_free_during_a_forward() -> None:
    gate = Gate()
    engine = Engine(gate)
    task = asyncio.create_task(engine.run(unit("a", 1), submitted_at=0))
    await gate.wait()
    for _ in range(100):  # were the loop held by the forward, it could not come here and open the gate
        await asyncio.sleep(0)
    assert not task.done()
    gate.let()
    assert await task == ["a0"]


async def test_all_that_computes_runs_on_one_thread_and_no_two_steps_overlap() -> None:
    threads: set[int] = set()
    num_inside = 0

    def forward(requests: Sequence[Work]) -> list[str]:
        nonlocal num_inside
        num_inside += 1
        assert num_inside == 1
        threads.add(threading.get_ident())
        time.sleep(0.001)
        num_inside -= 1
        return answer(requests)

    def noting(name: str) -> Steps:
        threads.add(threading.get_ident())
        responses = yield from unit(name, 5)
        threads.add(threading.get_ident())
        return responses

    engine = Engine(forward)
    await asyncio.gather(*(engine.run(noting(name), submitted_at=0) for name in "abc"))
    await engine.run_between_turns(lambda: threads.add(threading.get_ident()))
    assert len(threads) == 1
    assert threads != {threading.get_ident()}


async def test_progress_is_told_on_the_event_loop_in_order_and_before_the_result() -> None:
    told: list[str | int] = []
    here = threading.get_ident()

    def on_start() -> None:
        assert threading.get_ident() == here
        told.append("start")

    def on_step(forward: Forward) -> None:
        assert threading.get_ident() == here
        assert forward.started <= forward.ended
        told.append(forward.num_tokens)

    engine = Engine(answer)
    await engine.run(unit("a", 3, num_tokens=7), submitted_at=0, on_start=on_start, on_step=on_step)
    assert told == ["start", 7, 7, 7]


async def test_other_work_has_its_turn_between_turns() -> None:
    gate = Gate()
    engine = Engine(gate)
    task = asyncio.create_task(engine.run(unit("a", 1000), submitted_at=0))
    await gate.wait()
    other = asyncio.create_task(engine.run_between_turns(lambda: len(gate.packs)))
    await asyncio.sleep(0.01)
    gate.let(3)
    assert await asyncio.wait_for(other, timeout=5) == 1
    task.cancel()
    gate.let(1000)
    await asyncio.gather(task, return_exceptions=True)


async def test_stats_count_forwards_slots_and_tokens() -> None:
    gate = Gate()
    engine = Engine(gate, token_budget=5)
    tasks = [asyncio.create_task(engine.run(unit("a", 2, num_tokens=2), submitted_at=at)) for at in range(3)]
    await gate.wait()
    assert engine.stats().num_present == 3
    gate.let(10)
    await asyncio.gather(*tasks)
    stats = engine.stats()
    assert (stats.num_slots, stats.num_tokens) == (6, 12)
    assert stats.mean_slots == 6 / stats.num_forwards
    assert stats.busy_seconds > 0


async def test_a_hook_that_fails_hangs_nobody() -> None:
    def on_forward(forward: Forward, stats: object) -> None:
        raise OSError("no dashboard")

    engine = Engine(answer, on_forward=on_forward)
    with pytest.raises(OSError, match="no dashboard"):
        await asyncio.wait_for(engine.run(unit("a", 2), submitted_at=0), timeout=5)


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


async def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="token_budget=0: must be at least 1"):
        Engine(answer, token_budget=0)
    with pytest.raises(ValueError, match="max_slots=-1: must be at least 1"):
        Engine(answer, max_slots=-1)


async def test_packed_by_the_engine_a_real_unit_comes_out_as_alone(miniflux: Path) -> None:
    transformer = load_transformer(miniflux)
    packs: list[int] = []

    def predict(sequences: Sequence[ClipSequence]) -> list[Tensor]:
        packs.append(len(sequences))
        with torch.inference_mode():
            return transformer(sequences, attention=block_attention)

    def steps(seed: int) -> UnitSteps:
        """Units of unlike videos: another prompt, length, size, number of finished units and of steps each."""
        generator = torch.Generator().manual_seed(seed)
        shape = LatentShape.of_pixels(height=64, width=64 * (1 + seed % 2), num_latent_frames=5)
        prompt, negative = (
            PromptEmbeds(torch.randn(3 + seed, 32, generator=generator), torch.randn(48, generator=generator))
            for _ in range(2)
        )
        history = torch.randn(16, seed, *shape.size_at(2), generator=generator)
        settings = SamplingSettings(num_inference_steps=(2, 3, 2), video_num_inference_steps=(1, 2 + seed, 2))
        return denoise_unit(prompt, negative, history, settings=settings, noise=SeededNoise(seed, shape))

    alone = [run_units(predict, [steps(seed)])[0] for seed in range(4)]
    packs.clear()
    engine: Engine[ClipSequence, Tensor] = Engine(predict)
    together = await asyncio.gather(*(engine.run(steps(seed), submitted_at=seed) for seed in range(4)))
    assert max(packs) == 8
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


async def test_a_halved_budget_grows_back_when_forwards_go_well() -> None:
    budget = TokenBudget(100)
    budget.ran_out_of_memory(90)
    assert budget.current == 45
    for _ in range(REGROW_FORWARDS):
        budget.went_well()
    assert budget.current == 90
    for _ in range(REGROW_FORWARDS):
        budget.went_well()
    assert budget.current == 100


async def test_a_budget_that_fails_again_is_tried_again_later() -> None:
    budget = TokenBudget(100)
    for _ in range(2):
        budget.ran_out_of_memory(100)
        for _ in range(REGROW_FORWARDS):
            budget.went_well()
    assert budget.current == 50
    for _ in range(REGROW_FORWARDS):
        budget.went_well()
    assert budget.current == 100


async def test_without_a_budget_there_is_none_again_after_a_while() -> None:
    budget = TokenBudget(None)
    budget.ran_out_of_memory(80)
    assert budget.current == 40
    for _ in range(REGROW_FORWARDS):
        budget.went_well()
    assert budget.current is None
    for _ in range(3):
        budget.ran_out_of_memory(80)
    assert budget.current == 10


async def test_an_engine_that_ran_out_of_memory_packs_as_much_as_before_after_a_while() -> None:
    is_short = True

    def forward(requests: Sequence[Work]) -> list[str]:
        if is_short and len(requests) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answer(requests)

    engine = Engine(forward, token_budget=40)
    await asyncio.gather(*(engine.run(unit(name, 2, num_tokens=10), submitted_at=0) for name in "abcd"))
    is_short = False
    assert engine.stats().token_budget == 10
    await engine.run(unit("e", 20 * REGROW_FORWARDS), submitted_at=0)
    assert engine.stats().token_budget == 40
