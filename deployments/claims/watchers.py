"""Those who wait for a video to change."""

import asyncio
from collections import defaultdict


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
