"""The engine with no Ray and, but for the last test, no model."""

import asyncio
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deployments.pools.engine import Engine, Slot
from deployments.pools.packing import PATIENCE, choose_pack
from deployments.telemetry.forwards import Forward
from pyramid_serve.pyramid_flow.attention import block_attention
from pyramid_serve.pyramid_flow.noise import SeededNoise
from pyramid_serve.pyramid_flow.pack import ClipSequence, PromptEmbeds
from pyramid_serve.pyramid_flow.parts import load_transformer
from pyramid_serve.pyramid_flow.sampler import UnitSteps, denoise_unit, run_units
from pyramid_serve.pyramid_flow.settings import SamplingSettings
from pyramid_serve.pyramid_flow.shapes import LatentShape
from tests.unit.pools.engine_at_hand import Gate, Steps, Work, answer, unit

pytestmark = pytest.mark.asyncio


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
