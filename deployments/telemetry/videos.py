"""What orchestrators measure about whole videos, for dashboards."""

from ray.serve import metrics

from deployments.telemetry.timelines import Timeline, hidden_share
from pyramid_serve.api import Plan, Stage
from pyramid_serve.served_model import ServedModels

_SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000]
_FACTORS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]
_SHARES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
_LABELS = ("model", "size")
_OTHER_SIZE = "other"


class VideoMetrics:
    """The metrics of one orchestrator replica, labelled by model and size.

    A size is told apart if the model offers it by name or as its default. All others are ``other``, so that clients
    cannot make up labels.
    """

    def __init__(self, models: ServedModels) -> None:
        self._sizes = {
            model.name: {
                f"{width}x{height}" for width, height in (model.offer.default_size, *(model.offer.sizes or ()))
            }
            for model in models.models
        }
        self._stage_seconds = _histogram(
            "pyramid_serve_stage_seconds", "Seconds of one piece of work, waiting left out.", _SECONDS, "stage"
        )
        self._queue_wait = _histogram(
            "pyramid_serve_queue_wait_seconds",
            "Seconds from a video's acceptance until a denoiser first worked on it.",
            _SECONDS,
        )
        self._first_frame = _histogram(
            "pyramid_serve_time_to_first_frame_seconds",
            "Seconds from a video's acceptance to its first frame.",
            _SECONDS,
        )
        self._video_seconds = _histogram(
            "pyramid_serve_video_seconds", "Seconds from a video's acceptance to its file.", _SECONDS
        )
        self._real_time = _histogram(
            "pyramid_serve_real_time_factor", "Seconds of making for a second of video.", _FACTORS
        )
        self._hidden_share = _histogram(
            "pyramid_serve_decode_hidden_share",
            "Share of a video's decoding, its last unit left out, during which a later unit was denoised.",
            _SHARES,
        )
        self._made = metrics.Counter(
            "pyramid_serve_made_video_seconds",
            description="Seconds of finished video, as they are played.",
            tag_keys=_LABELS,  # type: ignore[arg-type]  # annotated as a tuple of one
        )
        self._states_saved = metrics.Counter(
            "pyramid_serve_unit_states_saved",
            description="States of units in work that were saved.",
            tag_keys=_LABELS,  # type: ignore[arg-type]  # annotated as a tuple of one
        )
        self._retries = metrics.Counter(
            "pyramid_serve_calls_retried",
            description="Calls made again because they were lost, by cause.",
            tag_keys=("cause",),
        )

    def stage(self, plan: Plan, stage: Stage, seconds: float) -> None:
        """A piece of work was done, in this time without waiting."""
        self._stage_seconds.observe(seconds, tags={"stage": stage, **self._labels(plan)})

    def begun(self, plan: Plan, *, since_accepted_s: float) -> None:
        """A denoiser works on a video for the first time."""
        self._queue_wait.observe(since_accepted_s, tags=self._labels(plan))

    def first_frame(self, plan: Plan, *, since_accepted_s: float) -> None:
        """A video's first frame was made."""
        self._first_frame.observe(since_accepted_s, tags=self._labels(plan))

    def video(self, plan: Plan, *, since_accepted_s: float, making_s: float, timeline: Timeline) -> None:
        """A video was completed. making_s, timeline: of the attempt that completed it."""
        labels = self._labels(plan)
        seconds = plan.num_frames / plan.fps
        self._video_seconds.observe(since_accepted_s, tags=labels)
        self._real_time.observe(making_s / seconds, tags=labels)
        self._made.inc(seconds, tags=labels)
        share = hidden_share(timeline)
        if share is not None:
            self._hidden_share.observe(share, tags=labels)

    def state_saved(self, plan: Plan) -> None:
        """The state of a unit in work was saved."""
        self._states_saved.inc(tags=self._labels(plan))

    def retry(self, cause: str) -> None:
        """A call is made again. cause: one of ``rpc.retry.CAUSES``."""
        self._retries.inc(tags={"cause": cause})

    def _labels(self, plan: Plan) -> dict[str, str]:
        is_offered = plan.size in self._sizes.get(plan.model, ())
        return {"model": plan.model, "size": plan.size if is_offered else _OTHER_SIZE}


def _histogram(name: str, description: str, boundaries: list[float], *labels: str) -> metrics.Histogram:
    return metrics.Histogram(
        name,
        description=description,
        boundaries=boundaries,
        tag_keys=(*labels, *_LABELS),  # type: ignore[arg-type]  # annotated as a tuple of one
    )
