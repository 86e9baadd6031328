"""One attempt at one video: the loop over its units, with each stage a call to a pool.

Three tasks follow each other through the units: latents are denoised, decoded to frames, and these saved as a fragment
of the stream, so unit k is decoded while k + 1 is denoised. What was saved by an attempt before is not made again, and
a unit whose state was saved goes on there.

F frames of a unit, H W size in pixels.
"""

import asyncio
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from ray.serve.handle import DeploymentHandle

from deployments.orchestrator.kept_state import KeptState
from deployments.orchestrator.lease import Lease
from deployments.orchestrator.video_decoder import VideoDecoder
from deployments.pools.wire import (
    EncodedPrompt,
    Latents,
    UnitJob,
    UnitProgress,
    UnitResult,
    WireTensor,
    latents_from_wire,
    latents_to_wire,
)
from deployments.rpc.calls import call, retrying
from deployments.telemetry.videos import VideoMetrics
from pyramid_serve.api import Stage, Status, TimelineEntry, VideoRecord
from pyramid_serve.media.fragments import encode_fragment, join_fragments
from pyramid_serve.storage import VideoFile, VideoStore

logger = logging.getLogger(__name__)

Frames = NDArray[numpy.uint8]

_MAX_FRAMES_WAITING = 2


class RunConfig(BaseModel):
    """How patient an attempt is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    heartbeat_s: Annotated[float, Field(gt=0)] = 1.0
    """How often claims hears of a running video; well below the lease."""
    max_call_retries: Annotated[int, Field(ge=0)] = 20
    """Of one call, when replicas die under it."""
    stall_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """A unit whose denoising has begun and then shows nothing for so long is made again: its replica cannot be reached.
    Waiting has no limit, and neither has decoding; a device that hangs is noticed by its replica.
    """


class Pools(NamedTuple):
    """Handles of the deployments that do the work for one model."""

    text_encoder: DeploymentHandle[Any]
    denoiser: DeploymentHandle[Any]
    decoder: DeploymentHandle[Any]


@dataclass(frozen=True)
class Conditioning:
    """What all units of a video are denoised from: its prompts, and its picture where that is not itself a unit."""

    prompt: EncodedPrompt
    negative_prompt: EncodedPrompt
    picture: Mapping[str, WireTensor] | None


class VideoRun:
    """Makes a video from what is saved of it, and tells its lease."""

    def __init__(
        self,
        record: VideoRecord,
        *,
        pools: Pools,
        store: VideoStore,
        lease: Lease,
        config: RunConfig,
        metrics: VideoMetrics,
        replica: str,
    ) -> None:
        self._id = record.id
        self._record = record
        self._plan = record.plan
        self._pools = pools
        self._decoder = VideoDecoder(
            record.id,
            pools.decoder,
            submitted_at=record.created_at,
            max_retries=config.max_call_retries,
            on_retry=self._on_retry,
        )
        self._store = store
        self._lease = lease
        self._config = config
        self._metrics = metrics
        self._replica = replica
        self._latents: list[Latents] = []
        self._num_saved = 0
        self._saved_latents: set[int] = set()
        self._is_begun = record.status is not Status.QUEUED
        self.timeline: list[TimelineEntry] = []
        """What this attempt has done."""

    async def make(self) -> None:
        """Bring the video to its end: every unit saved, and ``video.mp4`` there.

        Raises what a call raises for good, and cancels every call under way when it is cancelled itself.
        """
        await self._load()
        denoised: asyncio.Queue[int] = asyncio.Queue()
        decoded: asyncio.Queue[tuple[int, Frames]] = asyncio.Queue(_MAX_FRAMES_WAITING)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._denoise_units(denoised, tasks))
            tasks.create_task(self._decode_units(denoised, decoded))
            tasks.create_task(self._save_units(decoded))
        await self._join()

    async def clean_up(self) -> None:
        """Free what the decoders keep of the video. Raises nothing; for after the end of ``make``, however it ended."""
        await self._decoder.forget()

    # --- what is there already --------------------------------------------------------------------------------------

    async def _load(self) -> None:
        """Take up what earlier attempts saved."""
        self._latents = await asyncio.to_thread(self._store.files.load_latents, self._id)
        self._saved_latents.update(range(len(self._latents)))
        if self._record.attempts > 1:  # a state that came after its unit's latents, as the attempt was lost
            await asyncio.to_thread(self._store.files.remove_states, self._id, range(len(self._latents)))
        num_fragments = await asyncio.to_thread(self._store.files.num_fragments, self._id)
        self._num_saved = min(num_fragments, len(self._latents))
        if self._latents:
            logger.info("going on from unit %d", len(self._latents), extra={"video_id": self._id})
        self._lease.tell(
            num_units_denoised=len(self._latents),
            num_units_done=self._num_saved,
            num_steps_done=self._plan.num_steps_before(len(self._latents)),
        )

    # --- denoise ----------------------------------------------------------------------------------------------------

    async def _denoise_units(self, denoised: "asyncio.Queue[int]", tasks: asyncio.TaskGroup) -> None:
        """Make the latents of every unit in turn. Saving them is off the path to the next one."""
        num_loaded = len(self._latents)
        for unit in range(self._num_saved, num_loaded):
            denoised.put_nowait(unit)
        if num_loaded == self._plan.num_units:
            return
        conditioning = await self._condition()
        for unit in range(num_loaded, self._plan.num_units):
            if self._plan.unit(unit).is_picture:
                latents = latents_from_wire((await self._encode_picture(unit))["latents"])
                state = None
            else:
                state = self._kept_state(unit)
                # After an error the unit is made from its start: its state may be what fails.
                if self._record.attempts > 1 and not self._record.num_failures and unit == num_loaded:
                    await state.load()
                latents = await self._denoise_retrying(unit, conditioning, state, tasks)
            self._latents.append(latents)
            tasks.create_task(self._save_latents(unit, latents, state))
            denoised.put_nowait(unit)

    async def _condition(self) -> Conditioning:
        positive, negative = await self._encode_prompts()
        picture = None
        if self._plan.is_conditioned_on_picture:
            picture = await self._encode_picture(None)
        return Conditioning(positive, negative, picture)

    async def _encode_prompts(self) -> tuple[EncodedPrompt, EncodedPrompt]:
        with self._noting(Stage.ENCODE, None, replica=self._pools.text_encoder.deployment_name):
            positive, negative = await asyncio.gather(
                *map(self._encode_prompt, (self._plan.full_prompt, self._plan.negative_prompt))
            )
        self._lease.tell(prompt_truncated_at=positive.truncated_at, negative_prompt_truncated_at=negative.truncated_at)
        if positive.computed is not None:
            self._lease.tell_computed(positive.computed)
        return positive, negative

    async def _encode_prompt(self, prompt: str) -> EncodedPrompt:
        encode = self._pools.text_encoder.encode
        embeds: EncodedPrompt = await self._retrying(lambda: call(encode.remote(prompt)))
        return embeds

    async def _encode_picture(self, unit: int | None) -> dict[str, WireTensor]:
        """The named tensors of the given picture. ``unit``: which unit it is, for the timeline."""
        picture = await asyncio.to_thread(self._store.files.fetch, self._id, VideoFile.PICTURE)
        with self._noting(Stage.PICTURE, unit, replica=self._pools.decoder.deployment_name):
            return await self._decoder.encode_picture(picture, height=self._plan.height, width=self._plan.width)

    def _kept_state(self, unit: int) -> KeptState:
        on_saved = partial(self._metrics.state_saved, self._plan)
        return KeptState(self._store.files, self._id, unit, attempt=self._record.attempts, on_saved=on_saved)

    async def _denoise_retrying(
        self, unit: int, conditioning: Conditioning, state: KeptState, tasks: asyncio.TaskGroup
    ) -> Latents:
        latents: Latents = await self._retrying(lambda: self._denoise_unit(unit, conditioning, state, tasks))
        return latents

    async def _denoise_unit(
        self, unit: int, conditioning: Conditioning, state: KeptState, tasks: asyncio.TaskGroup
    ) -> Latents:
        """The latents of a unit, from one call."""
        job = self._unit_job(unit, conditioning, state.newest)
        stream: Any = self._pools.denoiser.options(stream=True).denoise_unit.remote(job)
        num_steps_before = self._plan.num_steps_before(unit)
        # No limit to the wait for a slot: a replica whose device hangs says so, and one that is gone is noticed by Ray.
        timeout_s: float | None = None
        try:
            while True:
                async with asyncio.timeout(timeout_s):
                    item: UnitProgress | UnitResult = await anext(stream)
                timeout_s = self._config.stall_timeout_s
                if isinstance(item, UnitResult):
                    break
                self._lease.tell(has_started=True, num_steps_done=num_steps_before + item.step)
                self._begin()
                if item.state is not None:
                    state.keep(item.state, tasks)
        finally:
            stream.cancel()
        self._lease.tell(num_steps_done=num_steps_before + item.num_steps)
        self._lease.tell_computed(item.computed)
        self._note(Stage.DENOISE, unit, start=item.started, end=item.ended, replica=item.replica)
        return latents_from_wire(item.latents)

    def _unit_job(self, unit: int, conditioning: Conditioning, state: bytes | None) -> UnitJob:
        return UnitJob(
            video_id=self._id,
            unit=unit,
            plan=self._plan,
            prompt=conditioning.prompt,
            negative_prompt=conditioning.negative_prompt,
            history=tuple(map(latents_to_wire, self._latents[:unit])),
            submitted_at=self._record.created_at,
            picture=conditioning.picture,
            state=state,
        )

    async def _save_latents(self, unit: int, latents: Latents, state: KeptState | None) -> None:
        await asyncio.to_thread(self._store.files.save_latents, self._id, unit, latents)
        # Units may be saved in another order than they were made; who reads them goes up to the first that is missing.
        self._saved_latents.add(unit)
        self._lease.tell(num_units_denoised=next(n for n in count() if n not in self._saved_latents))
        if state is not None:
            await state.drop()

    # --- decode -----------------------------------------------------------------------------------------------------

    async def _decode_units(self, denoised: "asyncio.Queue[int]", decoded: "asyncio.Queue[tuple[int, Frames]]") -> None:
        for _ in range(self._num_saved, self._plan.num_units):
            unit = await denoised.get()
            result = await self._decoder.decode(
                unit,
                self._latents[unit],
                earlier=partial(self._latents_before, unit),
                is_last=unit == self._plan.num_units - 1,
            )
            self._lease.tell_computed(result.computed)
            self._note(Stage.DECODE, unit, start=result.started, end=result.ended, replica=result.replica)
            await decoded.put((unit, result.frames))

    async def _latents_before(self, unit: int) -> list[Latents]:
        return self._latents[:unit]

    # --- save -------------------------------------------------------------------------------------------------------

    async def _save_units(self, decoded: "asyncio.Queue[tuple[int, Frames]]") -> None:
        for _ in range(self._num_saved, self._plan.num_units):
            unit, frames = await decoded.get()
            with self._noting(Stage.SAVE, unit, replica=self._replica):
                fragment = await asyncio.to_thread(self._encode_fragment, frames, unit)
                await asyncio.to_thread(self._store.files.save_fragment, self._id, unit, fragment)
            if unit == 0:
                self._metrics.first_frame(self._plan, since_accepted_s=time.time() - self._record.created_at)
            self._lease.tell(num_units_done=unit + 1)

    def _encode_fragment(self, frames: Frames, unit: int) -> bytes:
        first_frame = self._plan.num_frames_before(unit)
        return encode_fragment(frames, index=unit, first_frame=first_frame, fps=self._plan.fps)

    async def _join(self) -> None:
        """Put ``video.mp4`` together."""
        with self._noting(Stage.SAVE, None, replica=self._replica):
            await asyncio.to_thread(_join_fragments, self._store, self._id, self._plan.num_units)

    # --- calls ------------------------------------------------------------------------------------------------------

    async def _retrying(self, attempt: Callable[[], Any]) -> Any:
        return await retrying(
            attempt, video_id=self._id, max_retries=self._config.max_call_retries, on_retry=self._on_retry
        )

    def _on_retry(self, cause: str) -> None:
        self._lease.tell_retry()
        self._metrics.retry(cause)

    # --- what was done ----------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """A denoiser works on the video. Measures how long it waited for that, the first time."""
        if not self._is_begun:
            self._is_begun = True
            self._metrics.begun(self._plan, since_accepted_s=time.time() - self._record.created_at)

    def _note(self, stage: Stage, unit: int | None, *, start: float, end: float, replica: str) -> None:
        entry = TimelineEntry(stage=stage, unit=unit, start=start, end=end, replica=replica)
        self.timeline.append(entry)
        self._lease.note(entry)
        self._metrics.stage(self._plan, stage, end - start)

    @contextmanager
    def _noting(self, stage: Stage, unit: int | None, *, replica: str) -> Iterator[None]:
        started = time.time()
        yield
        self._note(stage, unit, start=started, end=time.time(), replica=replica)


def _join_fragments(store: VideoStore, video_id: str, num_units: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / VideoFile.VIDEO
        join_fragments((store.files.load_fragment(video_id, unit) for unit in range(num_units)), path)
        store.files.attach(video_id, VideoFile.VIDEO, path)
