"""The frames of a video for those who look at it, from what is saved of it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from deployments.client import Client
from deployments.errors import VideoFailedError
from deployments.pools.wire import UnitJob
from pyramid_serve.api import RequestError, Status
from pyramid_serve.errors import InputError, VideoNotFoundError
from tests.unit.claims.claims_at_hand import eventually
from tests.unit.orchestrator.app_at_hand import App, PoolHandle, app_of, request_of

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[App]:
    async with app_of(tmp_path, monkeypatch, max_running=1) as app:
        yield app


def client_of(app: App) -> Client:
    return Client(PoolHandle(app.orchestrator))  # type: ignore[arg-type]


def hold(app: App, *, seed: int, unit: int) -> asyncio.Event:
    """Let no more of a video be made than the units before this one, until the event is set."""
    may_go_on = asyncio.Event()

    async def before(job: UnitJob) -> None:
        if job.plan.seed == seed and job.unit == unit:
            await may_go_on.wait()

    app.denoiser.before = before
    return may_go_on


async def test_a_stream_yields_the_frames_of_each_unit_as_the_decoder_made_them(app: App) -> None:
    units = [frames async for frames in client_of(app).stream(request_of())]
    assert [len(frames) for frames in units] == [1, 8, 8, 8]
    assert [set(frames.ravel().tolist()) for frames in units] == [{0}, {10}, {20}, {30}]
    assert app.decoder.memories == {}


async def test_a_stream_waits_in_the_queue_as_any_other_video(app: App) -> None:
    may_go_on = hold(app, seed=1, unit=0)
    first = await app.orchestrator.submit(request_of(1))
    await eventually(lambda: len(app.denoiser.jobs) == 1)
    stream = client_of(app).stream(request_of(2))
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0.3)
    assert {job.video_id for job in app.denoiser.jobs} == {first.id}  # max_running=1
    may_go_on.set()
    assert len(await asyncio.wait_for(waiting, 20)) == 1
    await stream.aclose()


async def test_units_are_decoded_for_a_viewer_when_they_are_asked_for_while_the_video_goes_on(app: App) -> None:
    record = await app.orchestrator.submit(request_of())
    frames = client_of(app).frames(record.id)
    await anext(frames)
    assert (await asyncio.wait_for(app.orchestrator.wait(record.id), 20)).status is Status.COMPLETED
    viewed = [job.unit for job in app.decoder.jobs if job.video_id != record.id]
    assert viewed == [0]
    await anext(frames)
    await frames.aclose()
    assert [job.unit for job in app.decoder.jobs if job.video_id != record.id] == [0, 1]
    await eventually(lambda: app.decoder.memories == {})


async def test_a_viewer_who_begins_in_the_middle_gets_what_is_left(app: App) -> None:
    record = await app.orchestrator.submit(request_of())
    units = [frames async for frames in client_of(app).frames(record.id, 2)]
    assert [int(frames.max()) for frames in units] == [20, 30]
    viewed = [job for job in app.decoder.jobs if job.video_id != record.id]
    assert [(job.unit, None if job.earlier is None else len(job.earlier)) for job in viewed] == [
        (2, None),
        (2, 2),
        (3, None),
    ]


async def test_of_a_video_that_fails_the_units_there_are_come_first(app: App) -> None:
    async def before(job: UnitJob) -> None:
        if job.unit == 2:
            while (await app.orchestrator.get(job.video_id)).record.num_units_denoised < 2:
                await asyncio.sleep(0.01)
            raise InputError("picture: it is none")

    app.denoiser.before = before
    units: list[int] = []
    with pytest.raises(VideoFailedError, match="picture: it is none"):
        async for frames in client_of(app).stream(request_of()):
            units.append(int(frames.max()))
    assert units == [0, 10]


async def test_what_there_is_not_is_said(app: App) -> None:
    record = await app.orchestrator.submit(request_of())
    with pytest.raises(VideoNotFoundError):
        await app.orchestrator.frames_of("video_" + 32 * "0", 0, "a viewer")
    with pytest.raises(IndexError, match="unit=4"):
        await app.orchestrator.frames_of(record.id, 4, "a viewer")
    await app.orchestrator.wait(record.id)
    app.orchestrator._families.clear()
    with pytest.raises(RequestError, match="this server has"):
        await app.orchestrator.frames_of(record.id, 0, "a viewer")
    await app.orchestrator.leave(record.id, "a viewer")
    await app.orchestrator.leave("video_" + 32 * "0", "a viewer")
