"""Units that go on from the middle, with pools that hand out states."""

import asyncio
import errno
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from deployments.errors import DeviceFailedError
from deployments.orchestrator.kept_state import KeptState
from deployments.pools.wire import UnitJob
from pyramid_serve.api import Status, VideoRecord
from pyramid_serve.storage import VideoStore
from pyramid_serve.video_files import VideoFiles
from tests.switched_storage import refusing
from tests.unit.claims.claims_at_hand import eventually
from tests.unit.metrics_at_hand import Told
from tests.unit.orchestrator.app_at_hand import App, app_of, request_of
from tests.unit.storage_at_hand import accepted

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[App]:
    async with app_of(tmp_path, monkeypatch) as app:
        yield app


async def completed(app: App, video_id: str) -> VideoRecord:
    record = await asyncio.wait_for(app.orchestrator.wait(video_id), 20)
    assert record.status is Status.COMPLETED, record.error
    return record


async def submitted(app: App) -> str:
    return (await app.orchestrator.submit(request_of())).id


def states_in(app: App, video_id: str) -> list[str]:
    """The names of the states that are stored."""
    folder = Path(app.store.root) / "videos" / video_id / "states"
    return sorted(file.name for file in folder.iterdir()) if folder.exists() else []


def hanging_after(unit: int, app: App) -> None:
    """Let a unit hand out its states and then stand still."""

    async def after(job: UnitJob) -> None:
        if job.unit == unit:
            await asyncio.Event().wait()

    app.denoiser.after = after


async def test_a_unit_whose_replica_is_lost_goes_on_from_its_last_state(app: App, told: Told) -> None:
    async def after(job: UnitJob) -> None:
        if len(app.denoiser.jobs) == 2:
            raise DeviceFailedError("the device hangs")

    app.denoiser.states, app.denoiser.after = [b"first", b"last"], after
    record = await completed(app, await submitted(app))
    given = [(job.unit, job.state) for job in app.denoiser.jobs]
    assert given == [(0, None), (1, None), (1, b"last"), (2, None), (3, None)]
    assert (record.attempts, record.num_units_retried) == (1, 1)


async def test_a_unit_goes_on_from_its_last_state_when_its_app_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with app_of(tmp_path, monkeypatch) as app:
        app.denoiser.states = [b"first", b"last"]
        hanging_after(1, app)
        video_id = await submitted(app)
        await eventually(lambda: app.store.files.load_state(video_id, 1) == b"last")
    async with app_of(tmp_path, monkeypatch, lease_s=0.5) as app:
        app.denoiser.states = [b"of the next attempt"]
        record = await completed(app, video_id)
        assert [(job.unit, job.state) for job in app.denoiser.jobs] == [(1, b"last"), (2, None), (3, None)]
        assert (record.attempts, record.num_failures) == (2, 0)


async def test_no_state_outlives_its_unit(app: App) -> None:
    app.denoiser.states = [bytes([number]) for number in range(20)]
    video_id = await submitted(app)
    await completed(app, video_id)
    assert states_in(app, video_id) == []
    hanging_after(0, app)
    other = await submitted(app)
    await eventually(lambda: states_in(app, other) == ["000-1"])
    await app.orchestrator.delete(other)
    await eventually(lambda: not (Path(app.store.root) / "videos" / other).exists())


async def test_a_state_that_came_after_its_unit_is_removed_by_the_next_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with app_of(tmp_path, monkeypatch) as app:
        hanging_after(2, app)
        video_id = await submitted(app)
        await eventually(lambda: len(app.store.files.load_latents(video_id)) == 2)
        states = Path(app.store.root) / "videos" / video_id / "states"
        states.mkdir()
        (states / "001-1").write_bytes(b"late")
    async with app_of(tmp_path, monkeypatch, lease_s=0.5) as app:
        await completed(app, video_id)
        assert states_in(app, video_id) == []


async def test_a_storage_that_takes_no_state_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with app_of(f"switched://{tmp_path}/storage", monkeypatch) as app:

        async def after(job: UnitJob) -> None:
            await eventually(lambda: "state of unit" in caplog.text)
            if len(app.denoiser.jobs) == 1:
                raise DeviceFailedError("the device hangs")

        app.denoiser.states, app.denoiser.after = [b"first", b"last"], after
        with refusing(errno.ENOSPC, containing="states"):
            record = await completed(app, await submitted(app))
        assert [job.state for job in app.denoiser.jobs][:2] == [None, b"last"]
        assert (record.attempts, record.num_failures) == (1, 0)
        assert "state of unit 0 cannot be saved: storage " in caplog.text


async def test_after_an_error_a_unit_is_made_from_its_start(app: App) -> None:
    async def after(job: UnitJob) -> None:
        if job.unit == 0 and len(app.denoiser.jobs) == 1:
            await eventually(lambda: bool(states_in(app, job.video_id)))
            app.denoiser.states = []
            raise ValueError("it may be the state's fault")

    app.denoiser.states, app.denoiser.after = [b"state"], after
    record = await completed(app, await submitted(app))
    assert record.attempts == 2
    assert [(job.unit, job.state) for job in app.denoiser.jobs][:2] == [(0, None), (0, None)]
    assert states_in(app, record.id) == []


async def test_saved_states_are_counted(told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with app_of(tmp_path, monkeypatch) as app:
        app.denoiser.states = [b"state"]
        hanging_after(0, app)
        await submitted(app)
        labels = {"model": "tiny", "size": "64x64"}
        await eventually(lambda: told.of("pyramid_serve_unit_states_saved", **labels) == [1])


async def test_of_the_states_that_come_while_one_is_saved_only_the_last_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, saved, may_go_on = VideoStore(str(tmp_path)), list[bytes](), threading.Event()
    save_state = VideoFiles.save_state

    def slowly(self: VideoFiles, video_id: str, unit: int, attempt: int, state: bytes) -> bool:
        assert may_go_on.wait(10)
        saved.append(state)
        return save_state(self, video_id, unit, attempt, state)

    monkeypatch.setattr(VideoFiles, "save_state", slowly)
    record = accepted(store)
    kept = KeptState(store.files, record.id, 0, attempt=1, on_saved=lambda: None)
    async with asyncio.TaskGroup() as tasks:
        for number in range(5):
            kept.keep(bytes([number]), tasks)
            await asyncio.sleep(0.01)
        may_go_on.set()
    assert saved == [b"\x00", b"\x04"] and kept.newest == b"\x04"
    await kept.drop()
    assert kept.newest is None and store.files.load_state(record.id, 0) is None
