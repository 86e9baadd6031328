"""Where a decoder keeps its memories between calls: a cache within a budget of bytes, the least recently used go first.

A memory is what the next unit of a video needs of those before. Losing one costs time and changes nothing, since it can
be made again from the latents. For one thread.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pyramid_serve.families import Memory


@dataclass
class Lease:
    """One call's hold on a video. ``memory``: what is kept for the unit asked for, None where there is nothing."""

    memory: Memory | None
    is_void: bool = False
    """The video was forgotten meanwhile, so nothing is kept of it any more."""


@dataclass
class _Entry:
    unit: int
    memory: Memory
    num_bytes: int
    is_on_device: bool
    num_leases: int = 0


class MemoryStore:
    """Memories by video and the unit that they are for, one a video: a newer unit's takes the place of the older one's.

    Above ``device_budget_bytes`` the least recently used go to host memory, and above ``host_budget_bytes`` there they
    are dropped. Those under lease count, and stay.
    """

    def __init__(self, *, device_budget_bytes: int, host_budget_bytes: int) -> None:
        self._budget = {True: device_budget_bytes, False: host_budget_bytes}
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._leases: dict[str, list[Lease]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def device_bytes(self) -> int:
        return self._num_bytes(is_on_device=True)

    @property
    def host_bytes(self) -> int:
        return self._num_bytes(is_on_device=False)

    @contextmanager
    def lease(self, video_id: str, unit: int) -> Iterator[Lease]:
        """The memory for ``unit`` of a video, which stays until the lease ends. It may lie in host memory."""
        entry = self._entries.get(video_id)
        if entry is not None and entry.unit != unit:
            entry = None
        lease = Lease(None if entry is None else entry.memory)
        self._leases.setdefault(video_id, []).append(lease)
        if entry is not None:
            entry.num_leases += 1
            self._entries.move_to_end(video_id)
        try:
            yield lease
        finally:
            # By identity: two leases of nothing are equal.
            left = [other for other in self._leases[video_id] if other is not lease]
            self._leases[video_id] = left
            if not left:
                del self._leases[video_id]
            if entry is not None:
                entry.num_leases -= 1
                self._shrink()

    def keep(self, lease: Lease, video_id: str, unit: int, memory: Memory) -> None:
        """Keep a memory, on the device, for ``unit`` of the video under this lease."""
        if lease.is_void:
            return
        self._entries[video_id] = _Entry(unit, memory, memory.num_bytes, is_on_device=True)
        self._entries.move_to_end(video_id)
        self._shrink()

    def forget(self, video_id: str) -> None:
        """Keep nothing of a video, nor what calls that are now at work on it would keep."""
        self._entries.pop(video_id, None)
        for lease in self._leases.get(video_id, []):
            lease.is_void = True

    def _num_bytes(self, *, is_on_device: bool) -> int:
        return sum(entry.num_bytes for entry in self._entries.values() if entry.is_on_device == is_on_device)

    def _shrink(self) -> None:
        for entry in self._over_budget(is_on_device=True):
            if entry.num_bytes <= self._budget[False]:
                entry.memory, entry.is_on_device = entry.memory.to("cpu"), False
            else:
                self._drop(entry)
        for entry in self._over_budget(is_on_device=False):
            self._drop(entry)

    def _over_budget(self, *, is_on_device: bool) -> list[_Entry]:
        """The least recently used entries of one place that have to go from there."""
        excess = self._num_bytes(is_on_device=is_on_device) - self._budget[is_on_device]
        going: list[_Entry] = []
        for entry in self._entries.values():
            if excess <= 0:
                break
            if entry.is_on_device == is_on_device and not entry.num_leases:
                going.append(entry)
                excess -= entry.num_bytes
        return going

    def _drop(self, dropped: _Entry) -> None:
        for video_id, entry in self._entries.items():
            if entry is dropped:
                del self._entries[video_id]
                return
