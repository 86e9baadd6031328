"""A video's way through the decoder pool, unit by unit: kept to the replica that has its memory."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.pools.wire import DecodeJob, DecodeResult, Latents, MemoryMissing, WireTensor, latents_to_wire
from deployments.rpc.calls import call, retrying, under_an_id_of_its_own

logger = logging.getLogger(__name__)

Earlier = Callable[[], Awaitable[Sequence[Latents]]]

_FORGET_S = 5.0


class VideoDecoder:
    """Decodes one video.

    No call has a limit of time, so one that waits keeps its place among those of a decoder that has much to do. It ends
    when the decoder's device hangs, which that finds out by itself, and when its process is gone.
    """

    def __init__(
        self,
        key: str,
        decoder: DeploymentHandle[Any],
        *,
        submitted_at: float,
        max_retries: int,
        on_retry: Callable[[str], None],
    ) -> None:
        """key: what the decoders keep the video's memory under: two at once need two keys; submitted_at: unix seconds
        by which its units are older or younger than those of other videos; on_retry: called with the cause of each
        retry, see ``rpc.retry.CAUSES``.
        """
        self._key = key
        self._handle = decoder.options(session_id=key)
        self._submitted_at = submitted_at
        self._max_retries = max_retries
        self._on_retry = on_retry
        self._holders: set[str] = set()
        self._has_lost_calls = False

    async def decode(self, unit: int, latents: Latents, *, earlier: Earlier, is_last: bool) -> DecodeResult:
        """The frames of a unit from its latents.

        earlier: called for the latents of all units before it, where no decoder remembers the video; is_last: no unit
        follows, so the replica need not remember the video.
        """
        job = DecodeJob(self._key, unit, latents_to_wire(latents), self._submitted_at, is_last=is_last)
        result: DecodeResult = await self._retrying(lambda: self._decode(job, earlier))
        return result

    async def encode_picture(self, picture: bytes, *, height: int, width: int) -> dict[str, WireTensor]:
        """The named tensors of a picture file, cut to this size in pixels."""
        tensors: dict[str, WireTensor] = await self._retrying(
            lambda: call(under_an_id_of_its_own(self._handle.encode_picture.remote, picture, height, width))
        )
        return tensors

    async def forget(self) -> None:
        """Free the video's memory where there may be one, and raise nothing: it would be dropped in time anyway.

        There is none after the last unit, unless the video has moved when replicas came and went. Then every replica is
        told, because Serve (Ray 2.60) has no way to call a certain one.
        """
        if self._holders or self._has_lost_calls:
            await forget(self._key, self._handle)

    async def _decode(self, job: DecodeJob, earlier: Earlier) -> DecodeResult:
        result = await self._ask(job)
        if isinstance(result, MemoryMissing):
            result = await self._ask(replace(job, earlier=tuple(map(latents_to_wire, await earlier()))))
        if isinstance(result, MemoryMissing):
            raise RuntimeError(f"{result.replica}: no memory of unit {job.unit}, though all before it was sent along")
        if result.keeps_memory:
            self._holders.add(result.replica)
        else:
            self._holders.discard(result.replica)
        return result

    async def _ask(self, job: DecodeJob) -> DecodeResult | MemoryMissing:
        is_answered = False
        try:
            result: DecodeResult | MemoryMissing = await call(
                under_an_id_of_its_own(self._handle.decode_unit.remote, job)
            )
            is_answered = True
            return result
        finally:
            self._has_lost_calls |= not is_answered

    async def _retrying(self, attempt: Callable[[], Any]) -> Any:
        return await retrying(attempt, video_id=self._key, max_retries=self._max_retries, on_retry=self._on_retry)


async def forget(key: str, decoder: DeploymentHandle[Any]) -> None:
    """Tell every replica of a decoder to free the memory under a key. Raises nothing, and gives up after five seconds.

    A replica that cannot be told drops the memory in time by itself.
    """
    try:
        told = decoder.broadcast("forget", key)
        await told.results_async(timeout_s=_FORGET_S, return_exceptions=True)
    except Exception as error:  # of any kind, for nobody is there who could do anything about it
        logger.info("not every decoder was told to forget it: %r", error, extra={"video_id": key})
