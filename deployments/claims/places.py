"""Where every unfinished video stands, computed once for all who ask within moments, at most a second."""

import time
from collections.abc import Mapping

from deployments.claims.messages import QueuePlace
from deployments.claims.queue import StepRate, num_steps_left, places_of
from pyramid_serve.api import Status, VideoRecord

NOWHERE = QueuePlace(None, None)

_MAX_KEPT_S = 1.0
_MAX_SHARE = 0.05
"""The share of the time that may be spent on computing places: those of few videos are always new."""


class Places:
    """The places of these videos. For one event loop."""

    def __init__(self, records: Mapping[str, VideoRecord], rate: StepRate) -> None:
        self._records = records
        self._rate = rate
        self._places: dict[str, QueuePlace] = {}
        self._num_waiting, self._num_steps = 0, 0
        self._per_second: float | None = None
        self._computed_at = 0.0
        self._kept_s = 0.0

    def all(self) -> Mapping[str, QueuePlace]:
        """The place of each video, as it was at most a second ago, and of those that ``of`` gave since."""
        now = time.monotonic()
        if now - self._computed_at >= self._kept_s:
            self._per_second = self._rate.per_second(now=now)
            self._places = places_of(self._records, rate=self._per_second, now=time.time())
            self._num_waiting = sum(place.position is not None for place in self._places.values())
            self._num_steps = sum(num_steps_left(self._records[video_id]) for video_id in self._places)
            self._computed_at = now
            self._kept_s = min((time.monotonic() - now) / _MAX_SHARE, _MAX_KEPT_S)
        return self._places

    def of(self, video_id: str) -> QueuePlace:
        """The place of one video; one that is not among the records has none."""
        if video_id not in self._records:
            return NOWHERE
        place = self.all().get(video_id)
        if place is None:  # it came after the last look, so it stands behind all others
            self._num_steps += num_steps_left(self._records[video_id])
            eta_s = None if self._per_second is None else self._num_steps / self._per_second
            place = self._places[video_id] = QueuePlace(self._num_waiting, eta_s)
            self._num_waiting += 1
        return place if self._records[video_id].status is Status.QUEUED else place._replace(position=None)
