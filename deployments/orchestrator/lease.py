"""An orchestrator's hold on one video: what it tells claims while it works, and how it learns that it has to stop."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from ray.serve.handle import DeploymentHandle
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random

from deployments.claims.asking import UNREACHABLE, ask_claims
from deployments.claims.messages import RunUpdate
from pyramid_serve.api import Computed, TimelineEntry, VideoError, VideoRecord
from pyramid_serve.storage import StorageError

logger = logging.getLogger(__name__)

_MIN_INTERVAL_S = 0.1
_GIVE_UP_S = 60.0


class LeaseLostError(RuntimeError):
    """The video is another's now, or over."""


class Lease:
    """One attempt at one video, from the claim to its end."""

    def __init__(self, record: VideoRecord, claims: DeploymentHandle[Any], *, heartbeat_s: float) -> None:
        """``record``: as claims granted it."""
        self.video_id = record.id
        self._attempt = record.attempts
        self._claims = claims
        self._heartbeat_s = heartbeat_s
        self._update = RunUpdate(num_units_retried=record.num_units_retried)
        self._has_news = asyncio.Event()

    def tell(self, **counts: Any) -> None:
        """Let claims know soon; see ``RunUpdate``. Counts are of the whole video."""
        self._update = replace(self._update, **counts)
        self._has_news.set()

    def tell_retry(self) -> None:
        self.tell(num_units_retried=self._update.num_units_retried + 1)

    def tell_computed(self, computed: Computed) -> None:
        """Let claims know what a part of the pipeline computes in."""
        if computed not in self._update.computed:
            others = [other for other in self._update.computed if other.part != computed.part]
            self.tell(computed=(*others, computed))

    def note(self, entry: TimelineEntry) -> None:
        """Add to the timeline."""
        self.tell(timeline=(*self._update.timeline, entry))

    async def keep(self) -> None:
        """Tell what there is, and at every heartbeat, until cancelled. Raises ``LeaseLostError``."""
        answered_at = time.monotonic()
        while True:
            try:
                async with asyncio.timeout(self._heartbeat_s):
                    await self._has_news.wait()
            except TimeoutError:
                pass  # nothing new but that we live
            self._has_news.clear()
            update = self._update
            try:
                async with asyncio.timeout(_GIVE_UP_S):
                    is_ours = await self._claims.update.remote(self.video_id, self._attempt, update)
            except StorageError:  # claims is there, and the storage will be back
                answered_at = time.monotonic()
                await asyncio.sleep(self._heartbeat_s)
                continue
            except UNREACHABLE:
                if time.monotonic() - answered_at > _GIVE_UP_S:
                    raise LeaseLostError("claims does not answer") from None
                await asyncio.sleep(self._heartbeat_s)
                continue
            answered_at = time.monotonic()
            if not is_ours:
                raise LeaseLostError("the video is over, or another's")
            self._forget_sent(update)
            await asyncio.sleep(_MIN_INTERVAL_S)

    async def complete(self) -> None:
        """Every file is there. Raises ``LeaseLostError``."""
        if not await self._insist(lambda: self._claims.complete.remote(self.video_id, self._attempt, self._update)):
            raise LeaseLostError("the video is over, or another's")

    async def fail(self, error: VideoError, *, is_final: bool) -> None:
        await self._insist(lambda: self._claims.fail.remote(self.video_id, self._attempt, error, is_final=is_final))

    async def release(self, *, pause_s: float = 0.0) -> None:
        """Give the video back, to be taken up again after so many seconds."""
        await ask_claims(lambda: self._claims.release.remote(self.video_id, self._attempt, pause_s))

    async def _insist(self, call: Callable[[], Awaitable[bool]]) -> bool:
        """The answer of claims, which is asked again for up to a minute while it cannot use the storage.

        The pauses are shorter than a heartbeat, so that the video is not taken for left.
        """

        async def ask() -> bool:
            return await ask_claims(call)

        return await AsyncRetrying(
            retry=retry_if_exception_type(StorageError),
            stop=stop_after_delay(_GIVE_UP_S),
            wait=wait_random(0.1 * self._heartbeat_s, self._heartbeat_s),
            reraise=True,
        )(ask)

    def _forget_sent(self, sent: RunUpdate) -> None:
        unsent = self._update.timeline[len(sent.timeline) :]
        self._update = replace(self._update, timeline=unsent)
