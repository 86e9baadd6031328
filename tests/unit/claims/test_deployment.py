import asyncio
import errno
import threading
from pathlib import Path

import pytest
from pydantic import ValidationError

from deployments.claims.config import ClaimsConfig
from deployments.claims.messages import RunUpdate
from deployments.errors import SupersededError
from pyramid_serve.api import Stage, Status, TimelineEntry, VideoRecord
from pyramid_serve.storage import VideoNotFoundError, VideoStore
from tests.switched_storage import refusing
from tests.unit.claims.claims_at_hand import FakeOrchestrators, claimed, claims_of, eventually, submitted
from tests.unit.metrics_at_hand import Told

pytestmark = pytest.mark.asyncio


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
        await claims.delete(record.id, "token")
        assert not await claims.update(record.id, 1, RunUpdate(num_units_done=1))
        assert VideoStore(str(tmp_path)).ids() == []
        await claims.delete(record.id, "token")  # the same call, made again
        for ask in (claims.get(record.id), claims.cancel(record.id), claims.delete(record.id, "another")):
            with pytest.raises(VideoNotFoundError):
                await ask


async def test_place_and_eta_follow_the_queue(
    tmp_path: Path, orchestrators: FakeOrchestrators, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.claims.places._MAX_KEPT_S", 0.0)
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


async def test_a_caller_who_goes_away_leaves_no_record_half_changed(
    tmp_path: Path, orchestrators: FakeOrchestrators, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with claims_of(tmp_path, orchestrators) as claims:
        record = await claimed(claims, (await submitted(claims)).id)
        is_writing, may_write, end = threading.Event(), threading.Event(), VideoStore.end

        def slow_end(self: VideoStore, changed: VideoRecord, *, term: int) -> VideoRecord:
            is_writing.set()
            may_write.wait(5)
            return end(self, changed, term=term)

        monkeypatch.setattr(VideoStore, "end", slow_end)
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


async def test_sweeps_measure_the_queue(told: Told, tmp_path: Path, orchestrators: FakeOrchestrators) -> None:
    async with claims_of(tmp_path, orchestrators, max_queued=7) as claims:
        records = [await submitted(claims) for _ in range(3)]
        await claimed(claims, records[0].id)
        await claims.update(records[0].id, 1, RunUpdate(has_started=True))
        await claims.cancel(records[1].id)
        await eventually(lambda: told.of("pyramid_serve_videos_queued")[-1:] == [1])
        assert told.of("pyramid_serve_videos_in_progress")[-1] == 1
        assert told.of("pyramid_serve_videos_queued_limit")[-1] == 7
        assert told.of("pyramid_serve_oldest_queued_seconds")[-1] > 0
        assert told.of("pyramid_serve_videos", outcome="cancelled") == [1]
        seen = told.of("pyramid_serve_sweep_timestamp_seconds")[-1]
        await eventually(lambda: told.of("pyramid_serve_sweep_timestamp_seconds")[-1] > seen)


async def test_a_storage_that_refuses_is_counted_and_sweeps_are_not(
    told: Told, tmp_path: Path, orchestrators: FakeOrchestrators
) -> None:
    async with claims_of(f"switched://{tmp_path}", orchestrators, app_lease_s=0.2) as claims:
        await eventually(lambda: len(told.of("pyramid_serve_sweep_timestamp_seconds")) > 1)
        assert told.of("pyramid_serve_storage_failures") == []
        with refusing(errno.EIO):
            await eventually(lambda: len(told.of("pyramid_serve_storage_failures")) > 2)
            await asyncio.sleep(0.5)  # longer than what this app has said of itself is believed
            num_sweeps = len(told.of("pyramid_serve_sweep_timestamp_seconds"))
            await asyncio.sleep(0.3)
            assert len(told.of("pyramid_serve_sweep_timestamp_seconds")) == num_sweeps
        await claims.check_health()


class Traces:
    """Keeps the records that it is to trace."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.records: list[VideoRecord] = []

    def send(self, record: VideoRecord) -> None:
        self.records.append(record)


async def test_a_video_is_traced_when_it_is_over_with_all_of_its_timeline(
    tmp_path: Path, orchestrators: FakeOrchestrators, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Traces] = []

    def traces_to(endpoint: str) -> Traces:
        made.append(Traces(endpoint))
        return made[-1]

    monkeypatch.setattr("deployments.telemetry.traces.traces_to", traces_to)
    entries = [TimelineEntry(stage=Stage.SAVE, unit=unit, start=unit, end=unit + 1, replica="a") for unit in (0, 1)]
    async with claims_of(tmp_path, orchestrators, traces_endpoint="http://collector:4318/v1/traces") as claims:
        done, cancelled, deleted = [await submitted(claims) for _ in range(3)]
        await claimed(claims, done.id)
        await claims.update(done.id, 1, RunUpdate(has_started=True, timeline=(entries[0],)))
        (traces,) = made
        assert traces.records == []
        await claims.complete(done.id, 1, RunUpdate(timeline=(entries[1],)))
        await claims.cancel(cancelled.id)
        await claims.delete(deleted.id, "token")
        assert [record.id for record in traces.records] == [done.id, cancelled.id]
        assert traces.records[0].timeline == tuple(entries) and traces.records[0].is_over
        assert traces.endpoint == "http://collector:4318/v1/traces"


async def test_nothing_is_traced_unless_an_address_is_given(
    tmp_path: Path, orchestrators: FakeOrchestrators, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.telemetry.traces.traces_to", lambda _: pytest.fail("traced"))
    async with claims_of(tmp_path, orchestrators) as claims:
        await claims.cancel((await submitted(claims)).id)


@pytest.mark.parametrize("endpoint", ["collector:4318", "ftp://collector", "http://"])
async def test_an_address_for_traces_that_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(ValidationError, match="traces_endpoint"):
        ClaimsConfig(traces_endpoint=endpoint)


async def test_an_address_for_traces_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.claims.config.find_spec", lambda name: None)
    with pytest.raises(ValidationError, match=r"pip install \"pyramid-serve\[otel\]\""):
        ClaimsConfig(traces_endpoint="http://collector:4318/v1/traces")
