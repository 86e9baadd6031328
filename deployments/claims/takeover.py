"""How claims finds the videos that it is to look after: its own, new ones, and those of holders that left."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from deployments.claims.holder import Holder
from deployments.claims.ledger import Ledger
from deployments.errors import SupersededError
from pyramid_serve.api import VideoRecord
from pyramid_serve.reasons import first_line
from pyramid_serve.storage import StorageError, VideoNotFoundError, VideoStore

Look = Callable[[str], Coroutine[Any, Any, None]]

logger = logging.getLogger(__name__)

_AT_ONCE = 16
_LOOK_S = 10.0
_SET_ASIDE_S = 60.0
_ACCEPTING_S = 2.0
"""The marker of a video comes before its record."""


class Takeover:
    """Keeps a ledger in step with the storage, where others write too. For one event loop."""

    def __init__(self, ledger: Ledger, store: VideoStore, holder: Holder, *, on_lost: Look) -> None:
        """``on_lost`` is called with the id of a video that is not held here any more: its owner is to stop."""
        self._ledger = ledger
        self._store = store
        self._holder = holder
        self._on_lost = on_lost
        self._set_aside_until: dict[str, float] = {}
        self._is_looking: set[str] = set()

    async def scan(self) -> None:
        """Drop the videos that others hold or ended, and take those that nobody else looks after.

        Raises ``StorageError`` where the storage cannot be listed. What goes wrong with one video is logged.
        """
        known = dict(self._ledger.terms)
        terms = await asyncio.to_thread(self._store.holds.terms)
        mine = [video_id for video_id, term in known.items() if terms.get(video_id) != term]
        await self._each(mine, lambda video_id: self._check(video_id, terms.get(video_id)))
        now = time.monotonic()
        for video_id in [video_id for video_id, until in self._set_aside_until.items() if until < now]:
            del self._set_aside_until[video_id]
        others = [
            video_id
            for video_id in sorted(terms)
            if video_id not in self._ledger.records and video_id not in self._set_aside_until
        ]
        await self._each(others, lambda video_id: self._consider(video_id, terms[video_id]))

    async def _each(self, video_ids: Iterable[str], look: Look) -> None:
        """Look at videos, some at a time. One that hangs or fails is left out for a while."""
        places = asyncio.Semaphore(_AT_ONCE)

        async def look_at(video_id: str) -> None:
            async with places:
                if video_id in self._is_looking:
                    return  # the look before hangs; it ends by itself or never
                self._is_looking.add(video_id)
                looking = asyncio.create_task(look(video_id))
                looking.add_done_callback(lambda _: self._is_looking.discard(video_id))
                try:
                    async with asyncio.timeout(_LOOK_S):
                        await asyncio.shield(looking)
                except SupersededError:
                    pass  # whoever asks for the next scan is told
                except (ValueError, StorageError, TimeoutError) as error:
                    self._leave_out(video_id, f"{type(error).__name__}: {first_line(error)}")

        async with asyncio.TaskGroup() as tasks:
            for video_id in video_ids:
                tasks.create_task(look_at(video_id))

    def _leave_out(self, video_id: str, reason: str) -> None:
        logger.warning("left out for a while: %s", reason, extra={"video_id": video_id})
        self._set_aside_until[video_id] = time.monotonic() + _SET_ASIDE_S

    # --- what is held here --------------------------------------------------------------------------------------------

    async def _check(self, video_id: str, term: int | None) -> None:
        """See why a video that is held here is in another term, or is no longer marked as unfinished."""
        async with self._ledger.hold(video_id):
            if video_id not in self._ledger.records or self._ledger.terms[video_id] == term:
                return
            if term is not None:
                if await asyncio.to_thread(self._store.holds.holder_of, video_id, term) == self._holder.name:
                    self._ledger.hold_in(video_id, term=term)
                    return
                logger.info("another app has taken it over", extra={"video_id": video_id})
            else:
                record = await self._read(video_id)
                if record is not None and not record.is_over:
                    term = self._ledger.terms[video_id]
                    if await asyncio.to_thread(self._store.holds.take, video_id, term, self._holder.name):
                        return  # someone has removed its marker
            self._ledger.drop(video_id)
        await self._on_lost(video_id)

    # --- what is not held here ----------------------------------------------------------------------------------------

    async def _consider(self, video_id: str, term: int) -> None:
        """Take a video if nobody looks after it."""
        name = await asyncio.to_thread(self._store.holds.holder_of, video_id, term)
        if name is None or not self._may_take(name):
            return
        async with self._ledger.hold(video_id):
            record = await self._read(video_id)
            if video_id in self._ledger.records:
                return
            if record is None:
                # It is being accepted, or was deleted; where that was interrupted, the sweep removes the marker.
                self._set_aside_until[video_id] = time.monotonic() + _ACCEPTING_S
            elif record.is_over:
                await asyncio.to_thread(self._store.settle, record, term=term)
            elif name == self._holder.name:
                self._ledger.adopt(record, term=term)
            elif name == "" or self._holder.has_left(name) or record.owner is None:
                await self._take(record, term, name)

    def _may_take(self, name: str) -> bool:
        """Whether a video of this holder may be taken, perhaps after a look at its record."""
        if name == self._holder.name:
            return True
        if self._holder.stands_by or self._holder.is_yielding or not self._holder.is_believed:
            return False
        return name == "" or self._holder.has_left(name) or self._holder.yields(name)

    async def _take(self, record: VideoRecord, term: int, name: str) -> None:
        """Begin the next term of a video. The caller must hold its lock."""
        await self._holder.check()
        if not await asyncio.to_thread(self._store.holds.take, record.id, term + 1, self._holder.name):
            return
        latest = await self._read(record.id)  # the holder before may have written meanwhile
        if latest is None or latest.is_over:
            await asyncio.to_thread(self._store.holds.remove, record.id, term=term + 1)
            return
        is_ours = name == "" or self._holder.is_of_this_app(name)
        if not is_ours:
            # Its owner belongs to the other app, which is gone: nobody would hear of it.
            latest = latest.changed(owner=None, lease_expires_at=None)
        logger.info("taken over from %s", name or "an earlier release", extra={"video_id": record.id})
        self._ledger.adopt(latest, term=term + 1)

    async def _read(self, video_id: str) -> VideoRecord | None:
        try:
            return await asyncio.to_thread(self._store.read, video_id)
        except VideoNotFoundError:
            return None
