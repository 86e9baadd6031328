"""Simulated replicas of a pool: an engine's turns by the same rules as ``pools.engine``, and how calls reach them."""

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from random import Random

from deployments.planning.events import Events
from deployments.planning.stage_times import StepWork
from deployments.pools.packing import choose_pack


class Slot:
    """A unit in an engine: so many equal steps after each other, run after run."""

    __slots__ = (
        "missed_turns",
        "num_left",
        "num_tokens",
        "on_end",
        "on_start",
        "requests",
        "runs",
        "seconds",
        "submitted_at",
    )

    def __init__(
        self,
        runs: Sequence[StepWork],
        *,
        submitted_at: float,
        key: Hashable,
        on_end: Callable[[], None],
        on_start: Callable[[], None] | None = None,
    ) -> None:
        """key: only slots of equal keys share a forward; on_start: called when it is first taken into one."""
        self.submitted_at = submitted_at
        self.requests = (key,)
        self.missed_turns = 0
        self.on_start = on_start
        self.on_end = on_end
        self.runs = deque(runs)
        self._take_run()

    def _take_run(self) -> None:
        run = self.runs.popleft()
        self.num_left, self.num_tokens, self.seconds = run.num_steps, run.num_tokens, run.seconds

    def advance(self, num_steps: int) -> bool:
        """Do so many steps of the current run; whether that was the last of all."""
        self.num_left -= num_steps
        if self.num_left:
            return False
        if not self.runs:
            return True
        self._take_run()
        return False


@dataclass(frozen=True)
class EngineRules:
    """How an engine packs, and how long a forward of slots with these seconds takes."""

    forward_s: Callable[[Sequence[float]], float]
    token_budget: int | None = None
    max_slots: int | None = None
    max_ongoing: int = 16
    """Calls that a replica takes at once; further ones wait until one of the pool has room."""


class Device:
    """What computes one forward at a time, for one replica or for several that share it, in the order of asking."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._is_busy = False
        self._waiting: deque[tuple[Callable[[], float], Callable[[], None]]] = deque()

    def run(self, begin: Callable[[], float], end: Callable[[], None]) -> None:
        """``begin()`` as soon as the device is free, which tells the seconds; ``end()`` after these."""
        self._waiting.append((begin, end))
        if not self._is_busy:
            self._next()

    def _next(self) -> None:
        self._is_busy = bool(self._waiting)
        if self._waiting:
            begin, end = self._waiting.popleft()
            self._events.after(begin(), self._end, end)

    def _end(self, end: Callable[[], None]) -> None:
        end()
        self._next()


class Replica:
    """An engine: every turn packs some of its slots into one forward."""

    def __init__(self, events: Events, rules: EngineRules, device: Device | None = None) -> None:
        """device: shared with other replicas; None for one of its own, on which equal turns are taken together."""
        self.slots: list[Slot] = []
        self.busy_s = 0.0
        self.num_forwards = 0
        self.num_slots = 0
        self.on_room: Callable[[Replica], None] | None = None
        self._events = events
        self._rules = rules
        self._device = device
        self._pack: list[Slot] = []
        self._is_turning = False
        self._started = self._turn_s = 0.0
        self._num_turns = 0
        self._version = 0

    def join(self, slot: Slot) -> None:
        self.slots.append(slot)
        if not self._is_turning:
            self._is_turning = True
            # A moment later, so that what comes at the same time shares the first forward.
            self._events.after(0.0, self._turn)
        elif self._num_turns > 1 and self._turn_s > 0:
            self._cut_short()

    def _turn(self) -> None:
        if self._device is None:
            self._events.after(self._begin(), self._end, self._version)
        else:
            self._device.run(self._begin, lambda: self._end(self._version))

    def _begin(self) -> float:
        """Choose a pack; the seconds until it has to be chosen anew."""
        rules, slots = self._rules, self.slots
        pack = choose_pack(
            slots, token_budget=rules.token_budget, max_slots=rules.max_slots, packs_with=lambda key: key
        )
        if len(pack) < len(slots):
            for slot in slots:
                slot.missed_turns += 1
        for slot in pack:
            slot.missed_turns = 0
            if slot.on_start is not None:
                slot.on_start()
                slot.on_start = None
        self._pack = pack
        self._turn_s = rules.forward_s([slot.seconds for slot in pack])
        is_all = len(pack) == len(slots) and self._device is None
        self._num_turns = min(slot.num_left for slot in pack) if is_all else 1
        self._started = self._events.now
        self._version += 1
        return self._num_turns * self._turn_s

    def _cut_short(self) -> None:
        """A slot has come: the turns after the present one must be chosen anew."""
        num_turns = int((self._events.now - self._started) / self._turn_s) + 1
        if num_turns < self._num_turns:
            self._num_turns = num_turns
            self._version += 1
            left_s = self._started + num_turns * self._turn_s - self._events.now
            self._events.after(max(left_s, 0.0), self._end, self._version)

    def _end(self, version: int) -> None:
        if version != self._version:
            return
        num_turns, pack = self._num_turns, self._pack
        self.busy_s += num_turns * self._turn_s
        self.num_forwards += num_turns
        self.num_slots += num_turns * len(pack)
        self._num_turns = 0
        ended = [slot for slot in pack if slot.advance(num_turns)]
        for slot in ended:
            self.slots.remove(slot)
        for slot in ended:
            slot.on_end()
            if self.on_room is not None:
                self.on_room(self)
        if self.slots:
            self._turn()
        else:
            self._is_turning = False


class Pool:
    """The replicas of a deployment, and who gets a call: of two at random the one with fewer, as Serve does it."""

    def __init__(
        self, events: Events, rules: EngineRules, num_replicas: int, random: Random, device: Device | None
    ) -> None:
        self.replicas = [Replica(events, rules, device) for _ in range(num_replicas)]
        self._max_ongoing = rules.max_ongoing
        self._random = random
        self._waiting: deque[Slot] = deque()
        for replica in self.replicas:
            replica.on_room = self._take_waiting

    def submit(self, slot: Slot) -> None:
        """To a replica with room, or else to the first that has some."""
        replicas = self.replicas
        chosen = min(self._random.sample(replicas, k=min(2, len(replicas))), key=lambda replica: len(replica.slots))
        if len(chosen.slots) >= self._max_ongoing:
            free = [replica for replica in replicas if len(replica.slots) < self._max_ongoing]
            if not free:
                self._waiting.append(slot)
                return
            chosen = self._random.choice(free)
        chosen.join(slot)

    def _take_waiting(self, replica: Replica) -> None:
        if self._waiting and len(replica.slots) < self._max_ongoing:
            replica.join(self._waiting.popleft())


class Memories:
    """Which videos a decoder remembers: the last used on the device, those before in host memory, no others."""

    def __init__(self, *, num_on_device: int, num_in_host: int) -> None:
        self._num_on_device = num_on_device
        self._num = num_on_device + num_in_host
        self._videos: OrderedDict[int, None] = OrderedDict()

    def keep(self, video: int) -> None:
        self._videos[video] = None
        self._videos.move_to_end(video)
        while len(self._videos) > self._num:
            self._videos.popitem(last=False)

    def forget(self, video: int) -> None:
        self._videos.pop(video, None)

    def is_kept(self, video: int) -> bool:
        return video in self._videos

    def is_on_device(self, video: int) -> bool:
        for age, kept in enumerate(reversed(self._videos)):
            if age >= self._num_on_device:
                return False
            if kept == video:
                return True
        return False
