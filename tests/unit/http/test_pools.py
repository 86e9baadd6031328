"""What replicas tell of themselves, as one answer for all who ask."""

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest

from deployments.http import pools as pools_module
from deployments.http.pools import Pools, busy_share
from deployments.telemetry.forwards import ReplicaStats

STATS = ReplicaStats(
    replica="one", at=100.0, num_forwards=0, num_slots=0, num_tokens=0, busy_seconds=10.0, num_present=3, queue_depth=0
)


class Handle:
    """A deployment whose replicas answer with these; an error instead is raised."""

    def __init__(self, *answers: ReplicaStats) -> None:
        self.answers: list[ReplicaStats | Exception] | Exception = list(answers)
        self.num_asked = 0

    def broadcast(self, method: str) -> Any:
        assert method == "stats"
        self.num_asked += 1
        return self

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[ReplicaStats | Exception]:
        assert return_exceptions
        if isinstance(self.answers, Exception):
            raise self.answers
        await asyncio.sleep(0)
        return self.answers


def later(seconds: float, busy: float) -> ReplicaStats:
    return replace(STATS, at=STATS.at + seconds, busy_seconds=STATS.busy_seconds + busy)


def test_the_share_is_that_of_the_replicas_seen_twice() -> None:
    before = {"one": STATS, "gone": replace(STATS, replica="gone")}
    new = replace(STATS, replica="new", busy_seconds=500.0)
    assert busy_share(before, {"one": later(4, 1)}) == pytest.approx(0.25)
    assert busy_share(before, {"one": later(4, 1), "new": new}) == pytest.approx(0.25)
    assert busy_share(before, {"one": later(4, 5)}) == 1.0
    assert busy_share({}, {"new": new}) is None


@pytest.mark.asyncio
async def test_all_who_ask_at_once_have_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Handle(STATS)
    pools = Pools({"shapes": {"denoiser": handle}})
    answers = await asyncio.gather(*(pools.status() for _ in range(20)))
    assert handle.num_asked == 1
    (pool,) = answers[0][0].pools
    assert (pool.part, pool.num_replicas, pool.busy, pool.num_ongoing) == ("denoiser", 1, None, 3)
    await pools.status()
    assert handle.num_asked == 1, "asked again within moments"
    monkeypatch.setattr(pools_module, "_KEPT_S", 0.0)
    time.sleep(0.001)
    handle.answers = [later(4, 1)]
    assert (await pools.status())[0].pools[0].busy == pytest.approx(0.25)


@pytest.mark.asyncio
async def test_a_pool_that_does_not_answer_has_no_replicas() -> None:
    silent, other = Handle(), Handle(STATS)
    silent.answers = TimeoutError("no answer")
    (model,) = await Pools({"shapes": {"text_encoder": silent, "denoiser": other}}).status()
    assert [pool.num_replicas for pool in model.pools] == [0, 1]


@pytest.mark.asyncio
async def test_a_replica_that_ends_does_not_hide_the_others() -> None:
    handle = Handle(STATS, replace(STATS, replica="two"))
    handle.answers = [STATS, RuntimeError("ends"), replace(STATS, replica="two")]
    (model,) = await Pools({"shapes": {"denoiser": handle}}).status()
    assert model.pools[0].num_replicas == 2
