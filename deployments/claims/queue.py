"""The order of unfinished videos and how long they take, as pure functions of their records.

Records are passed by id. Videos go in the order of their ids, which is that of their creation. Times are passed in:
``now`` is in unix seconds, for ``StepRate`` on a monotonic clock. ``rate`` is in steps per second of all videos
together, None while it is not known.
"""

from collections import deque
from collections.abc import Container, Mapping

from deployments.claims.messages import QueuePlace, QueueState
from pyramid_serve.api import Status, VideoRecord

Records = Mapping[str, VideoRecord]

_RATE_WINDOW_S = 60.0
_RETRY_AFTER_S = 5
_MAX_RETRY_AFTER_S = 120


class StepRate:
    """The speed of all videos together over the last minute."""

    def __init__(self) -> None:
        self._counts: deque[tuple[float, int]] = deque()

    def count(self, num_steps: int, *, now: float) -> None:
        """Note that this many steps were done since the last call."""
        self._counts.append((now, num_steps))
        self._forget_before(now - _RATE_WINDOW_S)

    def per_second(self, *, now: float) -> float | None:
        """Steps per second; None while too little is known, or nothing was done."""
        self._forget_before(now - _RATE_WINDOW_S)
        if len(self._counts) < 2 or now <= self._counts[0][0]:
            return None
        return sum(num_steps for _, num_steps in self._counts) / (now - self._counts[0][0]) or None

    def _forget_before(self, time: float) -> None:
        while self._counts and self._counts[0][0] < time:
            self._counts.popleft()


def num_steps_of(record: VideoRecord) -> int:
    """Denoising steps of the whole video."""
    return record.plan.num_steps


def waiting(records: Records) -> list[VideoRecord]:
    """The videos that wait for a denoiser."""
    return [record for record in records.values() if record.status is Status.QUEUED]


def state_of(records: Records) -> QueueState:
    """How many of the videos wait and how many are in progress."""
    num_queued = len(waiting(records))
    return QueueState(num_queued, len(records) - num_queued)


def next_up(records: Records, *, running: Container[str], max_running: int, now: float) -> list[str]:
    """The ids of the videos to hand out now, oldest first.

    running: the videos that were handed out and not returned; those with an owner count as running, too.
    """
    num_running = sum(record.owner is not None or record.id in running for record in records.values())
    ready = sorted(
        record.id
        for record in records.values()
        if record.owner is None and record.id not in running and record.not_before <= now
    )
    return ready[: max(max_running - num_running, 0)]


def place_of(records: Records, video_id: str, *, rate: float | None, now: float) -> QueuePlace:
    """Where a video stands; one that is not among the records has no place."""
    record = records.get(video_id)
    if record is None:
        return QueuePlace(None, None)
    if record.status is Status.IN_PROGRESS:
        return QueuePlace(None, _seconds_left(records, record, rate=rate, now=now))
    num_ahead = sum(other.id < video_id for other in waiting(records))
    return QueuePlace(num_ahead, _seconds_until_done(records, video_id, rate=rate))


def retry_after_s(records: Records, *, rate: float | None) -> int:
    """Seconds after which a place in a full queue may be free."""
    queued = waiting(records)
    if rate is None or not queued:
        return _RETRY_AFTER_S
    return min(max(round(_num_steps_left(queued[0]) / rate), 1), _MAX_RETRY_AFTER_S)


def _seconds_left(records: Records, record: VideoRecord, *, rate: float | None, now: float) -> float | None:
    """For a video in progress, by its own speed: denoising is half of the work, all the rest the other half."""
    if record.started_at is None or not record.num_steps_done:
        return _seconds_until_done(records, record.id, rate=rate)
    denoised = record.num_steps_done / num_steps_of(record)
    done = (denoised + record.num_units_done / _num_units_of(record)) / 2
    return (now - record.started_at) * (1 - done) / done


def _seconds_until_done(records: Records, video_id: str, *, rate: float | None) -> float | None:
    """By the speed of all videos together, if every older one is made first."""
    if rate is None:
        return None
    return sum(_num_steps_left(record) for record in records.values() if record.id <= video_id) / rate


def _num_units_of(record: VideoRecord) -> int:
    return record.plan.num_units


def _num_steps_left(record: VideoRecord) -> int:
    return num_steps_of(record) - record.num_steps_done
