"""One attempt at one video, with pools that go wrong."""

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import pytest_asyncio
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from deployments.errors import DeviceFailedError
from deployments.pools.wire import DecodeJob, UnitJob
from pyramid_serve.api import Status, VideoRecord
from pyramid_serve.errors import InputError, VideoNotFoundError
from pyramid_serve.storage import VideoFile
from tests.faulty_proxy import Fault, faulty_proxy
from tests.object_storage import bucket_at, reached_at
from tests.switched_storage import refusing
from tests.unit.claims.claims_at_hand import eventually
from tests.unit.metrics_at_hand import Told
from tests.unit.orchestrator.app_at_hand import App, app_of, request_of

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[App]:
    async with app_of(tmp_path, monkeypatch) as app:
        yield app


async def made(app: App) -> VideoRecord:
    record = await app.orchestrator.submit(request_of())
    return await asyncio.wait_for(app.orchestrator.wait(record.id), 20)


def move_after(app: App, unit: int) -> None:
    """Let another replica decode the units after this one."""

    async def before(job: DecodeJob) -> None:
        app.decoder.replica = "another" if job.unit > unit else "decoder"

    app.decoder.before = before


async def test_after_a_video_that_went_well_no_decoder_remembers_it_and_none_is_told(app: App) -> None:
    record = await made(app)
    assert record.status is Status.COMPLETED, record.error
    assert [job.is_last for job in app.decoder.jobs] == [False, False, False, True]
    assert (app.decoder.memories, app.decoder.forgotten) == ({}, [])


async def test_a_replica_that_a_video_has_left_is_told_to_forget_it(app: App) -> None:
    move_after(app, 1)
    record = await made(app)
    assert record.status is Status.COMPLETED, record.error
    await eventually(lambda: app.decoder.forgotten == [record.id])
    assert app.decoder.memories == {}


@pytest.mark.parametrize(
    "error", [DeploymentUnavailableError(DeploymentID("Decoder", "app")), RuntimeError("no router"), None]
)
async def test_a_video_is_finished_before_its_memory_is_freed_whatever_comes_of_that(
    app: App, error: Exception | None
) -> None:
    move_after(app, 1)
    statuses: list[Status] = []

    async def told() -> None:
        statuses.extend(app.store.read(video_id).status for video_id in app.store.ids())
        if error is not None:
            raise error
        await asyncio.Event().wait()  # it answers never

    app.decoder.on_forget = told
    record = await made(app)
    assert (record.status, record.attempts) == (Status.COMPLETED, 1), record.error
    await eventually(lambda: statuses == [Status.COMPLETED])
    async with asyncio.timeout(2):  # less than the time in which decoders are told
        while await app.orchestrator.running():
            await asyncio.sleep(0.01)


async def test_a_video_that_is_cancelled_while_it_is_decoded_is_forgotten(app: App) -> None:
    is_decoding = asyncio.Event()

    async def before(job: DecodeJob) -> None:
        if job.unit == 2:
            is_decoding.set()
            await asyncio.Event().wait()

    app.decoder.before = before
    record = await app.orchestrator.submit(request_of())
    await asyncio.wait_for(is_decoding.wait(), 20)
    await app.orchestrator.cancel(record.id)
    await eventually(lambda: app.decoder.forgotten == [record.id])
    assert app.decoder.memories == {}


async def test_a_unit_whose_replica_hangs_is_made_again_elsewhere(app: App) -> None:
    async def before(job: UnitJob) -> None:
        if len(app.denoiser.jobs) == 2:
            raise DeviceFailedError("the device hangs")

    app.denoiser.before = before
    record = await made(app)
    assert (record.status, record.attempts, record.num_units_retried) == (Status.COMPLETED, 1, 1)
    assert [job.unit for job in app.denoiser.jobs] == [0, 1, 1, 2, 3]


async def test_a_decoder_with_much_to_do_has_the_time_it_needs_and_knows_who_came_first(app: App) -> None:
    async def before(job: DecodeJob) -> None:
        if job.unit == 1:
            await asyncio.sleep(1.5)  # longer than stall_timeout_s

    app.decoder.before = before
    record = await made(app)
    assert (record.status, record.num_units_retried) == (Status.COMPLETED, 0), record.error
    assert [job.unit for job in app.decoder.jobs] == [0, 1, 2, 3]
    assert {job.submitted_at for job in app.decoder.jobs} == {record.created_at}


@pytest.mark.parametrize(
    ("error", "code", "num_attempts"),
    [
        (InputError("picture: too narrow"), "invalid_input", 1),
        (ValueError("/srv/model: does not fit"), "too_many_attempts", 4),
    ],
)
async def test_only_an_error_of_the_user_ends_a_video_at_once(
    app: App, error: Exception, code: str, num_attempts: int
) -> None:
    async def before(job: UnitJob) -> None:
        raise error

    app.denoiser.before = before
    record = await made(app)
    assert record.error is not None and record.error.code == code
    assert (record.status, record.attempts) == (Status.FAILED, num_attempts)
    assert "/srv" not in record.error.message


async def test_a_storage_that_refuses_for_a_while_fails_no_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.orchestrator.deployment._STORAGE_PAUSE_S", 0.1)
    async with app_of(f"switched://{tmp_path}/storage", monkeypatch, max_attempts=2, lease_s=0.5) as app:
        with refusing(errno.ENOSPC, containing="latents"):
            record = await app.orchestrator.submit(request_of())
            await eventually(lambda: len([job for job in app.denoiser.jobs if job.unit == 0]) > 3)
        record = await asyncio.wait_for(app.orchestrator.wait(record.id), 20)
        assert record.status is Status.COMPLETED, record.error
        assert record.attempts > 3 and record.num_failures == 0


async def test_a_storage_that_takes_no_record_for_a_while_fails_no_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.orchestrator.deployment._STORAGE_PAUSE_S", 0.1)
    async with app_of(f"switched://{tmp_path}/storage", monkeypatch, max_attempts=2, lease_s=0.5) as app:

        async def fill_the_disk(job: UnitJob) -> None:
            if job.unit == 1:
                app.denoiser.before = None
                refused.enter_context(refusing(errno.ENOSPC))

        app.denoiser.before = fill_the_disk
        with ExitStack() as refused:
            record = await app.orchestrator.submit(request_of())
            await eventually(lambda: app.denoiser.before is None)
            await asyncio.sleep(1.5)
        record = await asyncio.wait_for(app.orchestrator.wait(record.id), 20)
        assert record.status is Status.COMPLETED, record.error
        assert record.num_failures == 0


async def test_a_video_whose_picture_is_missing_fails_with_an_error_of_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with app_of(tmp_path, monkeypatch, lease_s=1.0, max_running=1) as app:
        app.denoiser.before = lambda _: _raise(VideoNotFoundError("no input.png"))
        record = await made(app)
        assert record.error is not None and record.error.message.startswith("4 attempts failed")


async def test_a_video_measures_its_wait_its_stages_and_the_cause_of_a_retry_once_each(
    told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def before(job: UnitJob) -> None:
        if len(app.denoiser.jobs) == 2:
            raise DeviceFailedError("the device hangs")

    async with app_of(tmp_path, monkeypatch) as app:
        app.denoiser.before = before
        assert (await made(app)).status is Status.COMPLETED
        labels = {"model": "tiny", "size": "64x64"}
        await eventually(lambda: len(told.of("pyramid_serve_video_seconds", **labels)) == 1)
    assert len(told.of("pyramid_serve_queue_wait_seconds", **labels)) == 1
    assert len(told.of("pyramid_serve_time_to_first_frame_seconds", **labels)) == 1
    assert told.of("pyramid_serve_stage_seconds", stage="denoise", **labels) == [1.0] * 4
    assert told.of("pyramid_serve_decode_hidden_share", **labels) == [1.0]
    assert told.of("pyramid_serve_calls_retried", cause="device_failed") == [1.0]


async def test_what_the_storage_refuses_is_counted(told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with app_of(f"switched://{tmp_path}/storage", monkeypatch) as app:
        with refusing(errno.ENOSPC, containing="latents"):
            await app.orchestrator.submit(request_of())
            await eventually(lambda: told.of("pyramid_serve_storage_failures") == [1.0])


async def _raise(error: Exception) -> None:
    raise error


# --- on an object storage ---------------------------------------------------------------------------------------------


async def made_on(app: App, num_videos: int) -> list[VideoRecord]:
    """The records of so many videos when they are over."""

    async def make(number: int) -> VideoRecord:
        record = await app.orchestrator.submit(request_of(number), f"key {number}")
        return await app.orchestrator.wait(record.id)

    async with asyncio.timeout(120):
        return list(await asyncio.gather(*map(make, range(num_videos))))


def check_made_at_once(app: App, records: list[VideoRecord]) -> None:
    """Nothing that went wrong was held against a video, and no unit was made twice."""
    for record in records:
        assert record.status is Status.COMPLETED, record.error
        assert (record.attempts, record.num_failures, record.num_losses) == (1, 0, 0)
        assert app.store.files.num_fragments(record.id) == record.plan.num_units
        assert app.store.files.size_of(record.id, VideoFile.VIDEO) > 0
    assert len(app.denoiser.jobs) == sum(record.plan.num_units for record in records)
    assert app.store.holds.terms() == {}


async def test_errors_of_an_object_storage_cost_no_attempt(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty_proxy(s3_endpoint) as proxy, bucket_at(s3_endpoint) as root, reached_at(proxy.url):
        async with app_of(root, monkeypatch, lease_s=5.0) as app:
            proxy.share, proxy.wait_s = 0.2, 0.1
            records = await made_on(app, 2)
            proxy.share = 0.0
            check_made_at_once(app, records)
            assert proxy.num_faults.total() > 10


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.3])
async def test_videos_are_made_at_the_first_attempt_on_a_storage_that_goes_wrong_all_the_time(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    with faulty_proxy(s3_endpoint) as proxy, bucket_at(s3_endpoint) as root, reached_at(proxy.url):
        async with app_of(root, monkeypatch, lease_s=5.0) as app:
            proxy.share, proxy.wait_s = share, 2.0
            records = await made_on(app, 12)
            proxy.share = 0.0
            check_made_at_once(app, records)
            assert all(proxy.num_faults[fault] > 10 for fault in Fault)


@pytest.mark.slow
async def test_a_storage_that_is_away_for_longer_than_anybody_waits_is_not_held_against_a_video(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("deployments.orchestrator.deployment._STORAGE_PATIENCE_S", 0.3)
    monkeypatch.setattr("deployments.orchestrator.deployment._STORAGE_PAUSE_S", 0.1)
    monkeypatch.setattr("deployments.orchestrator.lease._GIVE_UP_S", 0.5)
    with faulty_proxy(s3_endpoint) as proxy, bucket_at(s3_endpoint) as root, reached_at(proxy.url):
        proxy.faults = (Fault.SLOW_DOWN,)
        async with app_of(root, monkeypatch, lease_s=1.0, app_lease_s=1.0, max_attempts=2, max_losses=2) as app:

            async def go_away(job: UnitJob) -> None:
                if job.unit == 1:
                    proxy.share = 1.0

            app.denoiser.before = go_away
            making = asyncio.create_task(made_on(app, 1))
            await eventually(lambda: proxy.share == 1.0)
            await asyncio.sleep(2.0)
            app.denoiser.before = None
            proxy.share = 0.0
            (record,) = await making
            assert record.status is Status.COMPLETED, record.error
            told = " ".join(caplog.messages)
            assert "given back" in told and "Please reduce your request rate" in told
            assert "owner lost" not in told and "attempt failed" not in told


async def test_a_video_on_an_object_storage_goes_on_where_a_killed_app_left_it(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with app_of(bucket, monkeypatch) as app:

        async def hang(job: UnitJob) -> None:
            if job.unit == 2:
                await asyncio.Event().wait()

        app.denoiser.before = hang
        video_id = (await app.orchestrator.submit(request_of(), "a key")).id
        await eventually(lambda: len(app.store.files.load_latents(video_id)) == 2)
    async with app_of(bucket, monkeypatch, lease_s=0.5) as app:
        assert (await app.orchestrator.submit(request_of(), "a key")).id == video_id
        record = await asyncio.wait_for(app.orchestrator.wait(video_id), 20)
        assert record.status is Status.COMPLETED, record.error
        assert [job.unit for job in app.denoiser.jobs] == [2, 3]
        await app.orchestrator.delete(video_id)
        assert app.store.ids() == [] and app.store.holds.terms() == {} and app.store.keys.id_of("a key") is None
