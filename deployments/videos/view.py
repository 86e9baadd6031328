"""A video as clients see it."""

from typing import Any, NamedTuple

from deployments.claims.messages import QueuePlace
from pyramid_serve.api import VideoRecord

NOWHERE = QueuePlace(None, None)


class VideoView(NamedTuple):
    """A record, and the place of its video in the queue."""

    record: VideoRecord
    place: QueuePlace = NOWHERE

    def public(self) -> dict[str, Any]:
        """The video object of the HTTP API."""
        return self.record.public(queue_position=self.place.position, eta_seconds=self.place.eta_seconds)
