"""Callers of the Ray-handle client who leave."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import aclosing
from typing import Any

import numpy
import pytest

from deployments.client import Client, Frames
from deployments.errors import VideoFailedError
from deployments.videos.view import VideoView
from pyramid_serve.api import RequestError, VideoError, VideoRecord, VideoRequest, new_record
from pyramid_serve.storage import VideoNotFoundError
from tests.serve.local_server import MODEL

pytestmark = pytest.mark.asyncio

REQUEST = VideoRequest(prompt="a ball", seed=1)


class Response:
    """What ``Client`` uses of a ``DeploymentResponse``; it runs only while it is awaited."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def __await__(self) -> Any:
        return self._work.__await__()

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

    def __getattr__(self, name: str) -> Method:
        return Method(getattr(self._deployment, name))


class Orchestrators:
    """They accept a video only when they are let to. The second call for frames is lost, as often as ``num_lost``."""

    def __init__(self) -> None:
        self.is_asked, self.may_accept, self.is_waited_for = (asyncio.Event() for _ in range(3))
        self.is_deleted = False
        self.keys: list[str] = []
        self.accepted: list[str] = []
        self.cancelled: list[str] = []
        self.record = new_record(MODEL.plan(REQUEST))
        self.is_over = False
        self.num_lost = 0
        self.failed_unit: int | None = None
        self.asked_for: list[tuple[int, str]] = []
        self.left: list[str] = []

    async def submit(self, request: VideoRequest, key: str) -> VideoRecord:
        self.keys.append(key)
        self.is_asked.set()
        await self.may_accept.wait()
        self.accepted.append(self.record.id)
        return self.record

    async def wait(self, video_id: str) -> VideoRecord:
        self.is_waited_for.set()
        if not self.is_over:
            await asyncio.Event().wait()
        return self.record

    async def cancel(self, video_id: str) -> None:
        if self.is_deleted:
            raise VideoNotFoundError(video_id)
        self.cancelled.append(video_id)

    async def get(self, video_id: str) -> VideoView:
        return VideoView(self.record)

    async def frames_of(self, video_id: str, unit: int, viewer: str) -> Frames:
        self.asked_for.append((unit, viewer))
        if self.num_lost and len(self.asked_for) > 1:
            self.num_lost -= 1
            raise TimeoutError
        if unit == self.failed_unit:
            raise VideoFailedError(video_id, VideoError(code="server_error", message="it had to fail"))
        return numpy.full((8, 8, 8, 3), unit, numpy.uint8)

    async def leave(self, video_id: str, viewer: str) -> None:
        self.left.append(viewer)


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


async def test_a_stream_that_is_left_while_its_video_is_being_accepted_cancels_it() -> None:
    orchestrators = Orchestrators()

    async def collect() -> int:
        return len([frames async for frames in client_of(orchestrators).stream(REQUEST)])

    await leave(asyncio.create_task(collect()), orchestrators)
    assert len(orchestrators.accepted) == 1 and orchestrators.cancelled == orchestrators.accepted


async def test_a_stream_that_is_closed_cancels_its_video_and_tells_that_nobody_looks() -> None:
    orchestrators = Orchestrators()
    orchestrators.may_accept.set()
    stream = client_of(orchestrators).stream(REQUEST)
    assert [int((await anext(stream)).max()) for _ in range(2)] == [0, 1]
    await stream.aclose()
    assert len(orchestrators.accepted) == 1 and orchestrators.cancelled == orchestrators.accepted
    assert orchestrators.left == [orchestrators.asked_for[0][1]]


async def test_a_viewer_who_leaves_cancels_nothing() -> None:
    orchestrators = Orchestrators()
    frames = client_of(orchestrators).frames(orchestrators.record.id)
    await anext(frames)
    await frames.aclose()
    assert orchestrators.cancelled == [] and orchestrators.left == [orchestrators.asked_for[0][1]]


async def test_a_stream_goes_on_where_its_replica_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    pause(monkeypatch, 0)
    orchestrators = Orchestrators()
    orchestrators.may_accept.set()
    orchestrators.is_over = True
    orchestrators.num_lost = 2
    units = [int(frames.max()) async for frames in client_of(orchestrators).stream(REQUEST)]
    assert units == [0, 1, 2, 3] and orchestrators.cancelled == orchestrators.left == []
    assert [unit for unit, _ in orchestrators.asked_for] == [0, 1, 1, 1, 2, 3]
    assert len({viewer for _, viewer in orchestrators.asked_for}) == 1


async def test_no_unit_is_asked_for_before_the_reader_wants_it() -> None:
    orchestrators = Orchestrators()
    frames = client_of(orchestrators).frames(orchestrators.record.id, 1)
    for unit in (1, 2):
        await anext(frames)
        await asyncio.sleep(0.05)
        assert [asked for asked, _ in orchestrators.asked_for] == list(range(1, unit + 1))
    await frames.aclose()


async def test_a_stream_of_a_video_that_fails_says_so() -> None:
    orchestrators = Orchestrators()
    orchestrators.may_accept.set()
    orchestrators.failed_unit = 2
    units: list[int] = []
    with pytest.raises(VideoFailedError, match="it had to fail"):
        async for frames in client_of(orchestrators).stream(REQUEST):
            units.append(int(frames.max()))
    assert units == [0, 1] and orchestrators.cancelled == []


class ManyOrchestrators(Orchestrators):
    """Makes a video for each request, those with an even seed at once and the others when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[str, VideoRecord] = {}
        self.may_end = asyncio.Event()

    async def submit(self, request: VideoRequest, key: str) -> VideoRecord:
        record = new_record(MODEL.plan(request))
        self.records[record.id] = record
        return record

    async def wait(self, video_id: str) -> VideoRecord:
        if self.records[video_id].plan.seed % 2:
            await self.may_end.wait()
        return self.records[video_id]


async def test_many_requests_are_made_some_at_once_and_told_as_they_end() -> None:
    orchestrators = ManyOrchestrators()
    read: list[int] = []

    def requests() -> Iterator[VideoRequest]:
        for seed in (1, 2, 3, 4, 6, 8):
            read.append(seed)
            yield VideoRequest(prompt="a ball", seed=seed)

    places = []
    async with asyncio.timeout(10):
        async for place, record in client_of(orchestrators).map(requests(), num_in_flight=3):
            assert isinstance(record, VideoRecord)
            assert record.plan.seed == (1, 2, 3, 4, 6, 8)[place]
            if not places:
                assert read == [1, 2, 3], "more was asked for than may be in flight"
            places.append(place)
            if len(places) == 4:
                orchestrators.may_end.set()
    assert places[:4] == [1, 3, 4, 5]
    assert set(places[4:]) == {0, 2}


async def test_a_request_that_is_refused_does_not_end_the_others() -> None:
    class Refusing(ManyOrchestrators):
        async def submit(self, request: VideoRequest, key: str) -> VideoRecord:
            if request.prompt == "no":
                raise RequestError("prompt: no", param="prompt")
            return await super().submit(request, key)

    requests = [VideoRequest(prompt=prompt, seed=2) for prompt in ("a ball", "no", "a cube")]
    async with asyncio.timeout(10):
        found = {place: each async for place, each in client_of(Refusing()).map(requests, num_in_flight=1)}
    assert [type(found[place]) for place in range(3)] == [VideoRecord, RequestError, VideoRecord]
    with pytest.raises(ValueError, match="num_in_flight=0"):
        await anext(client_of(Refusing()).map(requests, num_in_flight=0))


async def test_videos_in_flight_are_cancelled_when_the_caller_of_many_leaves() -> None:
    orchestrators = ManyOrchestrators()
    requests = [VideoRequest(prompt="a ball", seed=seed) for seed in (1, 2, 3, 5)]
    async with asyncio.timeout(10), aclosing(client_of(orchestrators).map(requests, num_in_flight=3)) as ended:
        await anext(ended)
    unfinished = {record.id for record in orchestrators.records.values() if record.plan.seed % 2}
    assert set(orchestrators.cancelled) == unfinished
