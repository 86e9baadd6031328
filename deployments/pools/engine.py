"""The engine: many videos' units, advanced together, one forward a turn. Knows neither Ray nor any model.

A unit that is being made is a *slot*. It drives a generator such as ``sampler.denoise_unit``: that yields the requests
of its next step, is sent the responses, and returns what it made. Every turn packs the requests of some slots into one
forward; slots join and leave between turns. A turn that takes too long fails them all: its device hangs.

Everything that computes runs in turns on one thread of the engine's own, the generators and the forward alike, so the
event loop stays free and no two steps overlap.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar

import torch

from deployments.errors import DeviceFailedError
from deployments.pools.compute_thread import ComputeThread
from deployments.pools.packing import choose_pack
from deployments.pools.token_budget import TokenBudget
from deployments.telemetry.forwards import EngineStats, Forward

logger = logging.getLogger(__name__)


class Request(Protocol):
    """What a forward computes on. ``num_tokens`` is its cost, as the token budget counts it."""

    @property
    def num_tokens(self) -> int: ...


RequestT = TypeVar("RequestT", bound=Request)
ResponseT = TypeVar("ResponseT")
ResultT = TypeVar("ResultT")


class Slot:
    """One generator in the engine. All but ``has_left`` is touched by the compute thread alone."""

    def __init__(
        self,
        steps: Generator[Sequence[Any], Sequence[Any], Any],
        *,
        submitted_at: float,
        on_start: Callable[[], None] | None = None,
        on_step: Callable[[Forward], None] | None = None,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.submitted_at = submitted_at
        self.requests: Sequence[Any] = ()
        self.num_tokens = 0
        self.missed_turns = 0
        self.has_left = False
        self.future: asyncio.Future[Any] = loop.create_future()
        self._steps = steps
        self._on_start = on_start
        self._on_step = on_step
        self._loop = loop

    def begin(self) -> None:
        """Run the generator to its first requests."""
        self._advance(lambda: next(self._steps))

    def take(self) -> None:
        """Tell, once, that this slot is taken into a forward."""
        if self._on_start is not None:
            self._tell(self._on_start)
            self._on_start = None

    def send(self, responses: Sequence[Any], forward: Forward) -> None:
        """Run the generator on to its next requests, with the responses to the last ones."""
        if self.has_left:
            return
        if self._on_step is not None:
            self._tell(self._on_step, forward)
        self._advance(lambda: self._steps.send(responses))

    def fail(self, error: Exception) -> None:
        """Leave with an error. Its traceback is dropped, since the frames of a forward hold device memory."""
        self.has_left = True
        if isinstance(error, StopIteration):  # which no future takes
            error = RuntimeError(f"a forward raised {error!r}")
        self._tell(self._resolve, None, error.with_traceback(None))

    def close(self) -> None:
        """Let the generator go, where it stands."""
        try:
            self._steps.close()
        except Exception:
            logger.exception("a unit that left failed on closing")

    def _advance(self, step: Callable[[], Sequence[Any]]) -> None:
        try:
            self.requests = step()
            self.num_tokens = sum(request.num_tokens for request in self.requests)
        except StopIteration as finished:
            self.has_left = True
            self._tell(self._resolve, finished.value, None)
        except torch.AcceleratorError:
            raise  # it is not this unit alone that fails
        except Exception as error:
            logger.exception("a unit failed between forwards")
            self.fail(error)

    def _resolve(self, result: Any, error: Exception | None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)

    def _tell(self, callback: Callable[..., None], *arguments: Any) -> None:
        with suppress(RuntimeError):  # the caller's event loop is closed: nobody is there to be told
            self._loop.call_soon_threadsafe(callback, *arguments)


class Engine(Generic[RequestT, ResponseT]):
    """Drives slots in turns. Its methods are for one event loop, and the callbacks given to ``run`` run there."""

    def __init__(
        self,
        forward: Callable[[Sequence[RequestT]], Sequence[ResponseT]],
        *,
        token_budget: int | None = None,
        max_slots: int | None = None,
        packs_with: Callable[[RequestT], Hashable] | None = None,
        on_forward: Callable[[Forward, EngineStats], None] | None = None,
        on_out_of_memory: Callable[[], None] | None = None,
        thread: ComputeThread | None = None,
    ) -> None:
        """forward: responses to the requests of a whole pack, in order; called on the compute thread.

        token_budget, max_slots: of one forward, None for no limit; packs_with: only requests with equal values share a
        forward, all of them where None; on_forward, on_out_of_memory: called on the compute thread after each forward,
        and after each one for which memory was too little; thread: the engine's own, which says what happens when the
        device hangs; None for one without a limit. Raises ``ValueError``.
        """
        for setting, value in (("token_budget", token_budget), ("max_slots", max_slots)):
            if value is not None and value < 1:
                raise ValueError(f"{setting}={value}: must be at least 1, or None for no limit")
        self._forward = forward
        self._max_slots = max_slots
        self._packs_with = packs_with
        self._on_forward = on_forward
        self._on_out_of_memory = on_out_of_memory
        self._thread = thread or ComputeThread("engine")
        self._lock = threading.Lock()
        self._joining: list[Slot] = []
        self._slots: list[Slot] = []
        self._pack: Sequence[Slot] = ()
        self._is_turning = False
        self._budget = TokenBudget(token_budget)
        self._stats = EngineStats()

    async def run(
        self,
        steps: Generator[Sequence[RequestT], Sequence[ResponseT], ResultT],
        *,
        submitted_at: float,
        on_start: Callable[[], None] | None = None,
        on_step: Callable[[Forward], None] | None = None,
    ) -> ResultT:
        """What ``steps`` returns, driven to its end among the other slots.

        submitted_at: the oldest go first; on_start: called when the slot is first taken into a forward; on_step: after
        each forward it was part of. Raises what the generator raised, what a forward of it alone raised, or
        ``DeviceFailedError``. When cancelled, the slot is out of the engine before the next forward.
        """
        self.check()
        loop = asyncio.get_running_loop()
        slot = Slot(steps, submitted_at=submitted_at, on_start=on_start, on_step=on_step, loop=loop)
        with self._lock:
            self._joining.append(slot)
            self._keep_turning()
        try:
            result: ResultT = await self._thread.result_of(slot.future)
            return result
        finally:
            slot.has_left = True

    async def run_between_turns(self, function: Callable[[], ResultT]) -> ResultT:
        """``function()``, run on the compute thread between two turns. Raises ``DeviceFailedError`` as ``run`` does."""
        return await self._thread.run(function)

    def stats(self) -> EngineStats:
        with self._lock:
            present = [slot for slot in (*self._slots, *self._joining) if not slot.has_left]
            queue_depth = sum(slot not in self._pack for slot in present)
            return replace(
                self._stats, num_present=len(present), queue_depth=queue_depth, token_budget=self._budget.current
            )

    def check(self) -> None:
        """Raise ``DeviceFailedError`` if the device has failed for good, or hangs."""
        self._thread.check()

    def _keep_turning(self) -> None:
        """Queue a turn if there is none and something to do. The caller must hold the lock.

        Queued anew after each turn, so that what ``run_between_turns`` queued meanwhile comes first.
        """
        if self._is_turning:
            return
        if self._slots or self._joining:
            self._is_turning = True
            self._thread.submit(self._turn)

    # --- on the compute thread --------------------------------------------------------------------------------------

    def _turn(self) -> None:
        try:
            self.check()
            with self._thread.turn():
                self._take_turn()
        except torch.AcceleratorError as error:
            logger.exception("the device failed")
            self._fail_all(self._thread.failed(error))
        except DeviceFailedError as error:
            with self._lock:  # those that came while it failed
                self._slots, self._joining = [*self._slots, *self._joining], []
            self._fail_all(error)
        except Exception as error:
            logger.exception("a turn failed outside of any forward: all slots fail")
            self._fail_all(error)
        with self._lock:
            self._pack = ()
            self._is_turning = False
            self._keep_turning()

    def _take_turn(self) -> None:
        self._join_and_leave()
        pack = choose_pack(
            self._slots,
            token_budget=self._budget.current,
            max_slots=self._max_slots,
            packs_with=self._packs_with,
        )
        for slot in self._slots:
            slot.missed_turns += 1
        if pack:
            self._advance(pack)

    def _join_and_leave(self) -> None:
        with self._lock:
            joining, self._joining = self._joining, []
            self._slots = [*self._slots, *joining]
        for slot in joining:
            if not slot.has_left:
                slot.begin()
        present = []
        for slot in self._slots:
            if slot.has_left:
                slot.close()
            else:
                present.append(slot)
        with self._lock:
            self._slots = present

    def _advance(self, pack: Sequence[Slot]) -> None:
        """One forward of the pack; or, where that fails, one of each slot alone, or a smaller budget from now on."""
        num_tokens = sum(slot.num_tokens for slot in pack)
        for slot in pack:
            slot.missed_turns = 0
            slot.take()
        self._pack = pack
        started, clock = time.time(), time.perf_counter()
        is_out_of_memory = False
        try:
            responses = self._respond(pack)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            # Handled below, for until the end of this block the error holds what the forward had allocated.
            responses = None
            is_out_of_memory = isinstance(error, torch.OutOfMemoryError)
            self._note_failure(error, pack, num_tokens)
        if responses is not None:
            forward = Forward(len(pack), num_tokens, started, started + time.perf_counter() - clock)
            self._budget.went_well()
            self._send(responses, pack, forward)
        elif is_out_of_memory:
            self._release_memory(pack, num_tokens)
        elif len(pack) > 1:
            for slot in pack:
                if not slot.has_left:
                    with self._thread.turn():
                        self._advance([slot])

    def _respond(self, pack: Sequence[Slot]) -> Sequence[ResponseT]:
        requests = [request for slot in pack for request in slot.requests]
        responses = self._forward(requests)
        if len(responses) != len(requests):
            raise ValueError(f"forward: {len(responses)} responses to {len(requests)} requests")
        return responses

    def _note_failure(self, error: Exception, pack: Sequence[Slot], num_tokens: int) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            logger.warning("out of memory: %d slots, %d tokens: %s", len(pack), num_tokens, error)
            if self._on_out_of_memory is not None:
                self._on_out_of_memory()
        else:
            logger.exception("a forward failed: %d slots, %d tokens", len(pack), num_tokens)
        if len(pack) == 1:
            pack[0].fail(error)

    def _send(self, responses: Sequence[ResponseT], pack: Sequence[Slot], forward: Forward) -> None:
        clock = time.perf_counter()
        with self._lock:
            self._stats = replace(
                self._stats,
                num_forwards=self._stats.num_forwards + 1,
                num_slots=self._stats.num_slots + forward.num_slots,
                num_tokens=self._stats.num_tokens + forward.num_tokens,
            )
        remaining = iter(responses)
        for slot in pack:
            slot.send([next(remaining) for _ in slot.requests], forward)
        with self._lock:
            seconds = forward.seconds + time.perf_counter() - clock
            self._stats = replace(self._stats, busy_seconds=self._stats.busy_seconds + seconds)
        if self._on_forward is not None:
            self._on_forward(forward, self.stats())

    def _release_memory(self, pack: Sequence[Slot], num_tokens: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(pack) > 1:
            self._budget.ran_out_of_memory(num_tokens)

    def _fail_all(self, error: Exception) -> None:
        for slot in self._slots:
            if not slot.has_left:
                slot.fail(error)
            slot.close()
        with self._lock:
            self._slots = []
