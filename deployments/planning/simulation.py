"""A simulated app: videos that arrive, wait at claims, and go through the pools by the rules of the real one.

A video's units are denoised one after another, each by a replica chosen anew. Unit k is decoded behind that, always by
the same replica, and saved behind its decoding by an orchestrator, at most three units ahead of what is saved.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from deployments.planning.events import Events
from deployments.planning.replicas import Device, EngineRules, Memories, Pool, Replica, Slot
from deployments.planning.stage_times import StageTimes, StepWork, VideoWork

Arrivals = Iterator[tuple[float, VideoWork]]
"""The moment of each arrival in seconds, in order, and what the video takes."""

_UNITS_AHEAD = 4
"""One that is being saved, two that wait for it, and one that is decoded and finds no place among these."""


@dataclass(frozen=True)
class Layout:
    """How many replicas there are, and the settings that decide how they work."""

    num_text_encoders: int = 1
    num_denoisers: int = 1
    num_decoders: int = 1
    num_save_cores: int = 2
    """Cores of the orchestrators, which make the fragments of streams."""
    max_running: int = 32
    token_budget: int = 32_768
    max_slots: int | None = None
    max_batch_size: int | None = 8
    """Units of one forward of the decoder."""
    memories_on_device: int = 1_000_000
    """Videos whose memory a decoder keeps on its device, and beside these in host memory."""
    memories_in_host: int = 0
    on_one_device: bool = False
    """The replicas of all pools share a device, on which their forwards take turns."""


@dataclass
class VideoTimes:
    """When things happened to a video, in seconds."""

    work: VideoWork
    arrived: float
    begun: float = 0.0
    """Its first step."""
    first_frame: float = 0.0
    ended: float | None = None

    @property
    def wait_s(self) -> float:
        return self.begun - self.arrived

    @property
    def first_frame_s(self) -> float:
        return self.first_frame - self.arrived

    @property
    def latency_s(self) -> float:
        return (self.ended or 0.0) - self.arrived


@dataclass(frozen=True)
class PoolTimes:
    """What a pool did: the share of the time that its replicas computed, and units in a forward."""

    busy_share: float
    mean_pack: float


@dataclass(frozen=True)
class Simulated:
    """What came of a simulation."""

    videos: list[VideoTimes]
    """Those that arrived in the time that counts, and ended."""
    num_unfinished: int
    """Those of them that had not ended when it was given up."""
    wall_s: float
    pools: dict[str, PoolTimes]
    save_busy_share: float
    most_running: int
    """Videos that were being made at once."""
    mean_running: float
    num_rebuilt: int
    """Units decoded again because the memory of their video was gone."""


def simulate(
    arrivals: Arrivals,
    times: StageTimes,
    layout: Layout,
    *,
    seed: int = 0,
    counted_from: float = 0.0,
    counted_until: float = float("inf"),
    give_up_at: float = float("inf"),
) -> Simulated:
    """Run an app until every video that arrived in the time that counts has ended, or ``give_up_at`` is reached.

    Videos go on arriving until then. What the pools do is counted in that time alone. Times in seconds; the same
    arguments give the same result.
    """
    app = _App(times, layout, Random(seed))
    counted: list[VideoTimes] = []
    is_last_seen = False

    def arrive() -> None:
        nonlocal is_last_seen
        following = next(arrivals, None)
        if following is None:
            is_last_seen = True
            return
        at, work = following
        is_last_seen = is_last_seen or at >= counted_until
        app.events.after(max(at - app.events.now, 0.0), enter, work)

    def enter(work: VideoWork) -> None:
        video = app.accept(work)
        if counted_from <= video.arrived < counted_until:
            counted.append(video)
        arrive()

    def is_over() -> bool:
        if app.events.now >= give_up_at:
            return True
        while counted and app.num_ended_in_order < len(counted):
            if counted[app.num_ended_in_order].ended is None:
                return False
            app.num_ended_in_order += 1
        return is_last_seen

    app.events.after(counted_from, app.begin_counting)
    if counted_until < float("inf"):
        app.events.after(counted_until, app.end_counting)
    arrive()
    app.events.run(until=is_over)
    return app.result(counted)


class _App:
    """All pools, and claims with its queue."""

    def __init__(self, times: StageTimes, layout: Layout, random: Random) -> None:
        self.events = events = Events()
        self.times, self.layout, self.random = times, layout, random
        self.num_ended_in_order = 0
        device = Device(events) if layout.on_one_device else None
        self.text = Pool(
            events,
            EngineRules(lambda _: times.encode_s, max_slots=16, max_ongoing=64),
            layout.num_text_encoders,
            random,
            device,
        )
        self.denoise = Pool(
            events,
            EngineRules(times.forward_s, token_budget=layout.token_budget, max_slots=layout.max_slots),
            layout.num_denoisers,
            random,
            device,
        )
        decoding = EngineRules(
            lambda units: max(times.decode_fixed_s + sum(units), 0.0), max_slots=layout.max_batch_size, max_ongoing=64
        )
        self.decode = Pool(events, decoding, layout.num_decoders, random, device)
        self.memories = [
            Memories(num_on_device=layout.memories_on_device, num_in_host=layout.memories_in_host)
            for _ in range(layout.num_decoders)
        ]
        self.save = Cores(events, layout.num_save_cores)
        self.num_rebuilt = 0
        self.most_running = 0
        self._num_accepted = 0
        self._num_running = 0
        self._running_s = self._running_since = 0.0
        self._queue: deque[_Run] = deque()
        self._before = self._totals()
        self._after: _Totals | None = None

    def accept(self, work: VideoWork) -> VideoTimes:
        run = _Run(self, self._num_accepted, work)
        self._num_accepted += 1
        self._queue.append(run)
        self._hand_out()
        return run.video

    def end(self) -> None:
        """A video is over."""
        self._count_running(-1)
        self._hand_out()

    def begin_counting(self) -> None:
        self._before = self._totals()

    def end_counting(self) -> None:
        self._after = self._totals()

    def result(self, videos: list[VideoTimes]) -> Simulated:
        after, before = self._after or self._totals(), self._before
        wall_s = (after.now - before.now) or 1.0
        ended = [video for video in videos if video.ended is not None]
        return Simulated(
            videos=ended,
            num_unfinished=len(videos) - len(ended),
            wall_s=wall_s,
            pools={name: _pool_times(after.pools[name], before.pools[name], wall_s) for name in after.pools},
            save_busy_share=(after.save_s - before.save_s) / (wall_s * self.layout.num_save_cores),
            most_running=self.most_running,
            mean_running=(after.running_s - before.running_s) / wall_s,
            num_rebuilt=after.num_rebuilt - before.num_rebuilt,
        )

    def _totals(self) -> "_Totals":
        self._count_running(0)
        pools = {"TextEncoder": self.text, "Denoiser": self.denoise, "Decoder": self.decode}
        return _Totals(
            self.events.now,
            {name: _PoolTotals.of(pool.replicas) for name, pool in pools.items()},
            self.save.busy_s,
            self._running_s,
            self.num_rebuilt,
        )

    def _hand_out(self) -> None:
        while self._queue and self._num_running < self.layout.max_running:
            self._count_running(1)
            self._queue.popleft().begin()

    def _count_running(self, change: int) -> None:
        now = self.events.now
        self._running_s += self._num_running * (now - self._running_since)
        self._running_since = now
        self._num_running += change
        self.most_running = max(self.most_running, self._num_running)


class Cores:
    """Cores that work off jobs in the order of asking."""

    def __init__(self, events: Events, num_cores: int) -> None:
        self.busy_s = 0.0
        self._events = events
        self._num_free = num_cores
        self._waiting: deque[tuple[float, Callable[[], None]]] = deque()

    def run(self, seconds: float, end: Callable[[], None]) -> None:
        self._waiting.append((seconds, end))
        self._begin()

    def _begin(self) -> None:
        while self._waiting and self._num_free:
            seconds, end = self._waiting.popleft()
            self._num_free -= 1
            self.busy_s += seconds
            self._events.after(seconds, self._end, end)

    def _end(self, end: Callable[[], None]) -> None:
        self._num_free += 1
        end()
        self._begin()


class _Run:
    """One video on its way."""

    def __init__(self, app: _App, number: int, work: VideoWork) -> None:
        self.video = VideoTimes(work, app.events.now)
        self._app = app
        self._number = number
        self._units = work.units
        self._num_denoised = self._num_decoded = self._num_saved = 0
        self._is_decoding = self._is_saving = False
        self._decoder = app.random.randrange(app.layout.num_decoders)

    def begin(self) -> None:
        app = self._app
        encode = [StepWork(1, 0, 0.0)]
        slot = Slot(encode, submitted_at=self.video.arrived, key=None, on_end=self._denoise)
        app.events.after(app.times.begin_s, app.text.submit, slot)

    def _denoise(self) -> None:
        """Ask for the next unit, or go past those that are given pictures."""
        while self._num_denoised < len(self._units) and not self._units[self._num_denoised].steps:
            self._num_denoised += 1
        self._decode()
        if self._num_denoised < len(self._units):
            unit = self._units[self._num_denoised]
            slot = Slot(
                unit.steps,
                submitted_at=self.video.arrived,
                key=None,
                on_start=None if self.video.begun else self._note_begun,
                on_end=self._denoised,
            )
            self._app.denoise.submit(slot)

    def _note_begun(self) -> None:
        self.video.begun = self._app.events.now

    def _denoised(self) -> None:
        self._num_denoised += 1
        self._decode()
        self._app.events.after(self._app.times.handover_s, self._denoise)

    def _decode(self) -> None:
        unit = self._num_decoded
        is_ahead = unit - self._num_saved >= _UNITS_AHEAD
        if self._is_decoding or unit >= self._num_denoised or is_ahead:
            return
        self._is_decoding = True
        replica = self._app.decode.replicas[self._decoder]
        replica.join(
            Slot(
                self._decode_runs(unit),
                submitted_at=self.video.arrived,
                key=(self.video.work.name, unit == 0),
                on_end=self._decoded,
            )
        )

    def _decode_runs(self, unit: int) -> list[StepWork]:
        """Its own forward, and before it those of the units before where their memory is gone."""
        memories, seconds = self._app.memories[self._decoder], self._units[unit].decode_s
        if unit == 0 or memories.is_on_device(self._number):
            return [StepWork(1, 0, seconds)]
        if memories.is_kept(self._number):
            return [StepWork(1, 0, seconds + 2 * self._app.times.memory_move_s)]
        self._app.num_rebuilt += unit
        return [StepWork(1, 0, earlier.decode_s) for earlier in self._units[: unit + 1]]

    def _decoded(self) -> None:
        self._is_decoding = False
        self._num_decoded += 1
        memories = self._app.memories[self._decoder]
        if self._num_decoded < len(self._units):
            memories.keep(self._number)
        else:
            memories.forget(self._number)
        self._save()
        self._decode()

    def _save(self) -> None:
        if not self._is_saving and self._num_saved < self._num_decoded:
            self._is_saving = True
            self._app.save.run(self._units[self._num_saved].save_s, self._saved)

    def _saved(self) -> None:
        self._is_saving = False
        if self._num_saved == 0:
            self.video.first_frame = self._app.events.now
        self._num_saved += 1
        if self._num_saved == len(self._units):
            self._app.events.after(self._app.times.join_s, self._end)
        else:
            self._save()
            self._decode()

    def _end(self) -> None:
        self.video.ended = self._app.events.now
        self._app.end()


class _PoolTotals(NamedTuple):
    """What the replicas of a pool have done since the beginning."""

    num_replicas: int
    busy_s: float
    num_forwards: int
    num_slots: int

    @classmethod
    def of(cls, replicas: list[Replica]) -> "_PoolTotals":
        return cls(
            len(replicas),
            sum(replica.busy_s for replica in replicas),
            sum(replica.num_forwards for replica in replicas),
            sum(replica.num_slots for replica in replicas),
        )


class _Totals(NamedTuple):
    """What an app has done until ``now``."""

    now: float
    pools: dict[str, _PoolTotals]
    save_s: float
    running_s: float
    num_rebuilt: int


def _pool_times(after: _PoolTotals, before: _PoolTotals, wall_s: float) -> PoolTimes:
    return PoolTimes(
        busy_share=(after.busy_s - before.busy_s) / (wall_s * after.num_replicas),
        mean_pack=(after.num_slots - before.num_slots) / max(after.num_forwards - before.num_forwards, 1),
    )
