import asyncio
import threading
from collections.abc import Sequence

import pytest
import torch

from deployments.pools.engine import Engine
from deployments.pools.token_budget import REGROW_FORWARDS, TokenBudget
from tests.unit.pools.engine_at_hand import Work, answer, unit

pytestmark = pytest.mark.asyncio


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
    may_begin = threading.Event()
    holding = asyncio.create_task(engine.run_between_turns(may_begin.wait))  # so that all four join in one turn
    await asyncio.sleep(0)
    units = [asyncio.create_task(engine.run(unit(name, 2, num_tokens=10), submitted_at=0)) for name in "abcd"]
    await asyncio.sleep(0)
    may_begin.set()
    await asyncio.gather(holding, *units)
    is_short = False
    assert engine.stats().token_budget == 10
    await engine.run(unit("e", 20 * REGROW_FORWARDS), submitted_at=0)
    assert engine.stats().token_budget == 40
