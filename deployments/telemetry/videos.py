"""What orchestrators measure about whole videos, for dashboards."""

from ray.serve import metrics

from pyramid_serve.api import Plan, Stage

_SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000]
_FACTORS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]


class VideoMetrics:
    """The metrics of one orchestrator replica."""

    def __init__(self) -> None:
        self._stage_seconds = metrics.Histogram(
            "pyramid_serve_stage_seconds",
            description="Seconds of one piece of work, waiting left out.",
            boundaries=_SECONDS,
            tag_keys=("stage",),
        )
        self._first_frame = metrics.Histogram(
            "pyramid_serve_time_to_first_frame_seconds",
            description="Seconds from a video's acceptance to its first frame.",
            boundaries=_SECONDS,
        )
        self._video_seconds = metrics.Histogram(
            "pyramid_serve_video_seconds",
            description="Seconds from a video's acceptance to its file.",
            boundaries=_SECONDS,
        )
        self._real_time = metrics.Histogram(
            "pyramid_serve_real_time_factor",
            description="Seconds of making for a second of video.",
            boundaries=_FACTORS,
        )
        self._retries = metrics.Counter(
            "pyramid_serve_calls_retried", description="Calls made again because a replica was lost under them."
        )

    def stage(self, stage: Stage, seconds: float) -> None:
        """A piece of work was done, in this time without waiting."""
        self._stage_seconds.observe(seconds, tags={"stage": stage})

    def first_frame(self, seconds: float) -> None:
        """A first frame was made, this long after its video was accepted."""
        self._first_frame.observe(seconds)

    def video(self, plan: Plan, *, since_accepted_s: float, making_s: float) -> None:
        """A video was completed."""
        self._video_seconds.observe(since_accepted_s)
        self._real_time.observe(making_s * plan.fps / plan.num_frames)

    def retry(self) -> None:
        """A call is made again."""
        self._retries.inc()
