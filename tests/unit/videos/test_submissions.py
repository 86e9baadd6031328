"""Several new videos in one call of claims."""

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.claims.messages import Admitted
from deployments.claims.places import NOWHERE
from deployments.errors import QueueFullError
from deployments.videos.submissions import Submissions
from pyramid_serve.api import VideoRecord, new_record
from tests.unit.claims.claims_at_hand import PLAN

pytestmark = pytest.mark.asyncio


class FakeClaims:
    """Takes ``seconds`` for each call, and longer for those with a ``slow`` user; refuses those with a ``full`` one."""

    def __init__(self, seconds: float = 0.05) -> None:
        self.calls: list[int] = []
        self.submit = SimpleNamespace(remote=self._submit)
        self._seconds = seconds

    async def _submit(self, records: Sequence[VideoRecord]) -> list[Admitted | Exception]:
        self.calls.append(len(records))
        await asyncio.sleep(5.0 if any(record.user == "slow" for record in records) else self._seconds)
        return [QueueFullError(1, 2.0) if record.user == "full" else Admitted(record, NOWHERE) for record in records]


def submissions_to(claims: FakeClaims) -> Submissions:
    handle: Any = claims
    return Submissions(handle)


async def test_many_at_once_go_in_few_calls_and_each_gets_its_own_answer() -> None:
    claims = FakeClaims()
    submissions = submissions_to(claims)
    records = [new_record(PLAN) for _ in range(100)]
    assert [admitted.record for admitted in await asyncio.gather(*map(submissions.submit, records))] == records
    assert sum(claims.calls) == 100 and len(claims.calls) <= 8


async def test_one_alone_waits_for_nobody() -> None:
    claims = FakeClaims()
    record = new_record(PLAN)
    assert (await submissions_to(claims).submit(record)).record == record
    assert claims.calls == [1]


async def test_what_is_refused_is_refused_alone() -> None:
    submissions = submissions_to(FakeClaims())
    records = [new_record(PLAN, user="full" if number == 20 else None) for number in range(40)]
    answers = await asyncio.gather(*map(submissions.submit, records), return_exceptions=True)
    assert [isinstance(answer, QueueFullError) for answer in answers] == [number == 20 for number in range(40)]


async def test_who_leaves_takes_nobody_with_him() -> None:
    claims = FakeClaims()
    submissions = submissions_to(claims)
    tasks = [asyncio.create_task(submissions.submit(new_record(PLAN))) for _ in range(20)]
    await asyncio.sleep(0.01)
    for task in tasks[:10]:
        task.cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(answer, Admitted) for answer in answers] == [False] * 10 + [True] * 10
    assert sum(claims.calls) == 20  # claims may have accepted it by then, so it is sent all the same


async def test_a_slow_one_does_not_hold_up_those_that_come_later() -> None:
    submissions = submissions_to(FakeClaims())
    slow = asyncio.create_task(submissions.submit(new_record(PLAN, user="slow")))
    await asyncio.sleep(0)
    async with asyncio.timeout(2.0):
        await asyncio.gather(*(submissions.submit(new_record(PLAN)) for _ in range(20)))
    slow.cancel()
