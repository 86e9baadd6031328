"""How a video gets in: its idempotency key, and its place in a queue of limited length."""

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from deployments.claims.ledger import Ledger
from deployments.claims.queue import StepRate, retry_after_s
from deployments.errors import QueueFullError
from pyramid_serve.api import VideoRecord, created_at_of
from pyramid_serve.storage import VideoExistsError, VideoNotFoundError, VideoStore

logger = logging.getLogger(__name__)

_ACCEPTING_S = 5.0
"""How long after its creation a video may still be in the hands of another app that is about to accept it."""
_LOOK_S = 0.2


class Admission:
    """Accepts videos, at most ``max_queued`` waiting at once. For one event loop."""

    def __init__(self, ledger: Ledger, store: VideoStore, rate: StepRate, *, max_queued: int) -> None:
        self._ledger = ledger
        self._store = store
        self._rate = rate
        self._max_queued = max_queued
        self._accepting: set[str] = set()

    async def admit(self, record: VideoRecord) -> VideoRecord:
        """Accept a video and return its record, or that of another video which has the same idempotency key.

        Raises ``QueueFullError``, and ``StorageError`` where the storage takes nothing: then the video does not exist,
        and its key is free.
        """
        key = record.idempotency_key
        if key is None:
            return await self._accept(record)
        async with self._ledger.hold(f"key {key}"):
            known = await asyncio.to_thread(self._store.keys.id_of, key)
            if known is not None:
                made = await self._accepted_by_now(known, is_own=known == record.id)
                if made is not None:
                    return made
                logger.info("the key's video is gone", extra={"video_id": known})
                await asyncio.to_thread(self._store.keys.release, key, known)
            with self._place_for(record.id):
                try:
                    bound = await asyncio.to_thread(self._store.keys.bind, key, record.id)
                    if bound != record.id:  # another app was faster
                        made = await self._accepted_by_now(bound, is_own=False)
                        if made is not None:
                            return made
                        await asyncio.to_thread(self._store.keys.release, key, bound)
                        await asyncio.to_thread(self._store.keys.bind, key, record.id)
                    return await self._accept(record)
                except OSError:
                    with suppress(OSError):  # a key whose video does not exist is taken as unused anyway
                        await asyncio.to_thread(self._store.keys.release, key, record.id)
                    raise

    async def _accepted_by_now(self, video_id: str, *, is_own: bool) -> VideoRecord | None:
        """The record of a video, once another app has accepted it; None where that does not happen in a few seconds.

        is_own: the video is the one that is to be accepted here, so that nobody else is waited for.
        """
        until = created_at_of(video_id) + _ACCEPTING_S
        while True:
            try:
                return await self._ledger.get(video_id)
            except VideoNotFoundError:
                if is_own or not time.time() < until < time.time() + 2 * _ACCEPTING_S:
                    return None
            await asyncio.sleep(_LOOK_S)

    async def _accept(self, record: VideoRecord) -> VideoRecord:
        async with self._ledger.hold(record.id):
            if record.id in self._ledger.records:
                return self._ledger.records[record.id]
            with self._place_for(record.id):
                try:
                    await self._ledger.create(record)
                except VideoExistsError:
                    return await self._ledger.get(record.id)
        return record

    @contextmanager
    def _place_for(self, video_id: str) -> Iterator[None]:
        """Keep a place in the queue while a video is being accepted. Raises ``QueueFullError``."""
        if self._ledger.state.num_queued + len(self._accepting - {video_id}) >= self._max_queued:
            rate = self._rate.per_second(now=time.monotonic())
            raise QueueFullError(self._max_queued, retry_after_s(self._ledger.records, rate=rate))
        self._accepting.add(video_id)
        try:
            yield
        finally:
            self._accepting.discard(video_id)
