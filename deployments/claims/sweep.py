"""What claims does by itself: hand videos out, take them from silent owners, delete those that have expired."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from ray.exceptions import RayActorError

from deployments.claims.config import ClaimsConfig
from deployments.claims.ledger import Ledger
from deployments.claims.messages import QueueState
from deployments.claims.orchestrators import Orchestrators
from deployments.claims.queue import next_up, state_of
from deployments.errors import SupersededError
from pyramid_serve.api import VideoRecord
from pyramid_serve.storage import VideoNotFoundError, VideoStore

logger = logging.getLogger(__name__)

_EXPIRY_SWEEP_S = 60.0


class Sweep:
    """Looks after the videos of a ledger until this replica is superseded. For one event loop."""

    def __init__(
        self,
        ledger: Ledger,
        store: VideoStore,
        config: ClaimsConfig,
        orchestrators: Orchestrators,
        *,
        on_queue: Callable[[QueueState], None],
    ) -> None:
        """``on_queue`` is called after each sweep."""
        self._ledger = ledger
        self._store = store
        self._config = config
        self._orchestrators = orchestrators
        self._on_queue = on_queue
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._loops: list[asyncio.Task[None]] = []
        self._scanned_at = 0.0

    def start(self) -> None:
        """Begin the loops. The ledger must be open."""
        self._scanned_at = time.monotonic()
        loops: tuple[Coroutine[Any, Any, None], ...] = (self._sweep_forever(), self._expire_forever())
        self._loops = [asyncio.create_task(loop) for loop in loops]

    async def stop(self, video_id: str) -> None:
        """Tell the orchestrators to stop working on a video.

        An owner that cannot be reached learns it from the answer to its next update.
        """
        try:
            await self._orchestrators.stop(video_id)
        except (RayActorError, TimeoutError):
            logger.warning("could not tell the orchestrators to stop", extra={"video_id": video_id}, exc_info=True)

    async def _sweep_forever(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._config.sweep_interval_s):
                    await self._ledger.has_news.wait()
            except TimeoutError:
                pass  # the regular sweep
            self._ledger.has_news.clear()
            try:
                await self._sweep()
            except SupersededError:
                logger.warning("claims: superseded, no more videos are handed out")
                return
            except Exception:  # of any storage, or of one video: the others must not wait for ever
                logger.exception("claims: a sweep failed, trying again")

    async def _sweep(self) -> None:
        await self._ledger.check_epoch()
        if time.monotonic() - self._scanned_at > self._config.rescan_interval_s:
            await self._ledger.scan()
            self._scanned_at = time.monotonic()
        for record in [record for record in self._ledger.records.values() if record.owner is not None]:
            # While a call about a video is being answered, its owner may be the caller.
            if not self._ledger.is_held(record.id) and not self._ledger.is_leased(record.id):
                try:
                    await self._lose_if_silent(record)
                except VideoNotFoundError:
                    pass  # deleted meanwhile
                except OSError as error:  # the next sweep tries again, and the other videos need not wait for it
                    logger.warning("not taken from its owner: %s", error, extra={"video_id": record.id})
        self._hand_out()
        self._on_queue(state_of(self._ledger.records))

    # --- taking videos from owners that are gone ----------------------------------------------------------------------

    async def _lose_if_silent(self, record: VideoRecord) -> None:
        """Take a video from its owner, unless that was heard from while this waited for the record."""
        async with self._ledger.hold(record.id):
            if not self._ledger.is_leased(record.id):
                await self._lose(record.id, record.attempts, f"its owner {record.owner} was not heard of")

    async def _lose(self, video_id: str, attempt: int, reason: str) -> None:
        """Take a video from an owner that is gone. The caller must hold the record's lock."""
        record = self._ledger.owned(video_id, attempt)
        if record is None:
            return
        run = self._runs.get(video_id)
        if run is not None and run is not asyncio.current_task():
            del self._runs[video_id]  # it may never return, and the video must be handed out again
            run.cancel()
        await self._ledger.lose(record, reason)

    # --- handing out ------------------------------------------------------------------------------------------------

    def _hand_out(self) -> None:
        ready = next_up(self._ledger.records, running=self._runs, max_running=self._config.max_running, now=time.time())
        for video_id in ready:
            self._runs[video_id] = asyncio.create_task(self._follow(video_id))

    async def _follow(self, video_id: str) -> None:
        """Give a video to an orchestrator, and take it back at once when that dies."""
        try:
            await self._orchestrators.run(video_id)
        except RayActorError as error:
            record = self._ledger.records.get(video_id)
            if record is not None and record.owner is not None:
                async with self._ledger.hold(video_id):
                    await self._lose(video_id, record.attempts, f"{record.owner}: {type(error).__name__}")
        except Exception:
            logger.exception("run failed", extra={"video_id": video_id})
            await asyncio.sleep(self._config.sweep_interval_s)
        finally:
            if self._runs.get(video_id) is asyncio.current_task():
                del self._runs[video_id]
            self._ledger.has_news.set()

    # --- expiry -----------------------------------------------------------------------------------------------------

    async def _expire_forever(self) -> None:
        while True:
            await asyncio.sleep(min(_EXPIRY_SWEEP_S, self._config.retention_s))
            try:
                for video_id in await asyncio.to_thread(self._store.sweep, retention_s=self._config.retention_s):
                    logger.info("expired", extra={"video_id": video_id})
            except Exception:
                logger.exception("claims: sweeping away what has expired failed, trying again")
