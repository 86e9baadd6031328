"""A deployment that denoises and decodes in one replica, for models whose decoding is a few per cent of the work."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from deployments.pools.decoder import Decoder, DecoderConfig
from deployments.pools.denoiser import Denoiser, DenoiserConfig
from deployments.pools.wire import DecodeJob, DecodeResult, MemoryMissing, UnitJob, UnitProgress, UnitResult, WireTensor
from deployments.telemetry.forwards import ReplicaStats


class DenoiserWithDecoder:
    """A ``Denoiser`` and a ``Decoder`` in one process, each with its own engine; see there for the methods."""

    def __init__(self, denoiser: DenoiserConfig, decoder: DecoderConfig) -> None:
        self._denoiser = Denoiser(denoiser)
        self._decoder = Decoder(decoder)

    async def denoise_unit(self, job: UnitJob) -> AsyncGenerator[UnitProgress | UnitResult, None]:
        async with aclosing(self._denoiser.denoise_unit(job)) as items:
            async for item in items:
                yield item

    async def decode_unit(self, job: DecodeJob) -> DecodeResult | MemoryMissing:
        return await self._decoder.decode_unit(job)

    async def encode_picture(self, picture: bytes, height: int, width: int) -> dict[str, WireTensor]:
        return await self._decoder.encode_picture(picture, height, width)

    async def forget(self, video_id: str) -> None:
        await self._decoder.forget(video_id)

    async def stats(self) -> ReplicaStats:
        """Of the denoiser, which is what the replica is for."""
        return await self._denoiser.stats()

    async def check_health(self) -> None:
        await asyncio.gather(self._denoiser.check_health(), self._decoder.check_health())
