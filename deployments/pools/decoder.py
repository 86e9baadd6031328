"""The Decoder deployment: frames of one unit of one video a call, the units that wait together in one forward."""

import asyncio
import logging
import time
from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from pydantic import NonNegativeInt, PositiveInt
from ray import serve
from torch import Tensor

from deployments.pools.decoder_memories import MemoryStore
from deployments.pools.engine import Engine, Forward
from deployments.pools.model_config import ModelConfig, reported_if_not_finite
from deployments.pools.wire import DecodeJob, DecodeResult, MemoryMissing, ReplicaStats, WireTensor, from_wire, to_wire
from deployments.telemetry.logs import configure_logging
from deployments.telemetry.replicas import CallMetrics, ForwardMetrics, replica_name, replica_stats
from pyramid_serve.checkpoints import capabilities
from pyramid_serve.media.pictures import read_picture
from pyramid_serve.media.tensors import fit_picture
from pyramid_serve.precision import NonFiniteError
from pyramid_serve.pyramid_flow.autoencoder import CausalVideoVAE, DecoderMemory, Tiling
from pyramid_serve.pyramid_flow.parts import LatentScale, latent_scale_of, load_vae
from pyramid_serve.pyramid_flow.pipeline import decode_unit, encode_picture
from pyramid_serve.pyramid_flow.shapes import LATENT_CHANNELS, NUM_STAGES, SIZE_MULTIPLE, LatentShape

logger = logging.getLogger(__name__)

GIB = 2**30


class DecoderConfig(ModelConfig):
    tiling: PositiveInt | None = None
    """Pixels: work in tiles of this size, for less device memory, slower. None: whole frames."""
    max_batch_size: PositiveInt | None = 8
    """Units of one forward. None: no limit."""
    memory_budget_bytes: NonNegativeInt = 20 * GIB
    """Memories kept on the device; 8.3 GiB a video at 1280x768, 2.1 GiB at 640x384, and while a unit is decoded its
    old and its new one are there. With less than one video's, each goes to host memory and back at every unit.
    """
    host_budget_bytes: NonNegativeInt = 40 * GIB
    """Memories kept in host memory once they are too many for the device; beyond it they are made again."""
    warm_up_size: tuple[PositiveInt, PositiveInt] | None = None
    """(width, height) in pixels of the units decoded before the replica is ready. None: the smallest there is."""


@dataclass(frozen=True, eq=False)
class DecodeStep:
    """One latent frame (C, 1, H, W) to decode after what ``memory`` holds; None at the start of a video."""

    latents: Tensor
    memory: DecoderMemory | None

    @property
    def num_tokens(self) -> int:
        """Latent pixels."""
        return self.latents.shape[-2] * self.latents.shape[-1]

    @property
    def batch_key(self) -> Hashable:
        """Steps that have it in common can be stacked."""
        return self.latents.shape, self.memory is None


@dataclass(frozen=True, eq=False)
class Decoded:
    """Frames (1 or 8, height, width, 3) uint8 on the CPU, and the memory for the next unit."""

    frames: Tensor
    memory: DecoderMemory


@serve.deployment
class Decoder:
    """Holds the VAE, one engine, and the memories of the videos decoded here last.

    Frames come out the same from a memory kept or made again, alone or stacked, to float tolerance: in float32 a value
    of 255 may differ by one where it lay on the brink of rounding.
    """

    def __init__(self, config: DecoderConfig) -> None:
        """Loads the VAE and decodes two units with it, so the first call finds everything set up."""
        self._replica = replica_name()
        configure_logging(self._replica)
        config.set_up_torch()
        self._computed = config.computed_as("decoder")
        self._device = config.torch_device
        self._vae = load_vae(config.source, dtype=config.torch_dtype, device=self._device)
        self._scale = latent_scale_of(config.source, config.variant)
        self._tiling = None if config.tiling is None else Tiling(config.tiling)
        self._memories = MemoryStore(
            device_budget_bytes=config.memory_budget_bytes, host_budget_bytes=config.host_budget_bytes
        )
        with reported_if_not_finite():
            self._warm_up(config)
        self._calls = CallMetrics()
        self._engine: Engine[DecodeStep, Decoded] = Engine(
            self._decode,
            max_slots=config.max_batch_size,
            packs_with=lambda step: step.batch_key,
            on_forward=ForwardMetrics().record,
            name="decoder",
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
                    decode_steps(job, self._memories, self._device), submitted_at=time.time(), on_step=forwards.append
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
        )

    async def encode_picture(self, picture: bytes, height: int, width: int) -> WireTensor:
        """A picture file, cut to ``height`` x ``width`` pixels, as latents (16, 1, H, W) of unit 0, float32.

        Raises ``ValueError`` for bytes that are no picture.
        """
        with self._calls.of("encode_picture"):
            # No limit of pixels: the one that held when it was accepted may have been any.
            image = await asyncio.to_thread(lambda: read_picture(picture, max_pixels=None))
            pixels = await asyncio.to_thread(lambda: fit_picture(image, height=height, width=width))
            latents = await self._engine.run_between_turns(lambda: self._encode(pixels))
        return to_wire(latents)

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

    def _decode(self, steps: Sequence[DecodeStep]) -> list[Decoded]:
        return decode_batch(self._vae, self._scale, steps, tiling=self._tiling)

    def _encode(self, pixels: Tensor) -> Tensor:
        with torch.inference_mode():
            return encode_picture(self._vae, self._scale, pixels.to(self._device), tiling=self._tiling).cpu()

    def _warm_up(self, config: DecoderConfig) -> None:
        width, height = config.warm_up_size or (SIZE_MULTIPLE, SIZE_MULTIPLE)
        shape = LatentShape.of_pixels(height=height, width=width, num_latent_frames=2)
        latents = torch.zeros(LATENT_CHANNELS, 1, *shape.size_at(NUM_STAGES - 1), device=self._device)
        (first,) = self._decode([DecodeStep(latents, None)])
        self._decode([DecodeStep(latents, first.memory)])
        default_width, default_height = capabilities(config.source, config.variant).default_size
        of_one_video = first.memory.num_bytes * (default_width * default_height) // (width * height)
        if of_one_video > config.memory_budget_bytes:
            logger.warning(
                "memory_budget_bytes=%d is less than one video's memory at %dx%d, %d bytes: it moves at every unit",
                config.memory_budget_bytes,
                default_width,
                default_height,
                of_one_video,
            )


def check_job(job: DecodeJob) -> None:
    """``ValueError`` unless the latents are one frame, and the earlier ones as many as the unit has before it."""
    channels, num_units, *size = job.latents.shape if len(job.latents.shape) == 4 else (0, 0)
    if (channels, num_units) != (LATENT_CHANNELS, 1):
        raise ValueError(f"latents: shape {job.latents.shape}, must be ({LATENT_CHANNELS}, 1, H, W)")
    if job.unit < 0:
        raise ValueError(f"unit={job.unit}: must be 0 or more")
    expected = (LATENT_CHANNELS, job.unit, *size)
    if job.earlier is not None and job.earlier.shape != expected:
        raise ValueError(f"earlier: shape {job.earlier.shape}, must be {expected} for unit {job.unit}")


def decode_steps(
    job: DecodeJob, memories: MemoryStore, device: torch.device
) -> Generator[Sequence[DecodeStep], Sequence[Decoded], Tensor | None]:
    """The steps of a job: its own unit, and before it those to be made again where their memory is gone.

    Returns the frames, or None where the memory is missing and the job brings nothing to make it from. Rebuilding runs
    in steps like any other decoding, so it shares forwards with other videos and holds none up.
    """
    with memories.lease(job.video_id, job.unit) as lease:
        memory = lease.memory
        if memory is None and job.unit > 0:
            if job.earlier is None:
                return None
            for latents in from_wire(job.earlier, device).split(1, dim=1):
                (decoded,) = yield (DecodeStep(latents, memory),)
                memory = decoded.memory
        (decoded,) = yield (DecodeStep(from_wire(job.latents, device), memory),)
        memories.keep(lease, job.video_id, job.unit + 1, decoded.memory)
        return decoded.frames


def decode_batch(
    vae: CausalVideoVAE,
    scale: LatentScale,
    steps: Sequence[DecodeStep],
    *,
    tiling: Tiling | None,
) -> list[Decoded]:
    """One forward over steps with the same ``batch_key``."""
    latents = torch.stack([step.latents for step in steps])
    memories = [step.memory for step in steps if step.memory is not None]
    with torch.inference_mode():
        frames, after = decode_unit(
            vae, scale, latents, DecoderMemory.stack(memories) if memories else None, tiling=tiling
        )
    return [Decoded(video, own) for video, own in zip(frames.cpu(), after.unstack(), strict=True)]
