"""Where every unfinished video stands, computed once for all who ask within a second."""

import time
from collections.abc import Mapping

from deployments.claims.messages import QueuePlace
from deployments.claims.queue import StepRate, places_of
from pyramid_serve.api import Status, VideoRecord

NOWHERE = QueuePlace(None, None)

_KEPT_S = 1.0


class Places:
    """The places of these videos. For one event loop."""

    def __init__(self, records: Mapping[str, VideoRecord], rate: StepRate) -> None:
        self._records = records
        self._rate = rate
        self._places: dict[str, QueuePlace] = {}
        self._computed_at = -_KEPT_S

    def all(self) -> Mapping[str, QueuePlace]:
        """The place of each video, as it was at most a second ago; one that has come since has none yet."""
        now = time.monotonic()
        if now - self._computed_at >= _KEPT_S:
            self._places = places_of(self._records, rate=self._rate.per_second(now=now), now=time.time())
            self._computed_at = now
        return self._places

    def of(self, video_id: str) -> QueuePlace:
        """The place of one video; one that is not among the records has none."""
        if video_id not in self._records:
            return NOWHERE
        place = self.all().get(video_id)
        if place is None:  # it came after the last look
            self._computed_at = -_KEPT_S
            place = self.all()[video_id]
        return place if self._records[video_id].status is Status.QUEUED else place._replace(position=None)
