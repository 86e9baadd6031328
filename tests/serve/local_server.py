"""The HTTP server with all that is behind it in one process and no Ray: real claims and storage, invented videos.

A prompt decides how its video fares: ``fail`` ends it badly after a unit, ``hold`` stops it after two units until it is
cancelled; any other is made at ``unit_seconds`` a unit.
"""

import asyncio
import functools
import logging
import re
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import imageio_ffmpeg
import numpy
from fastapi import FastAPI

from deployments.claims.config import ClaimsConfig
from deployments.claims.deployment import Claims
from deployments.claims.messages import RunUpdate
from deployments.http.app import create_app
from deployments.http.config import HttpConfig
from deployments.http.listener import Listener, ListenOptions, access_logger
from deployments.local.cluster import free_port
from deployments.videos.videos import Videos
from pyramid_serve.api import RequestLimits, Stage, TimelineEntry, VideoError, VideoRecord
from pyramid_serve.media.fragments import encode_fragment, join_fragments
from pyramid_serve.pyramid_flow.capabilities import Capabilities
from pyramid_serve.pyramid_flow.family import FAMILY
from pyramid_serve.served_model import ServedModel, ServedModels
from pyramid_serve.storage import VideoFile, VideoNotFoundError, VideoStore
from pyramid_serve.stored_files import PATIENCE_S
from tests.in_a_thread import in_a_thread

MODEL = ServedModel(
    name="tiny",
    family=FAMILY,
    capabilities=Capabilities(
        sizes=((128, 64), (64, 64)),
        max_num_latent_frames=16,
        default_num_latent_frames=4,
        num_inference_steps=(2, 2, 2),
        video_num_inference_steps=(1, 1, 1),
        prompt_suffix="",
        negative_prompt="",
    ),
    limits=RequestLimits(max_prompt_characters=500, max_picture_bytes=200_000, max_picture_pixels=1_000_000),
)


@functools.cache
def fragment(width: int, height: int, unit: int) -> bytes:
    """A unit's fragment: grey, brighter from unit to unit."""
    frames = numpy.full((1 if unit == 0 else 8, height, width, 3), 10 * unit, numpy.uint8)
    return encode_fragment(frames, index=unit, first_frame=8 * unit - 7 if unit else 0, fps=24)


@functools.cache
def whole(width: int, height: int, num_units: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        join_fragments([fragment(width, height, unit) for unit in range(num_units)], path)
        return path.read_bytes()


def probe(video: Path, *, fps: int = 24) -> tuple[int, int, int]:
    """Frames, width and height that ffmpeg finds in a file, all of which it can decode."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(video), "-f", "null", "-"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert f" {fps} fps" in said
    (size,) = set(re.findall(r"Video: .* (\d+x\d+)", said))
    width, height = map(int, size.split("x"))
    return int(re.findall(r"frame= *(\d+)", said)[-1]), width, height


class LocalHandle:
    """Answers like a deployment's handle: ``handle.method.remote(...)``."""

    def __init__(self, deployment: object) -> None:
        self._deployment = deployment

    def __getattr__(self, name: str) -> Any:
        return _Method(getattr(self._deployment, name))


class _Method:
    def __init__(self, method: Callable[..., Coroutine[Any, Any, Any]]) -> None:
        self._method = method

    def remote(self, *arguments: Any, **keywords: Any) -> Coroutine[Any, Any, Any]:
        return self._method(*arguments, **keywords)


class InventedVideos:
    """Orchestrators that make grey pictures."""

    def __init__(self, store: VideoStore, *, unit_seconds: float) -> None:
        self.claims: Claims
        self._store = store
        self._unit_seconds = unit_seconds
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def run(self, video_id: str) -> None:
        record = await self.claims.claim(video_id, "local", uuid4().hex)
        if record is not None:
            self._tasks[video_id] = asyncio.create_task(self._make(record))
            await asyncio.wait([self._tasks[video_id]])
            self._tasks.pop(video_id)

    async def are_ready(self) -> bool:
        return True

    async def stop(self, video_id: str) -> None:
        if video_id in self._tasks:
            self._tasks[video_id].cancel()

    async def _make(self, record: VideoRecord) -> None:
        plan, attempt = record.plan, record.attempts
        num_steps = 0
        try:
            for unit in range(plan.num_units):
                started = time.time()
                if not await self.claims.update(record.id, attempt, RunUpdate(num_steps, has_started=True)):
                    return
                if (plan.prompt == "fail" and unit == 1) or (plan.prompt == "hold" and unit == 2):
                    await self._misbehave(record)
                    return
                await asyncio.sleep(self._unit_seconds)
                num_steps += plan.unit(unit).num_steps
                made = fragment(plan.width, plan.height, unit)
                await asyncio.to_thread(self._store.files.save_fragment, record.id, unit, made)
                stages = [
                    TimelineEntry(stage=stage, unit=unit, start=started, end=time.time(), replica="local")
                    for stage in (Stage.DENOISE, Stage.DECODE)
                ]
                update = RunUpdate(num_steps, unit + 1, unit + 1, has_started=True, timeline=tuple(stages))
                await self.claims.update(record.id, attempt, update)
            video = whole(plan.width, plan.height, plan.num_units)
            await asyncio.to_thread(self._store.files.attach, record.id, VideoFile.VIDEO, video)
            await self.claims.complete(record.id, attempt, RunUpdate())
        except VideoNotFoundError:
            return
        except RuntimeError as error:
            if "shutdown" not in str(error):  # the test is over
                raise

    async def _misbehave(self, record: VideoRecord) -> None:
        if record.plan.prompt == "fail":
            error = VideoError(code="server_error", message="it had to fail")
            await self.claims.fail(record.id, record.attempts, error, is_final=True)
        else:
            while await self.claims.update(record.id, record.attempts, RunUpdate()):
                await asyncio.sleep(0.05)


async def local_app(
    root: str,
    *,
    unit_seconds: float = 0.0,
    claims: ClaimsConfig | None = None,
    http: HttpConfig | None = None,
    models: Sequence[ServedModel] = (MODEL,),
    patience_s: float = PATIENCE_S,
    app: str = "local",
) -> FastAPI:
    store = VideoStore(root, patience_s=patience_s)
    invented = InventedVideos(store, unit_seconds=unit_seconds)
    deployment = Claims.__new__(Claims)
    await Claims.__init__(deployment, root, claims or ClaimsConfig(), orchestrators=invented, app=app)
    invented.claims = deployment
    return create_app(Videos(store, LocalHandle(deployment), ServedModels(tuple(models))), http)  # type: ignore[arg-type]


@dataclass(frozen=True)
class LocalServer:
    """A server on a port of this machine, and a client for it."""

    url: str
    app: FastAPI
    client: httpx.Client

    @property
    def store(self) -> VideoStore:
        store: VideoStore = self.app.state.door.videos.store
        return store

    def submit(self, prompt: str = "a ball", **fields: Any) -> str:
        """The id of a new video."""
        answer = self.client.post("/v1/videos", json={"prompt": prompt, **fields})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def finish(self, video_id: str, *, timeout_s: float = 30.0) -> dict[str, Any]:
        """The video object once the video is over."""
        return self.until(video_id, lambda video: video["status"] in ("completed", "failed"), timeout_s=timeout_s)

    def until(
        self, video_id: str, is_so: Callable[[dict[str, Any]], bool], *, timeout_s: float = 30.0
    ) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            video: dict[str, Any] = self.client.get(f"/v1/videos/{video_id}").json()
            if is_so(video):
                return video
            time.sleep(0.02)
        raise AssertionError(f"not within {timeout_s} s: {video}")


@contextmanager
def serve_locally(root: str, **options: Any) -> Iterator[LocalServer]:
    """A server for as long as the block runs; see ``local_app`` for the options."""
    listen = ListenOptions(port=free_port(), drain_timeout_s=1)
    url = f"http://{listen.host}:{listen.port}"
    apps: list[FastAPI] = []
    access_logger.setLevel(logging.WARNING)  # its lines would stand between those of the tests

    async def serve(until_over: Callable[[], Awaitable[None]]) -> None:
        apps.append(await local_app(root, **options))
        listener = await Listener.start(apps[0], listen)
        await until_over()
        await listener.stop()

    with in_a_thread(serve), httpx.Client(base_url=url, timeout=30) as client:
        yield LocalServer(url, apps[0], client)
