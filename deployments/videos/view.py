"""A video as clients see it."""

from typing import Any, NamedTuple

from deployments.claims.messages import QueuePlace
from deployments.claims.places import NOWHERE
from pyramid_serve.api import VideoRecord


class VideoView(NamedTuple):
    """A record, and the place of its video in the queue."""

    record: VideoRecord
    place: QueuePlace = NOWHERE

    def public(self) -> dict[str, Any]:
        """The video object of the HTTP API."""
        return self.record.public(queue_position=self.place.position, eta_seconds=self.place.eta_seconds)
