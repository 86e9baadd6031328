"""How a video gets in: its idempotency key, and its place in a queue of limited length."""

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from deployments.claims.ledger import Ledger
from deployments.claims.queue import StepRate, retry_after_s, waiting
from deployments.errors import QueueFullError
from pyramid_serve.api import VideoRecord
from pyramid_serve.storage import VideoExistsError, VideoNotFoundError, VideoStore

logger = logging.getLogger(__name__)


class Admission:
    """Accepts videos, at most ``max_queued`` waiting at once. For one event loop."""

    def __init__(self, ledger: Ledger, store: VideoStore, rate: StepRate, *, max_queued: int) -> None:
        self._ledger = ledger
        self._store = store
        self._rate = rate
        self._max_queued = max_queued
        self._accepting: set[str] = set()
        self._keys = asyncio.Lock()

    async def admit(self, record: VideoRecord, picture: bytes | None) -> VideoRecord:
        """Accept a video and return its record, or that of another video which has the same idempotency key.

        Raises ``QueueFullError``, and ``StorageError`` where the storage takes nothing: then the video does not exist,
        and its key is free.
        """
        if record.idempotency_key is None:
            return await self._accept(record, picture)
        async with self._keys:
            known = await asyncio.to_thread(self._store.id_of_key, record.idempotency_key)
            if known is not None:
                try:
                    return await self._ledger.get(known)
                except VideoNotFoundError:
                    logger.info("the key's video is gone", extra={"video_id": known})
            with self._place_for(record.id):
                try:
                    await asyncio.to_thread(self._store.bind_key, record.idempotency_key, record.id)
                    return await self._accept(record, picture)
                except OSError:
                    with suppress(OSError):  # a key whose video does not exist is taken as unused anyway
                        await asyncio.to_thread(self._store.release_key, record.idempotency_key, record.id)
                    raise

    async def _accept(self, record: VideoRecord, picture: bytes | None) -> VideoRecord:
        async with self._ledger.hold(record.id):
            if record.id in self._ledger.records:
                return self._ledger.records[record.id]
            with self._place_for(record.id):
                try:
                    await self._ledger.create(record, picture)
                except VideoExistsError:
                    return await self._ledger.get(record.id)
        return record

    @contextmanager
    def _place_for(self, video_id: str) -> Iterator[None]:
        """Keep a place in the queue while a video is being accepted. Raises ``QueueFullError``."""
        records = self._ledger.records
        if len(waiting(records)) + len(self._accepting - {video_id}) >= self._max_queued:
            rate = self._rate.per_second(now=time.monotonic())
            raise QueueFullError(self._max_queued, retry_after_s(records, rate=rate))
        self._accepting.add(video_id)
        try:
            yield
        finally:
            self._accepting.discard(video_id)
