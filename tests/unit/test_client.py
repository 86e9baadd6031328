"""Callers of the Ray-handle client who leave."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import numpy
import pytest

from deployments.client import Client, Frames
from pyramid_serve.api import VideoRecord, VideoRequest, new_record
from pyramid_serve.storage import VideoNotFoundError
from tests.serve.local_server import MODEL

pytestmark = pytest.mark.asyncio

REQUEST = VideoRequest(prompt="a ball", seed=1)


class Response:
    """What ``Client`` uses of a ``DeploymentResponse`` and of its generator; it runs only while it is awaited."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def __await__(self) -> Any:
        return self._work.__await__()

    def __aiter__(self) -> AsyncGenerator[Frames, None]:
        frames: AsyncGenerator[Frames, None] = self._work
        return frames

    def cancel(self) -> None:
        pass


class Method:
    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    def remote(self, *arguments: Any) -> Response:
        return Response(self._method(*arguments))


class Handle:
    def __init__(self, deployment: object) -> None:
        self._deployment = deployment

    def options(self, *, stream: bool) -> "Handle":
        assert stream
        return self

    def __getattr__(self, name: str) -> Method:
        return Method(getattr(self._deployment, name))


class Orchestrators:
    """One that accepts a video only when it is let to, and streams of which the first is lost after a unit."""

    def __init__(self) -> None:
        self.is_asked, self.may_accept, self.is_waited_for = (asyncio.Event() for _ in range(3))
        self.is_deleted = False
        self.keys: list[str] = []
        self.accepted: list[str] = []
        self.cancelled: list[str] = []

    async def submit(self, request: VideoRequest, key: str) -> VideoRecord:
        self.keys.append(key)
        self.is_asked.set()
        await self.may_accept.wait()
        record = new_record(MODEL.plan(request))
        self.accepted.append(record.id)
        return record

    async def wait(self, video_id: str) -> None:
        self.is_waited_for.set()
        await asyncio.Event().wait()

    async def cancel(self, video_id: str) -> None:
        if self.is_deleted:
            raise VideoNotFoundError(video_id)
        self.cancelled.append(video_id)

    async def stream(self, request: VideoRequest, key: str) -> AsyncGenerator[Frames, None]:
        self.keys.append(key)
        yield numpy.zeros((1, 8, 8, 3), numpy.uint8)
        raise TimeoutError

    async def frames(self, video_id: str, first_unit: int) -> AsyncGenerator[Frames, None]:
        for _ in range(first_unit, 3):
            yield numpy.ones((8, 8, 8, 3), numpy.uint8)


def client_of(orchestrators: Orchestrators) -> Client:
    return Client(Handle(orchestrators))  # type: ignore[arg-type]


def pause(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let the client pause about as long as this before it asks again."""
    for name in ("_FIRST_PAUSE_S", "_MAX_PAUSE_S"):
        monkeypatch.setattr(f"deployments.rpc.retry.{name}", seconds)


async def leave(task: "asyncio.Task[Any]", orchestrators: Orchestrators) -> None:
    """Cancel a task while its video is being accepted, and accept it."""
    async with asyncio.timeout(10):
        await orchestrators.is_asked.wait()
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done() and orchestrators.accepted == []
        orchestrators.may_accept.set()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_video_is_cancelled_that_is_accepted_after_its_caller_left() -> None:
    orchestrators = Orchestrators()
    await leave(asyncio.create_task(client_of(orchestrators).generate(REQUEST)), orchestrators)
    assert len(orchestrators.accepted) == 1 and orchestrators.cancelled == orchestrators.accepted


async def test_a_video_is_cancelled_whose_caller_leaves_while_it_is_waited_for() -> None:
    orchestrators = Orchestrators()
    orchestrators.may_accept.set()
    task = asyncio.create_task(client_of(orchestrators).generate(REQUEST))
    async with asyncio.timeout(10):
        await orchestrators.is_waited_for.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert orchestrators.cancelled == orchestrators.accepted


@pytest.mark.parametrize("video", ["deleted meanwhile", "never accepted"])
async def test_a_caller_who_leaves_is_told_of_no_other_error(video: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.client._LEAVE_S", 0.2)
    orchestrators = Orchestrators()
    orchestrators.is_deleted = True
    task = asyncio.create_task(client_of(orchestrators).generate(REQUEST))
    async with asyncio.timeout(10):
        if video == "deleted meanwhile":
            orchestrators.may_accept.set()
            await orchestrators.is_waited_for.wait()
        else:
            await orchestrators.is_asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("pause_s", [0, 10])
async def test_a_stream_that_is_left_after_its_replica_was_lost_cancels_its_video(
    pause_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause(monkeypatch, pause_s)  # 0: it is left while the video is being accepted
    orchestrators = Orchestrators()

    async def collect() -> int:
        return len([frames async for frames in client_of(orchestrators).stream(REQUEST)])

    await leave(asyncio.create_task(collect()), orchestrators)
    assert len(orchestrators.accepted) == 1 and orchestrators.cancelled == orchestrators.accepted
    assert len(set(orchestrators.keys)) == 1  # it is the same video


async def test_a_stream_that_is_closed_in_the_part_of_another_replica_cancels_its_video(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pause(monkeypatch, 0)
    orchestrators = Orchestrators()
    orchestrators.may_accept.set()
    stream = client_of(orchestrators).stream(REQUEST)
    assert [int((await anext(stream)).max()) for _ in range(2)] == [0, 1]
    await stream.aclose()
    assert len(orchestrators.accepted) == 1 and orchestrators.cancelled == orchestrators.accepted


async def test_a_stream_goes_on_where_its_replica_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    pause(monkeypatch, 0)
    orchestrators = Orchestrators()
    orchestrators.may_accept.set()
    units = [int(frames.max()) async for frames in client_of(orchestrators).stream(REQUEST)]
    assert units == [0, 1, 1] and orchestrators.cancelled == []
