"""What owners tell claims, and what claims tells of its queue."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pyramid_serve.api import Computed, Status, TimelineEntry, VideoRecord

_COUNTS = ("num_steps_done", "num_units_denoised", "num_units_done", "num_units_retried")
_TRUNCATIONS = ("prompt_truncated_at", "negative_prompt_truncated_at")


@dataclass(frozen=True)
class RunUpdate:
    """What an owner reports while it works. Counts are of the whole video; ``timeline`` holds new entries only."""

    num_steps_done: int = 0
    num_units_denoised: int = 0
    num_units_done: int = 0
    num_units_retried: int = 0
    has_started: bool = False
    """A denoiser has begun to work on the video."""
    prompt_truncated_at: int | None = None
    negative_prompt_truncated_at: int | None = None
    computed: tuple[Computed, ...] = ()
    """One entry for each part of the pipeline that has worked on the video."""
    timeline: tuple[TimelineEntry, ...] = ()

    def changes(self, record: VideoRecord, *, now: float) -> dict[str, Any]:
        """The fields of the record that this update changes; ``now`` in unix seconds.

        Counts never decrease; work redone after a retry was already counted.
        """
        fields: dict[str, Any] = {}
        for name in _COUNTS:
            if getattr(self, name) > getattr(record, name):
                fields[name] = getattr(self, name)
        if self.has_started and record.status is Status.QUEUED:
            fields["status"] = Status.IN_PROGRESS
            fields["started_at"] = now
        if fields.get("num_units_done") and record.first_frame_at is None:
            fields["first_frame_at"] = now
        for name in _TRUNCATIONS:
            if getattr(self, name) not in (None, getattr(record, name)):
                fields[name] = getattr(self, name)
        if set(self.computed) - set(record.computed):
            by_part = {computed.part: computed for computed in (*record.computed, *self.computed)}
            fields["computed"] = tuple(by_part.values())
        # An update may be sent a second time because its answer was lost; its entries are known already then.
        new_entries = tuple(entry for entry in self.timeline if entry not in record.timeline)
        if new_entries:
            fields["timeline"] = record.timeline + new_entries
        return fields


class QueuePlace(NamedTuple):
    """Where an unfinished video stands.

    position: the number of videos ahead of it, 0 for the next one; None when it is in progress. eta_seconds: seconds
    until it is done, None when that is not known.
    """

    position: int | None
    eta_seconds: float | None


class Admitted(NamedTuple):
    """A video that was accepted, or the earlier one of the same idempotency key, and its place."""

    record: VideoRecord
    place: QueuePlace


class News(NamedTuple):
    """What has changed among the unfinished videos, for those who keep a copy of all."""

    source: str
    """The replica that tells; numbers of another one mean nothing."""
    number: int
    """Of the last change that this tells."""
    is_whole: bool
    """Whether ``records`` are all that there are, and not only those that changed."""
    records: tuple[VideoRecord, ...]
    gone: tuple[str, ...]
    places: Mapping[str, tuple[int | None, float | None]]
    """Position and seconds of every video; see ``QueuePlace``. Plain tuples, for there are many."""


class QueueState(NamedTuple):
    """How many videos wait for a denoiser, and how many are in progress."""

    num_queued: int
    num_in_progress: int
