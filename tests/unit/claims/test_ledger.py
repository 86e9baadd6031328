import asyncio
import errno
import logging
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from deployments.claims.messages import RunUpdate
from deployments.errors import SupersededError
from pyramid_serve.api import Stage, Status, TimelineEntry, VideoRecord, new_record
from pyramid_serve.storage import StorageError, VideoNotFoundError, VideoStore
from tests.switched_storage import refusing
from tests.unit.claims.claims_at_hand import (
    BROKEN,
    PLAN,
    FakeOrchestrators,
    claimed,
    claims_of,
    end_lease,
    eventually,
    submitted,
)

pytestmark = pytest.mark.asyncio


async def test_an_owner_that_is_heard_of_keeps_the_video(tmp_path: Path, orchestrators: FakeOrchestrators) -> None:
    async with claims_of(tmp_path, orchestrators) as claims:
        record = await claimed(claims, (await submitted(claims)).id)
        for _ in range(3):
            lease = claims._ledger._leases[record.id]
            assert await claims.update(record.id, record.attempts, RunUpdate())
            assert claims._ledger._leases[record.id] > lease


async def test_the_time_that_a_slow_storage_takes_is_not_the_owners_silence(
    tmp_path: Path, orchestrators: FakeOrchestrators, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with claims_of(tmp_path, orchestrators) as claims:
        record = await submitted(claims)
        is_writing, may_write, update = threading.Event(), threading.Event(), VideoStore.update

        def slow_update(self: VideoStore, changed: VideoRecord) -> None:
            is_writing.set()
            may_write.wait(5)
            update(self, changed)

        async def write_slowly(call: Coroutine[Any, Any, Any]) -> Any:
            is_writing.clear()
            may_write.clear()
            writing = asyncio.create_task(call)
            await asyncio.to_thread(is_writing.wait, 5)
            end_lease(claims, record.id)
            other = await submitted(claims)
            await eventually(lambda: other.id in orchestrators.given)  # the others are not held up
            may_write.set()
            return await writing

        monkeypatch.setattr(VideoStore, "update", slow_update)
        granted = await write_slowly(claims.claim(record.id, "a", "token"))  # type: ignore[arg-type]
        assert claims._ledger.is_leased(record.id)
        news = RunUpdate(has_started=True)
        assert await write_slowly(claims.update(record.id, granted.attempts, news))  # type: ignore[arg-type]
        assert claims._ledger.is_leased(record.id)
        assert await claims.update(record.id, granted.attempts, RunUpdate())


async def test_a_video_that_fails_again_and_again_is_given_up(tmp_path: Path, orchestrators: FakeOrchestrators) -> None:
    async with claims_of(tmp_path, orchestrators, max_attempts=3) as claims:
        video_id = (await submitted(claims)).id
        for _ in range(3):
            record = await claimed(claims, video_id)
            assert await claims.fail(video_id, record.attempts, BROKEN, is_final=False)
            await asyncio.sleep(0.05)
        record = await claims.get(video_id)
        assert record.status is Status.FAILED and record.error is not None
        assert record.error.code == "too_many_attempts" and "ValueError: broken" in record.error.message
        assert await claims.claim(video_id, "b", "token") is None


async def test_a_finished_unit_makes_failures_forgotten(tmp_path: Path, orchestrators: FakeOrchestrators) -> None:
    async with claims_of(tmp_path, orchestrators, max_attempts=2) as claims:
        video_id = (await submitted(claims)).id
        for unit in range(4):
            record = await claimed(claims, video_id)
            await claims.update(video_id, record.attempts, RunUpdate(num_units_denoised=unit + 1))
            await claims.fail(video_id, record.attempts, BROKEN, is_final=False)
        assert (await claims.get(video_id)).status is Status.QUEUED


async def test_in_progress_is_said_when_a_denoiser_has_it_and_progress_never_falls(
    tmp_path: Path, orchestrators: FakeOrchestrators
) -> None:
    async with claims_of(tmp_path, orchestrators) as claims:
        record = await claimed(claims, (await submitted(claims)).id)
        assert record.status is Status.QUEUED
        await claims.update(record.id, 1, RunUpdate(has_started=True, num_steps_done=5))
        await claims.update(record.id, 1, RunUpdate(has_started=True, num_steps_done=3))
        record = await claims.get(record.id)
        assert (record.status, record.num_steps_done) == (Status.IN_PROGRESS, 5)
        assert record.started_at is not None


async def test_an_update_that_is_sent_twice_counts_once(tmp_path: Path, orchestrators: FakeOrchestrators) -> None:
    async with claims_of(tmp_path, orchestrators) as claims:
        record = await claimed(claims, (await submitted(claims)).id)
        entry = TimelineEntry(stage=Stage.DECODE, unit=0, start=1.0, end=2.0, replica="r")
        update = RunUpdate(num_units_done=1, num_units_retried=1, timeline=(entry,))
        for _ in range(2):
            assert await claims.update(record.id, 1, update)
        record = await claims.get(record.id)
        assert record.timeline == (entry,) and record.num_units_retried == 1


async def test_a_replica_that_has_a_successor_grants_nothing(tmp_path: Path, orchestrators: FakeOrchestrators) -> None:
    async with claims_of(tmp_path, orchestrators) as old:
        record = await submitted(old)
        async with claims_of(tmp_path, orchestrators):
            with pytest.raises(SupersededError):
                await old.claim(record.id, "a", "token")
            with pytest.raises(SupersededError):
                await old.cancel(record.id)


async def test_those_who_watch_hear_of_each_change_and_of_the_end(
    tmp_path: Path, orchestrators: FakeOrchestrators
) -> None:
    async with claims_of(tmp_path, orchestrators) as claims:
        record = await claimed(claims, (await submitted(claims)).id)
        watching = asyncio.create_task(claims.watch(record.id, record.revision, 5.0))
        await asyncio.sleep(0.05)
        assert not watching.done()
        await claims.update(record.id, 1, RunUpdate(has_started=True))
        changed = await watching
        assert changed is not None and changed.status is Status.IN_PROGRESS
        assert await claims.watch(record.id, changed.revision, 0.05) is None
        watching = asyncio.create_task(claims.watch(record.id, changed.revision, 5.0))
        await asyncio.sleep(0.05)
        await claims.complete(record.id, 1, RunUpdate())
        done = await watching
        assert done is not None and done.status is Status.COMPLETED and done.progress == 100


async def test_those_who_watch_a_video_hear_that_it_was_deleted(
    tmp_path: Path, orchestrators: FakeOrchestrators
) -> None:
    async with claims_of(tmp_path, orchestrators) as claims:
        record = await submitted(claims)
        await claims.cancel(record.id)
        await claims.delete(record.id, "token")
        with pytest.raises(VideoNotFoundError):
            await claims.watch(record.id, 10, 5.0)


async def test_asking_for_what_is_not_there_leaves_nothing(tmp_path: Path, orchestrators: FakeOrchestrators) -> None:
    async with claims_of(tmp_path, orchestrators) as claims:
        with pytest.raises(VideoNotFoundError):
            await claims.cancel(new_record(PLAN).id)
        assert len(claims._ledger._locks) == 0


async def test_who_waits_hears_of_a_video_again_though_its_revision_went_back(
    tmp_path: Path, orchestrators: FakeOrchestrators
) -> None:
    async with claims_of(tmp_path, orchestrators) as claims:
        record = await claimed(claims, (await submitted(claims)).id)
        for step in range(1, 20):  # these are not saved each time
            await claims.update(record.id, 1, RunUpdate(has_started=True, num_steps_done=step))
        seen = await claims.get(record.id)
    async with claims_of(tmp_path, orchestrators) as claims:
        saved = await asyncio.wait_for(claims.watch(record.id, seen.revision, 5.0), 1.0)
        assert saved is not None and saved.revision < seen.revision
        assert await claims.watch(record.id, saved.revision, 0.1) is None  # once, not again and again
        ended = await claims.cancel(record.id)
        assert await asyncio.wait_for(claims.watch(record.id, seen.revision, 5.0), 1.0) == ended
        assert await asyncio.wait_for(claims.watch(record.id, ended.revision, 5.0), 1.0) == ended


async def test_what_loses_its_owner_again_and_again_waits_longer_each_time_and_is_given_up(
    tmp_path: Path, orchestrators: FakeOrchestrators
) -> None:
    async with claims_of(tmp_path, orchestrators, max_losses=4, backoff_s=10.0) as claims:
        video_id = (await submitted(claims)).id
        pauses = []
        for _ in range(3):
            record = await claimed(claims, video_id)
            end_lease(claims, video_id)
            await claims._sweep._lose_quietly(video_id, record.attempts, "gone")
            pauses.append((await claims.get(video_id)).not_before - time.time())
        assert pauses[0] <= 0 and pauses[1] == pytest.approx(10, abs=2) and pauses[2] == pytest.approx(20, abs=2)
        record = await claimed(claims, video_id)
        end_lease(claims, video_id)
        await claims._sweep._lose_quietly(video_id, record.attempts, "gone")
        record = await claims.get(video_id)
        assert record.error is not None and record.error.code == "too_many_attempts"


@pytest.mark.parametrize("is_suspect_first", [True, False])
async def test_a_death_counts_against_the_video_that_is_suspected_and_not_against_its_neighbours(
    tmp_path: Path, orchestrators: FakeOrchestrators, is_suspect_first: bool
) -> None:
    async with claims_of(tmp_path, orchestrators, backoff_s=0.001) as claims:
        suspect, neighbour = (await submitted(claims)).id, (await submitted(claims)).id
        for owner in ("first", "second"):
            record = await claimed(claims, suspect, owner)
            end_lease(claims, suspect)
            await claims._sweep._lose_quietly(suspect, record.attempts, "gone")
        records = [await claimed(claims, video_id, "third") for video_id in (suspect, neighbour)]
        for record in records if is_suspect_first else reversed(records):
            end_lease(claims, record.id)
            await claims._sweep._lose_quietly(record.id, record.attempts, "gone")
        assert [(await claims.get(video_id)).num_losses for video_id in (suspect, neighbour)] == [3, 0]


# --- while the storage refuses ----------------------------------------------------------------------------------------


async def test_a_video_whose_end_was_interrupted_is_completed_once_when_the_owner_asks_again(
    tmp_path: Path,
    orchestrators: FakeOrchestrators,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise StorageError(errno.ENOSPC, "full")

    caplog.set_level(logging.INFO, "deployments.claims.ledger")
    async with claims_of(tmp_path, orchestrators) as claims:
        record = await claimed(claims, (await submitted(claims)).id)
        with monkeypatch.context() as patched, pytest.raises(StorageError):
            patched.setattr(VideoStore, "settle", refuse)  # after the end was written
            await claims.complete(record.id, record.attempts, RunUpdate())
        assert claims._ledger.is_leased(record.id)
        assert await claims.complete(record.id, record.attempts, RunUpdate())
        assert (await claims.get(record.id)).status is Status.COMPLETED
        assert caplog.messages.count("completed") == 1


async def test_an_owner_that_is_answered_with_an_error_of_the_storage_keeps_the_video(
    tmp_path: Path, orchestrators: FakeOrchestrators
) -> None:
    async with claims_of(f"switched://{tmp_path}/storage", orchestrators) as claims:
        record = await claimed(claims, (await submitted(claims)).id)
        end_lease(claims, record.id)
        with refusing(errno.ENOSPC), pytest.raises(StorageError):
            await claims.complete(record.id, record.attempts, RunUpdate())
        assert claims._ledger.is_leased(record.id)


async def test_a_video_is_given_back_though_that_cannot_be_written(
    tmp_path: Path, orchestrators: FakeOrchestrators
) -> None:
    async with claims_of(f"switched://{tmp_path}/storage", orchestrators) as claims:
        record = await claimed(claims, (await submitted(claims)).id)
        with refusing(errno.ENOSPC):
            assert await claims.release(record.id, record.attempts)
            assert not await claims.update(record.id, record.attempts, RunUpdate(num_steps_done=1))
        again = await claimed(claims, record.id, "b")
        assert (again.owner, again.attempts, again.num_losses) == ("b", 2, 0)
