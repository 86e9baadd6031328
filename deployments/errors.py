"""What can go wrong: the errors that the deployments raise for each other and for their callers."""

from pyramid_serve.api import VideoError


class DeviceFailedError(RuntimeError):
    """The device has failed for good. Only a new process can use it again; another replica may do well."""


class QueueFullError(RuntimeError):
    """The queue is full. ``retry_after_s``: seconds after which it is worth trying again."""

    def __init__(self, max_queued: int, retry_after_s: int) -> None:
        super().__init__(max_queued, retry_after_s)
        self.max_queued = max_queued
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.max_queued} videos are waiting, which is all there may be; try again in {self.retry_after_s} s"


class SupersededError(RuntimeError):
    """Another replica of the claims deployment has taken over. Ask again, and that one will answer."""


class VideoFailedError(RuntimeError):
    """The video whose frames were asked for has failed. ``error`` is the error in its record."""

    def __init__(self, video_id: str, error: VideoError) -> None:
        super().__init__(video_id, error)
        self.video_id = video_id
        self.error = error

    def __str__(self) -> str:
        return f"{self.video_id}: {self.error.code}: {self.error.message}"
