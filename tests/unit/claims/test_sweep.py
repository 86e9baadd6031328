import asyncio
import errno
import os
import shutil
import time
from pathlib import Path

import pytest
from ray.exceptions import RayActorError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from deployments.claims.messages import RunUpdate
from deployments.claims.sweep import SteadyClock
from pyramid_serve.api import new_record
from pyramid_serve.storage import StorageError, VideoStore
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


async def test_a_video_is_given_out_at_once_and_granted_once(tmp_path: Path, orchestrators: FakeOrchestrators) -> None:
    async with claims_of(tmp_path, orchestrators) as claims:
        record = await submitted(claims)
        await eventually(lambda: orchestrators.given == [record.id])
        granted = await claimed(claims, record.id)
        assert (granted.owner, granted.attempts) == ("a", 1)
        assert await claims.claim(record.id, "b", "token") is None


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
        await eventually(lambda: record.id not in claims._ledger.records)
        other = await submitted(claims)
        await eventually(lambda: other.id in orchestrators.given)


async def test_after_a_restart_work_goes_on_once_the_owners_lease_is_over(
    tmp_path: Path, orchestrators: FakeOrchestrators
) -> None:
    async with claims_of(tmp_path, orchestrators) as claims:
        owned, queued = await claimed(claims, (await submitted(claims)).id), await submitted(claims)
    after = FakeOrchestrators()
    async with claims_of(tmp_path, after) as claims:
        await eventually(lambda: after.given == [queued.id])
        assert await claims.claim(owned.id, "b", "token") is None
        # An owner that is still there is heard, one that is not loses the video.
        assert await claims.update(owned.id, owned.attempts, RunUpdate())
        end_lease(claims, owned.id)
        await eventually(lambda: after.given == [queued.id, owned.id])


async def test_a_record_that_another_replica_accepted_is_found(
    tmp_path: Path, orchestrators: FakeOrchestrators
) -> None:
    async with claims_of(tmp_path, orchestrators, rescan_interval_s=0.1):
        record = new_record(PLAN)
        VideoStore(str(tmp_path)).create(record)
        await eventually(lambda: orchestrators.given == [record.id])


async def test_what_has_expired_is_swept_away(tmp_path: Path, orchestrators: FakeOrchestrators) -> None:
    async with claims_of(tmp_path, orchestrators, retention_s=0.2) as claims:
        record = await submitted(claims)
        before = time.time()
        ended = await claims.cancel(record.id)
        assert ended.expires_at is not None and before <= ended.expires_at - 0.2 <= time.time()
        await eventually(lambda: VideoStore(str(tmp_path)).ids() == [])


async def test_a_pool_without_a_replica_fails_no_cancelling_and_no_deleting(
    tmp_path: Path, orchestrators: FakeOrchestrators, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nobody(video_id: str) -> None:
        raise DeploymentUnavailableError(DeploymentID("Orchestrator", "app"))

    monkeypatch.setattr(orchestrators, "stop", nobody)
    async with claims_of(tmp_path, orchestrators) as claims:
        first, second = await submitted(claims), await submitted(claims)
        assert (await claims.cancel(first.id)).is_over
        await claims.delete(second.id, "token")


@pytest.mark.parametrize("name", ["video.json", "over.json"])
async def test_a_broken_entry_keeps_claims_neither_from_starting_nor_from_handing_out(
    tmp_path: Path, orchestrators: FakeOrchestrators, name: str
) -> None:
    async with claims_of(tmp_path, orchestrators) as claims:
        broken = await submitted(claims)
    path = tmp_path / "videos" / broken.id / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    after = FakeOrchestrators()
    async with claims_of(tmp_path, after, rescan_interval_s=0.05) as claims:
        whole = await submitted(claims)
        await eventually(lambda: whole.id in after.given)
        await claims.delete(broken.id, "token")
        assert VideoStore(str(tmp_path)).ids() == [whole.id]


async def test_a_clock_that_jumps_ahead_does_not_make_everything_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    wall, steady = 1e9, 5.0
    monkeypatch.setattr(time, "time", lambda: wall)
    monkeypatch.setattr(time, "monotonic", lambda: steady)
    clock = SteadyClock()
    wall, steady = wall + 50, steady + 49
    assert clock.time() == 1e9 + 50
    wall, steady = wall + 1e7, steady + 10
    assert clock.time() == 1e9 + 60
    wall, steady = wall - 1e7 - 100, steady + 10  # set right again, and a little back
    assert clock.time() == wall


async def test_a_video_whose_end_cannot_be_read_stops_no_other(
    tmp_path: Path, orchestrators: FakeOrchestrators
) -> None:
    async with claims_of(tmp_path, orchestrators, max_losses=1) as claims:
        broken = await claimed(claims, (await submitted(claims)).id)
        (tmp_path / "videos" / broken.id / "over.json").write_text('{"id"')
        end_lease(claims, broken.id)
        await asyncio.sleep(0.2)
        other = await submitted(claims)
        await eventually(lambda: other.id in orchestrators.given)


async def test_after_a_storage_was_away_for_more_than_a_lease_its_error_is_told_and_it_is_soon_used_again(
    tmp_path: Path, orchestrators: FakeOrchestrators, caplog: pytest.LogCaptureFixture
) -> None:
    async with claims_of(f"switched://{tmp_path}/storage", orchestrators, app_lease_s=1.0) as claims:
        before = await submitted(claims)
        with refusing(errno.ENOSPC):
            await asyncio.sleep(1.5)
            for ask in (claims.queue(), claims.cancel(before.id), submitted(claims)):
                with pytest.raises(StorageError, match="No space left on device"):
                    await ask
        await eventually(lambda: claims._holder.is_believed)
        after = await submitted(claims)
        await eventually(lambda: orchestrators.given == [before.id, after.id])
        assert not any(record.exc_info for record in caplog.records)
