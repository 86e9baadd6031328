"""The order of unfinished videos and how long they take, as pure functions of their records.

Records are passed by id. Videos go in the order of their ids, which is that of their creation. Times are passed in:
``now`` is in unix seconds, for ``StepRate`` on a monotonic clock. ``rate`` is in steps per second of all videos
together, None while it is not known.
"""

from collections import deque
from collections.abc import Container, Mapping

from deployments.claims.messages import QueuePlace
from pyramid_serve.api import Status, VideoRecord

Records = Mapping[str, VideoRecord]

_RATE_WINDOW_S = 60.0
_MAX_BACKOFF_S = 60.0
_MIN_SUSPECT_LOSSES = 2
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


def backoff_s(num_times: int, *, first_s: float) -> float:
    """The pause after so many failures in a row, in seconds: ``first_s`` after one, doubled by each further one."""
    return min(first_s * 2.0 ** min(num_times - 1, 60), _MAX_BACKOFF_S)


def is_suspect(record: VideoRecord) -> bool:
    """Whether a video lost its owner so often, without a finished unit, that it may be what ends its owners."""
    return record.num_losses >= _MIN_SUSPECT_LOSSES


def next_up(records: Records, *, running: Container[str], max_running: int, now: float) -> list[str]:
    """The ids of the videos to hand out now, oldest first; of suspects one at a time.

    running: the videos that were handed out and not returned; those with an owner count as running, too.
    """
    num_running = 0
    has_suspect = False
    ready = []
    for record in records.values():
        if record.owner is not None or record.id in running:
            num_running += 1
            has_suspect |= is_suspect(record)
        elif (
            not now < record.not_before <= now + _MAX_BACKOFF_S
        ):  # later still is the work of a clock that was set back
            ready.append(record)
    chosen: list[str] = []
    if num_running >= max_running:
        return chosen
    for record in sorted(ready, key=lambda record: record.id):
        if num_running + len(chosen) >= max_running:
            break
        if not (is_suspect(record) and has_suspect):
            chosen.append(record.id)
            has_suspect |= is_suspect(record)
    return chosen


def places_of(records: Records, *, rate: float | None, now: float) -> dict[str, QueuePlace]:
    """Where each video stands."""
    places: dict[str, QueuePlace] = {}
    num_ahead = 0
    num_steps = 0
    for video_id in sorted(records):
        record = records[video_id]
        num_steps += num_steps_left(record)
        seconds = None if rate is None else num_steps / rate
        if record.status is Status.QUEUED:
            places[video_id] = QueuePlace(num_ahead, seconds)
            num_ahead += 1
        else:
            own = _seconds_left(record, now=now)
            places[video_id] = QueuePlace(None, seconds if own is None else own)
    return places


def retry_after_s(records: Records, *, rate: float | None) -> int:
    """Seconds after which a place in a full queue may be free."""
    first = next((record for record in records.values() if record.status is Status.QUEUED), None)
    if rate is None or first is None:
        return _RETRY_AFTER_S
    return min(max(round(num_steps_left(first) / rate), 1), _MAX_RETRY_AFTER_S)


def _seconds_left(record: VideoRecord, *, now: float) -> float | None:
    """For a video in progress, by its own speed: denoising is half of the work, all the rest the other half."""
    if record.started_at is None or not record.num_steps_done:
        return None
    denoised = record.num_steps_done / num_steps_of(record)
    done = (denoised + record.num_units_done / _num_units_of(record)) / 2
    return (now - record.started_at) * (1 - done) / done


def _num_units_of(record: VideoRecord) -> int:
    return record.plan.num_units


def num_steps_left(record: VideoRecord) -> int:
    """Denoising steps of a video that are still to be made."""
    return num_steps_of(record) - record.num_steps_done
