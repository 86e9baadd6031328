"""The Decoder deployment: frames of one unit of one video a call, the units that wait together in one forward."""

import asyncio
import logging
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from deployments.pools.decoder_memories import MemoryStore
from deployments.pools.engine import Engine
from deployments.pools.model_config import ModelConfig, reported_if_not_finite
from deployments.pools.tensors import all_to_wire, from_wire
from deployments.pools.wire import DecodeJob, DecodeResult, MemoryMissing, WireTensor
from deployments.telemetry.forwards import Forward, ReplicaStats, replica_stats
from deployments.telemetry.logs import configure_logging
from deployments.telemetry.replicas import CallMetrics, ForwardMetrics, replica_name
from pyramid_serve.errors import NonFiniteError
from pyramid_serve.families import DecodePart
from pyramid_serve.media.pictures import read_picture

logger = logging.getLogger(__name__)

GIB = 2**30


class DecoderConfig(ModelConfig):
    max_batch_size: PositiveInt | None = 8
    """Units of one forward. None: no limit."""
    memory_budget_bytes: NonNegativeInt = 20 * GIB
    """Memories kept on the device; for Pyramid Flow 8.3 GiB a video at 1280x768, 2.1 GiB at 640x384. While a unit is
    decoded, its old memory and its new one are both there. With less than one video's memory, each moves to host
    memory and back at every unit.
    """
    host_budget_bytes: NonNegativeInt = 40 * GIB
    """Memories kept in host memory once they are too many for the device; beyond it they are made again."""
    warm_up_size: tuple[PositiveInt, PositiveInt] | None = None
    """(width, height) in pixels of the units decoded before the replica is ready. None: the smallest there is."""


class Decoder:
    """Holds the decode part of a model, one engine, and the memories of the videos decoded here last.

    Frames come out the same, bit for bit, from a memory kept or made again, alone or with units of other videos.
    """

    def __init__(self, config: DecoderConfig) -> None:
        """Loads the part and runs it once, so that the first call finds everything set up."""
        self._replica = replica_name()
        configure_logging(self._replica)
        config.set_up_torch()
        family = config.model_family
        self._part = family.load_decode(config.part_source(family.decode_options))
        self._computed = config.computed_as("decoder", self._part.dtype)
        self._in_order = family.decodes_in_order
        self._memories = MemoryStore(
            device_budget_bytes=config.memory_budget_bytes, host_budget_bytes=config.host_budget_bytes
        )
        with reported_if_not_finite():
            warm_up(self._part, config)
        self._calls, metrics = CallMetrics(), ForwardMetrics()
        self._engine: Engine[Any, Any] = Engine(
            self._part.forward,
            max_slots=config.max_batch_size,
            packs_with=self._part.packs_with,
            on_forward=metrics.record,
            on_out_of_memory=metrics.out_of_memory,
            thread=config.compute_thread("decoder"),
        )

    async def decode_unit(self, job: DecodeJob) -> DecodeResult | MemoryMissing:
        """The frames of a unit. The memory of the units before it is this replica's, or made again from ``earlier``;
        with neither the answer is ``MemoryMissing``. Raises ``ValueError`` for latents of another shape, and
        ``NonFiniteError`` where latents or frames hold NaN or infinity.
        """
        check_job(job)
        forwards: list[Forward] = []
        with self._calls.of("decode_unit"):
            try:
                frames = await self._engine.run(
                    decode_steps(job, self._memories, self._part, in_order=self._in_order),
                    submitted_at=job.submitted_at,
                    on_step=forwards.append,
                )
            except NonFiniteError as error:
                raise NonFiniteError(f"unit {job.unit}: {error}") from None
        if frames is None:
            return MemoryMissing(job.video_id, job.unit, self._replica)
        return DecodeResult(
            frames=frames.numpy(),
            started=forwards[0].started,
            ended=forwards[-1].ended,
            replica=self._replica,
            computed=self._computed,
            batch_size=forwards[-1].num_slots,
            rebuilt_units=len(forwards) - 1,
            keeps_memory=self._in_order and not job.is_last,
        )

    async def encode_picture(self, picture: bytes, height: int, width: int) -> dict[str, WireTensor]:
        """A picture file, cut to ``height`` x ``width`` pixels, as named tensors, float32.

        Raises ``InputError`` for a picture that cannot be read or used.
        """
        with self._calls.of("encode_picture"):
            # No limit of pixels: the one that held when it was accepted may have been any.
            image = await asyncio.to_thread(lambda: read_picture(picture, max_pixels=None))
            tensors = await self._engine.run_between_turns(
                lambda: self._part.encode_picture(image, height=height, width=width)
            )
        return all_to_wire(tensors)

    async def forget(self, video_id: str) -> None:
        """Free the memory of a video, also that which a call now at work on it would leave."""
        await self._engine.run_between_turns(lambda: self._memories.forget(video_id))

    async def stats(self) -> ReplicaStats:
        return replace(
            replica_stats(self._replica, self._engine.stats()),
            num_memories=len(self._memories),
            memory_bytes=self._memories.device_bytes + self._memories.host_bytes,
        )

    async def check_health(self) -> None:
        self._engine.check()


def warm_up(part: DecodePart, config: DecoderConfig) -> None:
    """Run the part once, and warn where the memory of one video does not fit the budget."""
    of_one_video = part.warm_up(config.warm_up_size)
    if of_one_video > config.memory_budget_bytes:
        logger.warning(
            "memory_budget_bytes=%d is less than one video's memory at the default size, %d bytes: it moves to host "
            "memory and back at every unit",
            config.memory_budget_bytes,
            of_one_video,
        )


def check_job(job: DecodeJob) -> None:
    """``ValueError`` unless there is such a unit, and the earlier units are as many as come before it."""
    if job.unit < 0:
        raise ValueError(f"unit={job.unit}: must be 0 or more")
    if job.earlier is not None and len(job.earlier) != job.unit:
        raise ValueError(f"earlier: {len(job.earlier)} units, must be {job.unit} for unit {job.unit}")
    for latents in job.earlier or ():
        if latents.shape != job.latents.shape:
            raise ValueError(f"earlier: shape {latents.shape}, must be {job.latents.shape} as the unit's own")


def decode_steps(
    job: DecodeJob, memories: MemoryStore, part: DecodePart, *, in_order: bool
) -> Generator[Sequence[Any], Sequence[Any], Tensor | None]:
    """The steps of a job: its own unit, and before it those to be made again where their memory is gone.

    in_order: whether a unit needs the memory of those before it.
    Returns the frames, or None where the memory is missing and the job brings nothing to make it from. Rebuilding runs
    in steps like any other decoding, so it shares forwards with other videos and holds none up.
    """
    with memories.lease(job.video_id, job.unit) as lease:
        memory = lease.memory
        if memory is None and job.unit > 0 and in_order:
            if job.earlier is None:
                return None
            for latents in job.earlier:
                (decoded,) = yield (part.request(from_wire(latents), memory),)
                memory = decoded.memory
        (decoded,) = yield (part.request(from_wire(job.latents), memory),)
        if job.is_last:
            memories.forget(job.video_id)
        elif decoded.memory is not None:
            memories.keep(lease, job.video_id, job.unit + 1, decoded.memory)
        frames: Tensor = decoded.frames
        return frames
