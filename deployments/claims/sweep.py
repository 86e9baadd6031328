"""What claims does by itself: hand videos out, take them from silent owners, delete those that have expired."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from ray.exceptions import RayActorError

from deployments.claims.config import ClaimsConfig
from deployments.claims.holder import Holder
from deployments.claims.ledger import Ledger
from deployments.claims.orchestrators import Orchestrators
from deployments.claims.queue import next_up
from deployments.claims.takeover import Takeover
from deployments.errors import SupersededError
from deployments.rpc.retry import RETRIED
from pyramid_serve.reasons import first_line
from pyramid_serve.storage import StorageError, VideoNotFoundError, VideoStore

logger = logging.getLogger(__name__)

_EXPIRY_SWEEP_S = 60.0
_MAX_JUMP_S = 60.0
_AGAIN_S = 1.0
_TOGETHER_S = 0.02
"""Of news that come one after another, a sweep takes up all of so long: it looks at every video."""
_MAX_SHARE = 0.05
"""The share of the time that may be spent on handing out, which takes longer the more videos wait."""


class Sweep:
    """Looks after the videos of a ledger until this replica is superseded. For one event loop."""

    def __init__(
        self,
        ledger: Ledger,
        store: VideoStore,
        holder: Holder,
        config: ClaimsConfig,
        orchestrators: Orchestrators,
        *,
        on_sweep: Callable[[], None],
        on_storage_failure: Callable[[], None],
    ) -> None:
        """on_sweep: called after each sweep; on_storage_failure: called when the storage refused a sweep, a search for
        videos, or to note that this app is there.
        """
        self._ledger = ledger
        self._store = store
        self._holder = holder
        self._config = config
        self._orchestrators = orchestrators
        self._on_sweep = on_sweep
        self._on_storage_failure = on_storage_failure
        self._takeover = Takeover(ledger, store, holder, on_lost=self._forget_run)
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._loops: list[asyncio.Task[None]] = []
        self._hand_out_s = 0.0
        self._clock = SteadyClock()

    async def open(self) -> None:
        """Be a holder, take up the unfinished videos, and begin the loops."""
        await self._holder.open()
        await self._takeover.scan()
        loops: tuple[Coroutine[Any, Any, None], ...] = (
            self._sweep_forever(),
            self._scan_forever(),
            self._beat_forever(),
            self._expire_forever(),
        )
        self._loops = [asyncio.create_task(loop) for loop in loops]

    async def stop(self, video_id: str) -> None:
        """Tell the orchestrators to stop working on a video.

        An owner that cannot be reached learns it from the answer to its next update.
        """
        try:
            await self._orchestrators.stop(video_id)
        except RETRIED:
            logger.warning("could not tell the orchestrators to stop", extra={"video_id": video_id}, exc_info=True)

    async def _forget_run(self, video_id: str) -> None:
        """A video is not held here any more."""
        run = self._runs.pop(video_id, None)
        if run is not None:
            run.cancel()  # which cancels the orchestrator's work, too
        else:
            await self.stop(video_id)

    # --- the standing among other apps --------------------------------------------------------------------------------

    async def _beat_forever(self) -> None:
        while True:
            interval_s = self._holder.lease_s / 4
            await asyncio.sleep(interval_s if self._holder.is_believed else min(interval_s, _AGAIN_S))
            try:
                if not self._holder.is_ready:
                    self._holder.is_ready = await self._orchestrators.are_ready()
                if not await self._holder.beat():
                    logger.warning("claims: the storage was away for long, looking at all videos again")
                    await self._takeover.scan()
                    await self._holder.stand_again()
                    self._ledger.has_news.set()
            except SupersededError:
                logger.warning("claims: superseded, no more videos are handed out")
                return
            except StorageError as error:
                logger.warning("claims: could not say that it is there: %s", error)
                self._on_storage_failure()
            except Exception:
                logger.exception("claims: could not say that it is there, trying again")

    async def _sweep_forever(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._config.sweep_interval_s):
                    await self._ledger.has_news.wait()
            except TimeoutError:
                pass  # the regular sweep
            await asyncio.sleep(min(max(_TOGETHER_S, self._hand_out_s / _MAX_SHARE), self._config.sweep_interval_s))
            self._ledger.has_news.clear()
            try:
                await self._sweep()
            except SupersededError:
                return
            except StorageError as error:
                logger.warning("claims: no sweep: %s", error)
                self._on_storage_failure()
            except Exception:  # of one video: the others must not wait for ever
                logger.exception("claims: a sweep failed, trying again")

    async def _scan_forever(self) -> None:
        scanned_at = time.monotonic()
        while not self._holder.is_superseded:
            await asyncio.sleep(self._config.sweep_interval_s)
            # Where other apps are, videos come and go without being told of here.
            is_due = time.monotonic() - scanned_at > self._config.rescan_interval_s
            if not is_due and not self._holder.has_others:
                continue
            scanned_at = time.monotonic()
            try:
                await self._takeover.scan()
            except StorageError as error:
                logger.warning("claims: the storage is not searched: %s", error)
                self._on_storage_failure()
            except Exception:
                logger.exception("claims: a search of the storage failed, trying again")

    async def _sweep(self) -> None:
        await self._holder.check()
        for record in [record for record in self._ledger.records.values() if record.owner is not None]:
            # While a call about a video is being answered, its owner may be the caller.
            if not self._ledger.is_held(record.id) and not self._ledger.is_leased(record.id):
                await self._lose_quietly(record.id, record.attempts, f"its owner {record.owner} was not heard of")
        started = time.perf_counter()
        self._hand_out()
        self._hand_out_s = time.perf_counter() - started
        self._on_sweep()

    # --- taking videos from owners that are gone ----------------------------------------------------------------------

    async def _lose_quietly(self, video_id: str, attempt: int, reason: str) -> None:
        """Take a video from its owner, unless that was heard from while this waited for the record.

        Where the storage refuses, or cannot read how the video ended, the next sweep tries again.
        """
        try:
            async with self._ledger.hold(video_id):
                if not self._ledger.is_leased(video_id):
                    await self._lose(video_id, attempt, reason)
        except VideoNotFoundError:
            pass  # deleted meanwhile
        except (StorageError, ValueError) as error:
            logger.warning("not taken from its owner: %s", first_line(error), extra={"video_id": video_id})

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
        if self._holder.is_yielding or self._holder.stands_by:
            return
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
                self._ledger.end_lease(video_id)
                await self._lose_quietly(video_id, record.attempts, f"{record.owner}: {type(error).__name__}")
        except StorageError as error:
            logger.warning("not begun: %s", error, extra={"video_id": video_id})
            await asyncio.sleep(self._config.sweep_interval_s)
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
                now = self._clock.time()
                for video_id in await asyncio.to_thread(
                    self._store.sweep, retention_s=self._config.retention_s, now=now
                ):
                    logger.info("expired", extra={"video_id": video_id})
            except Exception:
                logger.exception("claims: sweeping away what has expired failed, trying again")


class SteadyClock:
    """Unix time that runs no faster than this process: a clock that jumps ahead must not make everything expire."""

    def __init__(self) -> None:
        self._offset_s = time.time() - time.monotonic()
        self._is_ahead = False

    def time(self) -> float:
        """Unix seconds. After a jump of the system's clock to a later time, the time before goes on."""
        offset_s = time.time() - time.monotonic()
        was_ahead, self._is_ahead = self._is_ahead, offset_s > self._offset_s + _MAX_JUMP_S
        if not self._is_ahead:
            self._offset_s = offset_s
        elif not was_ahead:
            logger.warning("the clock jumped %.0f s ahead; videos expire by the time before", offset_s - self._offset_s)
        return time.monotonic() + self._offset_s
