"""Those who wait for a video to change, and those who follow all videos at once."""

import asyncio
from collections import OrderedDict, defaultdict
from collections.abc import Iterator

_MAX_GONE = 10_000


class Watchers:
    """Wakes everyone who waits for the next change of a video. For one event loop."""

    def __init__(self) -> None:
        self._changes: dict[str, asyncio.Event] = defaultdict(asyncio.Event)

    def next_change(self, video_id: str) -> asyncio.Event:
        """An event that is set when the video next changes."""
        return self._changes[video_id]

    def tell(self, video_id: str) -> None:
        """The video has changed."""
        change = self._changes.pop(video_id, None)
        if change is not None:
            change.set()


class Changes:
    """Which videos changed after which others, for those who follow them all. For one event loop."""

    def __init__(self) -> None:
        self.number = 0
        """Of the last change."""
        self._changed: OrderedDict[str, int] = OrderedDict()
        self._gone: OrderedDict[str, int] = OrderedDict()
        self._forgotten = 0
        self._next = asyncio.Event()

    def change(self, video_id: str) -> None:
        """A video came or changed."""
        self._gone.pop(video_id, None)
        self._note(self._changed, video_id)

    def go(self, video_id: str) -> None:
        """A video is no longer among those that are followed."""
        self._changed.pop(video_id, None)
        self._note(self._gone, video_id)
        if len(self._gone) > _MAX_GONE:
            _, self._forgotten = self._gone.popitem(last=False)

    def is_known(self, number: int) -> bool:
        """Whether all is known that changed after the change of this number."""
        return self._forgotten <= number <= self.number

    def changed_since(self, number: int) -> list[str]:
        """The videos that came or changed after the change of this number."""
        return list(_after(self._changed, number))

    def gone_since(self, number: int) -> list[str]:
        """The videos that went after the change of this number."""
        return list(_after(self._gone, number))

    async def wait(self) -> None:
        """Wait for the next change."""
        await self._next.wait()

    def _note(self, numbers: "OrderedDict[str, int]", video_id: str) -> None:
        self.number += 1
        numbers[video_id] = self.number
        numbers.move_to_end(video_id)
        self._next.set()
        self._next = asyncio.Event()


def _after(numbers: "OrderedDict[str, int]", number: int) -> Iterator[str]:
    """The keys whose values are larger than a number. The values must be in ascending order."""
    for video_id in reversed(numbers):
        if numbers[video_id] <= number:
            return
        yield video_id
