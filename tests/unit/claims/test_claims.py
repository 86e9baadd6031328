import asyncio
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError

from deployments.claims.deployment import Claims, ClaimsConfig, QueueFullError, RunUpdate, SupersededError
from pyramid_serve.api import (
    Stage,
    Status,
    TimelineEntry,
    VideoError,
    VideoRecord,
    VideoRequest,
    VideoSpec,
    new_record,
    resolve,
)
from pyramid_serve.checkpoints import Capabilities
from pyramid_serve.storage import VideoNotFoundError, VideoStore

pytestmark = pytest.mark.asyncio

SPEC: VideoSpec = resolve(VideoRequest(prompt="a", seed=1, seconds=1), Capabilities(), "mini")
QUICK: dict[str, Any] = {"lease_s": 60.0, "sweep_interval_s": 0.05, "backoff_s": 0.01}
BROKEN = VideoError(code="server_error", message="ValueError: broken")


class FakeOrchestrators:
    """Notes which videos it is given; a run ends when it is let go."""

    def __init__(self) -> None:
        self.given: list[str] = []
        self.stopped: list[str] = []
        self.ends: dict[str, asyncio.Future[None]] = {}

    async def run(self, video_id: str) -> None:
        self.given.append(video_id)
        self.ends[video_id] = asyncio.get_running_loop().create_future()
        await self.ends[video_id]

    async def stop(self, video_id: str) -> None:
        self.stopped.append(video_id)


@asynccontextmanager
async def claims_of(root: Path, orchestrators: FakeOrchestrators, **settings: Any) -> AsyncIterator[Claims]:
    claims = Claims.__new__(Claims)
    config = ClaimsConfig(**{**QUICK, **settings})
    await claims.__init__(str(root), config, orchestrators=orchestrators)  # type: ignore[misc]
    try:
        yield claims
    finally:
        for task in (*claims._tasks, *claims._runs.values()):
            task.cancel()


@pytest.fixture
def orchestrators() -> FakeOrchestrators:
    return FakeOrchestrators()


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


async def submitted(claims: Claims, **fields: Any) -> VideoRecord:
    return await claims.submit(new_record(SPEC, **fields))


async def claimed(claims: Claims, video_id: str, owner: str = "a") -> VideoRecord:
    record = await claims.claim(video_id, owner)
    assert record is not None
    return record


def end_lease(claims: Claims, video_id: str) -> None:
    """As if its owner had been silent for so long."""
    claims._leases[video_id] = 0


async def test_a_video_is_given_out_at_once_and_granted_once(tmp_path: Path, orchestrators: FakeOrchestrators) -> None:
    async with claims_of(tmp_path, orchestrators) as claims:
        record = await submitted(claims)
        await eventually(lambda: orchestrators.given == [record.id])
        granted = await claimed(claims, record.id)
        assert (granted.owner, granted.attempts) == ("a", 1)
        assert await claims.claim(record.id, "b") is None


async def test_videos_are_given_out_oldest_first_as_many_as_may_run(
    tmp_path: Path, orchestrators: FakeOrchestrators
) -> None:
    async with claims_of(tmp_path, orchestrators, max_running=2) as claims:
        ids = {(await submitted(claims)).id for _ in range(4)}
        await eventually(lambda: len(orchestrators.given) == 2)
        await asyncio.sleep(0.2)
        assert len(orchestrators.given) == 2
        waiting = ids - set(orchestrators.given)
        await claims.cancel(orchestrators.given[0])
        orchestrators.ends[orchestrators.given[0]].set_result(None)
        await eventually(lambda: len(orchestrators.given) == 3)
        assert orchestrators.given[2] == min(waiting)


async def test_a_silent_owner_loses_the_video_and_its_late_updates_count_for_nothing(
    tmp_path: Path, orchestrators: FakeOrchestrators
) -> None:
    async with claims_of(tmp_path, orchestrators) as claims:
        record = await submitted(claims)
        await eventually(lambda: record.id in orchestrators.ends)
        first = await claimed(claims, record.id)
        orchestrators.ends[record.id].set_result(None)
        end_lease(claims, record.id)
        await eventually(lambda: orchestrators.given.count(record.id) == 2)
        second = await claimed(claims, record.id, "b")
        assert second.attempts == 2
        assert not await claims.update(record.id, first.attempts, RunUpdate(num_steps_done=9))
        assert not await claims.complete(record.id, first.attempts, RunUpdate())
        assert not await claims.fail(record.id, first.attempts, BROKEN, is_final=True)
        assert await claims.update(record.id, second.attempts, RunUpdate(num_steps_done=1))
        assert (await claims.get(record.id)).num_steps_done == 1


async def test_an_owner_that_is_heard_of_keeps_the_video(tmp_path: Path, orchestrators: FakeOrchestrators) -> None:
    async with claims_of(tmp_path, orchestrators) as claims:
        record = await claimed(claims, (await submitted(claims)).id)
        for _ in range(3):
            lease = claims._leases[record.id]
            assert await claims.update(record.id, record.attempts, RunUpdate())
            assert claims._leases[record.id] > lease


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
        granted = await write_slowly(claims.claim(record.id, "a"))  # type: ignore[arg-type]
        assert claims._is_leased(record.id)
        news = RunUpdate(has_started=True)
        assert await write_slowly(claims.update(record.id, granted.attempts, news))  # type: ignore[arg-type]
        assert claims._is_leased(record.id)
        assert await claims.update(record.id, granted.attempts, RunUpdate())


async def test_the_death_of_an_orchestrator_is_answered_before_the_lease_runs_out(
    tmp_path: Path, orchestrators: FakeOrchestrators
) -> None:
    async with claims_of(tmp_path, orchestrators) as claims:
        record = await submitted(claims)
        await eventually(lambda: bool(orchestrators.given))
        await claimed(claims, record.id)
        orchestrators.ends[record.id].set_exception(RayActorError())
        await eventually(lambda: len(orchestrators.given) == 2)
        assert (await claimed(claims, record.id, "b")).attempts == 2


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
        assert await claims.claim(video_id, "b") is None


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


async def test_cancelling_ends_the_video_for_good_and_tells_every_orchestrator(
    tmp_path: Path, orchestrators: FakeOrchestrators
) -> None:
    async with claims_of(tmp_path, orchestrators) as claims:
        record = await claimed(claims, (await submitted(claims)).id)
        cancelled = await claims.cancel(record.id)
        assert cancelled.status is Status.FAILED and cancelled.error is not None
        assert cancelled.error.code == "cancelled"
        assert orchestrators.stopped == [record.id]
        assert not await claims.update(record.id, 1, RunUpdate())
        assert not await claims.complete(record.id, 1, RunUpdate())
        assert await claims.cancel(record.id) == cancelled
        assert VideoStore(str(tmp_path)).read(record.id) == cancelled


async def test_a_deleted_video_does_not_come_back(tmp_path: Path, orchestrators: FakeOrchestrators) -> None:
    async with claims_of(tmp_path, orchestrators) as claims:
        record = await claimed(claims, (await submitted(claims)).id)
        await claims.delete(record.id)
        assert not await claims.update(record.id, 1, RunUpdate(num_units_done=1))
        assert VideoStore(str(tmp_path)).ids() == []
        for ask in (claims.get, claims.cancel, claims.delete):
            with pytest.raises(VideoNotFoundError):
                await ask(record.id)


async def test_one_key_makes_one_video_also_after_a_restart(tmp_path: Path, orchestrators: FakeOrchestrators) -> None:
    async with claims_of(tmp_path, orchestrators) as claims:
        records = await asyncio.gather(*(submitted(claims, idempotency_key="k") for _ in range(5)))
        other = await submitted(claims, idempotency_key="other")
    async with claims_of(tmp_path, orchestrators) as claims:
        records.append(await submitted(claims, idempotency_key="k"))
    assert len({record.id for record in records}) == 1 and other.id != records[0].id
    assert len(VideoStore(str(tmp_path)).ids()) == 2


async def test_a_record_that_is_submitted_again_is_harmless(tmp_path: Path, orchestrators: FakeOrchestrators) -> None:
    async with claims_of(tmp_path, orchestrators) as claims:
        record = new_record(SPEC)
        await claims.submit(record)
        await claims.cancel(record.id)
        assert (await claims.submit(record)).status is Status.FAILED


async def test_more_videos_than_may_wait_are_refused(tmp_path: Path, orchestrators: FakeOrchestrators) -> None:
    async with claims_of(tmp_path, orchestrators, max_queued=2) as claims:
        await submitted(claims)
        await submitted(claims)
        with pytest.raises(QueueFullError) as caught:
            await submitted(claims, idempotency_key="k")
        assert caught.value.retry_after_s >= 1
        assert len(VideoStore(str(tmp_path)).ids()) == 2


async def test_of_videos_that_come_at_once_no_more_than_may_wait_are_accepted(
    tmp_path: Path, orchestrators: FakeOrchestrators
) -> None:
    async with claims_of(tmp_path, orchestrators, max_queued=3) as claims:
        answers = await asyncio.gather(*(submitted(claims) for _ in range(20)), return_exceptions=True)
        assert sum(isinstance(answer, QueueFullError) for answer in answers) == 17
        assert len(VideoStore(str(tmp_path)).ids()) == 3


async def test_after_a_restart_work_goes_on_once_the_owners_lease_is_over(
    tmp_path: Path, orchestrators: FakeOrchestrators
) -> None:
    async with claims_of(tmp_path, orchestrators) as claims:
        owned, queued = await claimed(claims, (await submitted(claims)).id), await submitted(claims)
    after = FakeOrchestrators()
    async with claims_of(tmp_path, after) as claims:
        await eventually(lambda: after.given == [queued.id])
        assert await claims.claim(owned.id, "b") is None
        # An owner that is still there is heard, one that is not loses the video.
        assert await claims.update(owned.id, owned.attempts, RunUpdate())
        end_lease(claims, owned.id)
        await eventually(lambda: after.given == [queued.id, owned.id])


async def test_a_record_that_another_replica_accepted_is_found(
    tmp_path: Path, orchestrators: FakeOrchestrators
) -> None:
    async with claims_of(tmp_path, orchestrators, rescan_interval_s=0.1):
        record = new_record(SPEC)
        VideoStore(str(tmp_path)).create(record)
        await eventually(lambda: orchestrators.given == [record.id])


async def test_a_replica_that_has_a_successor_grants_nothing(tmp_path: Path, orchestrators: FakeOrchestrators) -> None:
    async with claims_of(tmp_path, orchestrators) as old:
        record = await submitted(old)
        async with claims_of(tmp_path, orchestrators):
            with pytest.raises(SupersededError):
                await old.claim(record.id, "a")
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
        await claims.delete(record.id)
        with pytest.raises(VideoNotFoundError):
            await claims.watch(record.id, 10, 5.0)


async def test_place_and_eta_follow_the_queue(tmp_path: Path, orchestrators: FakeOrchestrators) -> None:
    async with claims_of(tmp_path, orchestrators) as claims:
        running = await claimed(claims, (await submitted(claims)).id)
        # Ids of one millisecond are in no order.
        first, second = sorted([await submitted(claims), await submitted(claims)], key=lambda record: record.id)
        assert (await claims.place(second.id)).eta_seconds is None
        for step in range(1, 4):
            await asyncio.sleep(0.02)
            await claims.update(running.id, 1, RunUpdate(has_started=True, num_steps_done=step))
        places = [await claims.place(record.id) for record in (running, first, second)]
        assert [place.position for place in places] == [None, 0, 1]
        seconds = [place.eta_seconds for place in places]
        assert all(left is not None for left in seconds)
        assert seconds[1] < seconds[2]  # type: ignore[operator]
        assert await claims.queue() == (2, 1)


async def test_what_has_expired_is_swept_away(tmp_path: Path, orchestrators: FakeOrchestrators) -> None:
    async with claims_of(tmp_path, orchestrators, retention_s=0.2) as claims:
        record = await submitted(claims)
        before = time.time()
        ended = await claims.cancel(record.id)
        assert ended.expires_at is not None and before <= ended.expires_at - 0.2 <= time.time()
        await eventually(lambda: VideoStore(str(tmp_path)).ids() == [])


async def test_an_owner_whose_call_hangs_holds_no_video(tmp_path: Path, orchestrators: FakeOrchestrators) -> None:
    async with claims_of(tmp_path, orchestrators, max_running=1) as claims:
        record = await submitted(claims)
        await eventually(lambda: record.id in orchestrators.ends)
        await claimed(claims, record.id)
        hanging = orchestrators.ends[record.id]
        end_lease(claims, record.id)
        await eventually(lambda: orchestrators.given.count(record.id) == 2)
        assert hanging.cancelled()
        assert (await claimed(claims, record.id, "b")).attempts == 2


async def test_a_video_whose_folder_was_removed_stops_no_other(
    tmp_path: Path, orchestrators: FakeOrchestrators
) -> None:
    async with claims_of(tmp_path, orchestrators) as claims:
        record = await claimed(claims, (await submitted(claims)).id)
        shutil.rmtree(tmp_path / "videos" / record.id)
        end_lease(claims, record.id)
        await eventually(lambda: record.id not in claims._records)
        other = await submitted(claims)
        await eventually(lambda: other.id in orchestrators.given)


async def test_a_caller_who_goes_away_leaves_no_record_half_changed(
    tmp_path: Path, orchestrators: FakeOrchestrators, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with claims_of(tmp_path, orchestrators) as claims:
        record = await claimed(claims, (await submitted(claims)).id)
        is_writing, may_write, update = threading.Event(), threading.Event(), VideoStore.update

        def slow_update(self: VideoStore, changed: VideoRecord) -> None:
            is_writing.set()
            may_write.wait(5)
            update(self, changed)

        monkeypatch.setattr(VideoStore, "update", slow_update)
        leaving = asyncio.create_task(claims.cancel(record.id))
        await asyncio.to_thread(is_writing.wait, 5)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        late = asyncio.create_task(claims.update(record.id, record.attempts, RunUpdate(num_steps_done=1)))
        await asyncio.sleep(0.05)
        may_write.set()
        assert await late is False
        await eventually(lambda: orchestrators.stopped == [record.id])
        assert VideoStore(str(tmp_path)).read(record.id).status is Status.FAILED


async def test_a_superseded_replica_says_that_it_is_not_well(tmp_path: Path, orchestrators: FakeOrchestrators) -> None:
    async with claims_of(tmp_path, orchestrators) as old:
        await old.check_health()
        async with claims_of(tmp_path, orchestrators) as new:
            with pytest.raises(SupersededError):
                await submitted(old)
            with pytest.raises(SupersededError):
                await old.check_health()
            await new.check_health()


async def test_asking_for_what_is_not_there_leaves_nothing(tmp_path: Path, orchestrators: FakeOrchestrators) -> None:
    async with claims_of(tmp_path, orchestrators) as claims:
        with pytest.raises(VideoNotFoundError):
            await claims.cancel(new_record(SPEC).id)
        assert len(claims._locks) == 0
