import asyncio
from pathlib import Path

import pytest

from deployments.errors import QueueFullError
from pyramid_serve.api import Status, new_record
from pyramid_serve.storage import VideoStore
from tests.unit.claims.claims_at_hand import PLAN, FakeOrchestrators, claims_of, submitted, submitted_as

pytestmark = pytest.mark.asyncio


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
        record = new_record(PLAN)
        await submitted_as(claims, record)
        await claims.cancel(record.id)
        assert (await submitted_as(claims, record)).status is Status.FAILED


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


async def test_a_key_whose_video_was_about_to_be_accepted_here_is_not_waited_for(
    tmp_path: Path, orchestrators: FakeOrchestrators
) -> None:
    record = new_record(PLAN, idempotency_key="k")
    VideoStore(str(tmp_path)).keys.bind("k", record.id)  # by a replica that died then
    async with claims_of(tmp_path, orchestrators) as claims:
        assert await asyncio.wait_for(submitted_as(claims, record), 4.0) == record


async def test_a_key_that_another_app_took_for_a_video_that_never_came_stands_for_the_video_made_here(
    tmp_path: Path, orchestrators: FakeOrchestrators, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.claims.admission._ACCEPTING_S", 0.1)
    keys = VideoStore(str(tmp_path)).keys
    async with claims_of(tmp_path, orchestrators) as claims:
        bind = claims._admission._store.keys.bind

        def bind_late(key: str, video_id: str) -> str:
            monkeypatch.setattr(claims._admission._store.keys, "bind", bind)
            keys.bind(key, new_record(PLAN).id)
            return bind(key, video_id)

        monkeypatch.setattr(claims._admission._store.keys, "bind", bind_late)
        record = await submitted(claims, idempotency_key="k")
        assert keys.id_of("k") == record.id
