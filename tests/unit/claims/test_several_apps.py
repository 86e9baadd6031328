"""Several apps on one storage: each video has one owner at a time, and any app answers for all."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from deployments.claims.deployment import Claims
from deployments.claims.messages import RunUpdate
from deployments.errors import SupersededError
from pyramid_serve.api import Status, VideoRecord, new_record
from pyramid_serve.storage import StorageError, VideoNotFoundError, VideoStore
from tests import switched_storage
from tests.unit.claims.claims_at_hand import (
    PLAN,
    FakeOrchestrators,
    claimed,
    claims_of,
    eventually,
    kill,
    submitted,
)
from tests.unit.storage_at_hand import root_at

pytestmark = pytest.mark.asyncio

APART: dict[str, Any] = {"app_lease_s": 1.0, "sweep_interval_s": 0.05, "lease_s": 60.0}
_ = switched_storage  # which registers a filesystem that does not create exclusively


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.slow)])
def root(request: pytest.FixtureRequest) -> str:
    """A storage that takes little time, so that no app is late to say that it is there."""
    return f"memory://{uuid4().hex}" if request.param == "memory" else str(request.getfixturevalue("bucket"))


class Workers:
    """Orchestrators that make each video in a few steps, and note when each was finished and by whom."""

    def __init__(self, made: Counter[str], *, unit_s: float = 0.01) -> None:
        self.claims: Claims
        self.is_alive = True
        self.num_begun = 0
        self._made = made
        self._unit_s = unit_s

    async def run(self, video_id: str) -> None:
        record = await self._insist(lambda: self.claims.claim(video_id, f"worker of {id(self)}", "token"))
        if record is None:
            return
        self.num_begun += 1
        for unit in range(record.num_units_done, PLAN.num_units):
            await asyncio.sleep(self._unit_s)
            update = RunUpdate(has_started=True, num_units_denoised=unit + 1, num_units_done=unit + 1)
            if not await self._insist(partial(self.claims.update, video_id, record.attempts, update)):
                return
        if await self._insist(lambda: self.claims.complete(video_id, record.attempts, RunUpdate())):
            self._made[video_id] += 1

    async def _insist(self, call: Callable[[], Any]) -> Any:
        """The answer, asked for again while the storage is slow, as orchestrators do; None of one that was killed."""
        while self.is_alive:
            try:
                return await call()
            except StorageError:
                await asyncio.sleep(0.1)
        return None

    async def stop(self, video_id: str) -> None:
        pass

    async def are_ready(self) -> bool:
        return True


def submitted_to(claims: Claims) -> Any:
    return submitted(claims)


async def test_of_fifty_videos_none_is_lost_or_made_twice_while_apps_come_and_go(root: str) -> None:
    made: Counter[str] = Counter()
    records: list[VideoRecord] = []
    settings = {**APART, "max_running": 4, "app_lease_s": 4.0}
    async with AsyncExitStack() as apps:

        async def start(app: str) -> tuple[Claims, Workers]:
            workers = Workers(made)
            claims = await apps.enter_async_context(claims_of(root, workers, app=app, **settings))  # type: ignore[arg-type]
            workers.claims = claims
            return claims, workers

        first, first_workers = await start("first")
        second, second_workers = await start("second")
        for _ in range(10):
            records += [await submitted(first), await submitted(second)]
        await eventually(lambda: len(made) > 3, within_s=60)
        second_workers.is_alive = False  # killed
        kill(second)
        for _ in range(10):
            records.append(await submitted(first))
        third, _ = await start("third")  # the upgrade of the first
        for _ in range(10):
            records += [await submitted(first), await submitted(third)]
        await eventually(lambda: len(made) > 20, within_s=60)
        await asyncio.to_thread(first._holder.leave)  # stopped
        first_workers.is_alive = False
        kill(first)
        store = VideoStore(root)
        await eventually(lambda: store.holds.terms() == {}, within_s=60)
        ends = [await asyncio.wait_for(third.watch(record.id, record.revision, 5.0), 5.0) for record in records]
        assert all(end is not None and end.status is Status.COMPLETED for end in ends)
        assert set(made.values()) == {1}  # those whose worker was killed just when it had finished are not in it
        # Only what a process that is gone worked on, four videos at most, has a further attempt.
        assert sum(store.read(record.id).attempts - 1 for record in records) <= 2 * 4


async def test_both_apps_run_what_they_accepted_and_neither_takes_from_the_other(root: str) -> None:
    one, other = FakeOrchestrators(), FakeOrchestrators()
    async with claims_of(root, one, app="one", **APART) as a:
        record = await claimed(a, (await submitted(a)).id)
        async with claims_of(root, other, app="other", **APART) as b:
            its = await submitted(b)
            await eventually(lambda: other.given == [its.id])
            await asyncio.sleep(1.0)
            assert other.given == [its.id] and record.id not in other.given
            assert await a.update(record.id, record.attempts, RunUpdate(num_steps_done=1))
            await a.check_health()
            await b.check_health()


async def test_an_older_app_begins_nothing_new_once_a_newer_one_is_ready_and_finishes_what_it_runs(
    root: str,
) -> None:
    old, new = FakeOrchestrators(), FakeOrchestrators()
    async with claims_of(root, old, app="old", max_running=1, **APART) as a:
        running = await submitted(a)
        await eventually(lambda: old.given == [running.id])
        waiting = await submitted(a)
        granted = await claimed(a, running.id)
        async with claims_of(root, new, app="new", **APART) as b:
            await eventually(lambda: new.given == [waiting.id])
            late = await submitted(a)
            await eventually(lambda: new.given == [waiting.id, late.id])
            assert await a.complete(running.id, granted.attempts, RunUpdate())
            assert old.given == [running.id]
            assert (await claimed(b, late.id)).attempts == 1


async def test_where_the_newer_app_is_gone_the_older_one_goes_on(root: str) -> None:
    old, new = FakeOrchestrators(), FakeOrchestrators()
    async with claims_of(root, old, app="old", **APART) as a:
        async with claims_of(root, new, app="new", **APART):
            await eventually(lambda: a._holder.is_yielding)
        record = await submitted(a)
        await eventually(lambda: old.given == [record.id])


async def test_any_app_answers_for_a_video_of_another_and_can_cancel_and_delete_it(root: str) -> None:
    one, other = FakeOrchestrators(), FakeOrchestrators()
    async with claims_of(root, one, app="one", **APART) as a, claims_of(root, other, app="other", **APART) as b:
        first, second = await claimed(a, (await submitted(a)).id), await claimed(a, (await submitted(a)).id)
        watching = asyncio.create_task(b.watch(first.id, first.revision, 5.0))
        await a.update(first.id, first.attempts, RunUpdate(has_started=True))
        changed = await watching
        assert changed is not None and changed.status is Status.IN_PROGRESS
        waiting = [asyncio.create_task(app.watch(first.id, changed.revision, 5.0)) for app in (a, b)]
        cancelled = await b.cancel(first.id)
        assert await asyncio.gather(*waiting) == [cancelled, cancelled]
        await b.delete(second.id, "token")
        await eventually(lambda: not a._ledger.records)
        for record in (first, second):
            assert not await a.update(record.id, record.attempts, RunUpdate(num_steps_done=1))
        with pytest.raises(VideoNotFoundError):
            await a.get(second.id)


async def test_one_that_was_paused_for_a_lease_gives_up_what_the_other_took(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = FakeOrchestrators(), FakeOrchestrators()
    async with claims_of(root, one, app="one", **APART) as a:
        record = await claimed(a, (await submitted(a)).id)
        is_paused = True
        beat = a._holder.beat

        async def beat_unless_paused() -> bool:
            return await beat() if not is_paused else await asyncio.Event().wait()

        monkeypatch.setattr(a._holder, "beat", beat_unless_paused)
        kill(a)  # as if its process was stopped
        async with claims_of(root, other, app="other", **APART) as b:
            await eventually(lambda: other.given == [record.id])
            taken = await claimed(b, record.id, "b")
            assert taken.attempts == 2
            # It goes on, and finds that it may not write.
            for write in (
                a.update(record.id, record.attempts, RunUpdate(num_units_done=1)),
                a.complete(record.id, record.attempts, RunUpdate()),
                a.cancel(record.id),
                a.claim(record.id, "a", "again"),
            ):
                with pytest.raises(StorageError):
                    await write
            is_paused = False
            assert not await a._holder.beat()
            await a._sweep._takeover.scan()
            await a._holder.stand_again()
            assert record.id not in a._ledger.records
            assert not await a.update(record.id, record.attempts, RunUpdate(num_units_done=1))
            assert await b.update(record.id, taken.attempts, RunUpdate(num_units_done=1))


async def test_a_late_writer_does_not_undo_the_end(root: str) -> None:
    one, other = FakeOrchestrators(), FakeOrchestrators()
    store = VideoStore(root)
    async with claims_of(root, one, app="one", **APART) as a, claims_of(root, other, app="other", **APART) as b:
        record = await claimed(a, (await submitted(a)).id)
        ended = await b.cancel(record.id)
        store.update(record.changed(num_steps_done=3))  # it was on its way
        assert store.read(record.id) == ended
        assert [shown.status for shown in store.page()[0]] == [Status.FAILED]
        await eventually(lambda: not a._ledger.records)


async def test_one_key_makes_one_video_whichever_app_is_asked(root: str) -> None:
    one, other = FakeOrchestrators(), FakeOrchestrators()
    async with claims_of(root, one, app="one", **APART) as a, claims_of(root, other, app="other", **APART) as b:
        for number in range(10):
            asked = [submitted(app, idempotency_key=f"k{number}") for app in (a, b, a, b)]
            assert len({record.id for record in await asyncio.gather(*asked)}) == 1
        assert len(VideoStore(root).ids()) == 10


async def test_where_nothing_is_created_exclusively_the_second_app_stands_by_until_the_first_is_gone(
    tmp_path: Path,
) -> None:
    root = f"switched://{tmp_path}/storage"
    one, other = FakeOrchestrators(), FakeOrchestrators()
    async with claims_of(root, one, app="one", **APART) as a, claims_of(root, other, app="other", **APART) as b:
        await b.check_health()
        taken = await submitted(b)  # it is accepted, for the first app
        await eventually(lambda: one.given == [taken.id])
        await eventually(lambda: b._holder.is_ready)
        await asyncio.sleep(0.6)  # time for the first app to hear that the second one is ready
        late = [await submitted(app) for app in (a, b)]
        await eventually(lambda: set(one.given) == {taken.id, *(record.id for record in late)})
        assert other.given == []
        kill(a)
        await eventually(lambda: set(other.given) == set(one.given))


async def test_the_next_replica_of_an_app_takes_over_at_once_and_the_one_before_writes_no_more(root: str) -> None:
    one, other = FakeOrchestrators(), FakeOrchestrators()
    async with claims_of(root, one, **{**APART, "app_lease_s": 60.0}) as before:
        record = await claimed(before, (await submitted(before)).id)
        async with claims_of(root, other, **APART) as after:
            assert await after.update(record.id, record.attempts, RunUpdate(has_started=True))
            for write in (before.claim(record.id, "b", "token"), before.cancel(record.id), submitted(before)):
                with pytest.raises(SupersededError):
                    await write
            await asyncio.sleep(1.1)
            with pytest.raises(SupersededError):
                await before.update(record.id, record.attempts, RunUpdate(num_units_done=1))


@pytest.mark.parametrize("kind", ["local", pytest.param("s3", marks=pytest.mark.slow)])
async def test_many_who_want_one_video_at_once_make_it_once(kind: str, request: pytest.FixtureRequest) -> None:
    """Each takes the next term of the same video at the same moment."""
    with root_at(kind, request) as root:
        stores = [VideoStore(root) for _ in range(8)]
        record = new_record(PLAN)
        stores[0].create(record)
        generator = random.Random(0)
        for term in range(1, 8):
            generator.shuffle(stores)
            taken = await asyncio.gather(
                *(asyncio.to_thread(store.holds.take, record.id, term, f"holder {id(store)}") for store in stores)
            )
            assert taken.count(True) == 1


async def test_an_entry_among_the_holders_that_is_none_stops_no_app(tmp_path: Path) -> None:
    (tmp_path / "holders" / "folder").mkdir(parents=True)
    orchestrators = FakeOrchestrators()
    async with claims_of(tmp_path, orchestrators, **{**APART, "app_lease_s": 0.1}) as claims:
        await eventually(lambda: claims._holder.is_ready)
        assert claims._holder.has_others
        # Past the time after which what is left of a holder is removed, which a folder cannot be.
        await asyncio.sleep(1.5)
        claims._holder.lease_s = 60.0
        await eventually(lambda: claims._holder.is_believed)
        record = await submitted(claims)
        await eventually(lambda: orchestrators.given == [record.id])


async def test_what_was_seen_while_nothing_could_be_taken_is_taken_right_after(root: str) -> None:
    one, other = FakeOrchestrators(), FakeOrchestrators()
    async with claims_of(root, one, app="one", **APART) as a, claims_of(root, other, app="other", **APART) as b:
        record = await submitted(a)
        kill(a)
        b._holder._others = {name: sight._replace(since=0.0) for name, sight in b._holder._others.items()}
        b._holder._valid_until = 0.0  # as if it had been stopped for long, too
        await b._sweep._takeover.scan()
        await eventually(lambda: other.given == [record.id])


async def test_a_video_that_is_seen_before_its_record_is_written_is_taken_soon_after(root: str) -> None:
    old, new = FakeOrchestrators(), FakeOrchestrators()
    store, record = VideoStore(root), new_record(PLAN)
    async with claims_of(root, old, app="old", **APART) as a, claims_of(root, new, app="new", **APART) as b:
        await eventually(lambda: a._holder.is_yielding and b._holder.yields(a._holder.name))
        store.holds.accept(record.id, a._holder.name)
        await asyncio.sleep(0.3)  # while the older app writes the record
        store.create(record, holder=a._holder.name)
        await eventually(lambda: new.given == [record.id])
