"""An orchestrator with real claims and storage, and pools that invent what they answer; all in this process, no Ray."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest

from deployments.claims.deployment import Claims
from deployments.orchestrator.attempt import RunConfig
from deployments.orchestrator.deployment import Orchestrator
from deployments.pools.wire import (
    DecodeJob,
    DecodeResult,
    EncodedPrompt,
    MemoryMissing,
    UnitJob,
    UnitProgress,
    UnitResult,
    latents_from_wire,
    latents_to_wire,
)
from pyramid_serve.api import Computed, VideoRequest
from pyramid_serve.served_model import ServedModels
from pyramid_serve.storage import VideoStore
from tests.serve.local_server import MODEL, LocalHandle
from tests.unit.claims.claims_at_hand import FakeOrchestrators, claims_of

COMPUTED = Computed(part="any", dtype="float32", device="cpu")


def request_of(seed: int = 1, **fields: Any) -> VideoRequest:
    """A video of four units of 64 x 64 pixels."""
    return VideoRequest(prompt="a ball", seed=seed, size="64x64", **fields)


class Response:
    """What a handle answers: it is awaited, or iterated over, and can be cancelled."""

    def __init__(self, answer: Any) -> None:
        self._answer = asyncio.ensure_future(answer) if asyncio.iscoroutine(answer) else answer

    def __await__(self) -> Any:
        return self._answer.__await__()

    def __anext__(self) -> Any:
        return self._answer.__anext__()

    def cancel(self) -> None:
        if isinstance(self._answer, asyncio.Future):
            self._answer.cancel()


class Method(NamedTuple):
    method: Callable[..., Any]

    def remote(self, *arguments: Any, **keywords: Any) -> Response:
        return Response(self.method(*arguments, **keywords))


class PoolHandle:
    """The handle of a pool. A broadcast is ``told`` of the pool, when it has been waited for."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self.deployment_name = type(pool).__name__

    def options(self, **_: Any) -> "PoolHandle":
        return self

    def __getattr__(self, name: str) -> Method:
        return Method(getattr(self._pool, name))

    def broadcast(self, name: str, *arguments: Any) -> "Broadcast":
        return Broadcast(self._pool, name, arguments)


class Broadcast(NamedTuple):
    pool: Any
    name: str
    arguments: tuple[Any, ...]

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        async with asyncio.timeout(timeout_s):
            return [await self.pool.told(self.name, *self.arguments)]


class FakeTextEncoder:
    async def encode(self, prompt: str) -> EncodedPrompt:
        return EncodedPrompt({})


class FakeDenoiser:
    """Makes latents that hold the number of their unit. ``before`` is awaited before each unit and ``after`` before its
    result, if they are set; between them come ``states``, each a step further.
    """

    def __init__(self) -> None:
        self.jobs: list[UnitJob] = []
        self.before: Callable[[UnitJob], Any] | None = None
        self.after: Callable[[UnitJob], Any] | None = None
        self.states: list[bytes] = []

    async def denoise_unit(self, job: UnitJob) -> AsyncGenerator[UnitProgress | UnitResult, None]:
        self.jobs.append(job)
        if self.before is not None:
            await self.before(job)
        unit = job.plan.unit(job.unit)
        yield UnitProgress(0, unit.num_steps)
        for step, state in enumerate(self.states, 1):
            yield UnitProgress(step, unit.num_steps, state)
        if self.after is not None:
            await self.after(job)
        latents = numpy.full(unit.latent_shape, job.unit, numpy.float32)
        yield UnitResult(latents_to_wire(latents), 0.0, 1.0, "denoiser", COMPUTED, unit.num_steps, 1.0, 1.0)


class FakeDecoder:
    """Makes grey frames, ten times as bright as their unit's number. ``before`` is as that of the denoiser."""

    def __init__(self) -> None:
        self.jobs: list[DecodeJob] = []
        self.before: Callable[[DecodeJob], Any] | None = None
        self.replica = "decoder"
        self.memories: dict[tuple[str, str], int] = {}
        """The unit that follows, by replica and video."""
        self.forgotten: list[str] = []
        self.on_forget: Callable[[], Any] | None = None

    async def decode_unit(self, job: DecodeJob) -> DecodeResult | MemoryMissing:
        self.jobs.append(job)
        if self.before is not None:
            await self.before(job)
        key = self.replica, job.video_id
        is_there = job.unit == 0 or self.memories.get(key) == job.unit
        if not is_there and job.earlier is None:
            return MemoryMissing(job.video_id, job.unit, self.replica)
        self.memories[key] = job.unit + 1
        if job.is_last:
            del self.memories[key]
        brightness = 10 * int(latents_from_wire(job.latents).max())
        frames = numpy.full((8 if job.unit else 1, 64, 64, 3), brightness, numpy.uint8)
        rebuilt = 0 if is_there else job.unit
        return DecodeResult(frames, 0.0, 1.0, self.replica, COMPUTED, 1, rebuilt, keeps_memory=not job.is_last)

    async def told(self, name: str, video_id: str) -> None:
        assert name == "forget"
        self.forgotten.append(video_id)
        if self.on_forget is not None:
            await self.on_forget()
        for key in [key for key in self.memories if key[1] == video_id]:
            del self.memories[key]


class App(NamedTuple):
    orchestrator: Orchestrator
    claims: Claims
    store: VideoStore
    denoiser: FakeDenoiser
    decoder: FakeDecoder


@asynccontextmanager
async def app_of(root: Path | str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> AsyncIterator[App]:
    """The app over a storage; ``settings`` are those of claims."""
    monkeypatch.setattr("deployments.orchestrator.deployment.replica_name", lambda: "orchestrator")
    monkeypatch.setattr("deployments.orchestrator.deployment.configure_logging", lambda _: None)
    for name in ("_FIRST_PAUSE_S", "_MAX_PAUSE_S"):
        monkeypatch.setattr(f"deployments.rpc.retry.{name}", 0.0)
    orchestrators, denoiser, decoder = FakeOrchestrators(), FakeDenoiser(), FakeDecoder()
    async with claims_of(root, orchestrators, **settings) as claims:
        orchestrator = Orchestrator(
            str(root),
            RunConfig(heartbeat_s=0.1, stall_timeout_s=1.0),
            ServedModels((MODEL,)),
            claims=LocalHandle(claims),  # type: ignore[arg-type]
            text_encoders={MODEL.name: PoolHandle(FakeTextEncoder())},  # type: ignore[dict-item]
            denoisers={MODEL.name: PoolHandle(denoiser)},  # type: ignore[dict-item]
            decoders={MODEL.name: PoolHandle(decoder)},  # type: ignore[dict-item]
        )
        monkeypatch.setattr(orchestrators, "run", orchestrator.run)
        monkeypatch.setattr(orchestrators, "stop", orchestrator.stop)
        yield App(orchestrator, claims, VideoStore(str(root)), denoiser, decoder)
