from deployments.telemetry.videos import VideoMetrics
from pyramid_serve.api import Stage, TimelineEntry, VideoRequest
from pyramid_serve.served_model import ServedModels
from tests.serve.local_server import MODEL
from tests.unit.metrics_at_hand import Told, labels

PLAN = MODEL.plan(VideoRequest(prompt="a ball", size="64x64"))
LABELS = {"model": "tiny", "size": "64x64"}


def test_each_value_is_labelled_with_model_and_size(told: Told) -> None:
    metrics = VideoMetrics(ServedModels((MODEL,)))
    metrics.begun(PLAN, since_accepted_s=2.0)
    metrics.first_frame(PLAN, since_accepted_s=3.0)
    metrics.stage(PLAN, Stage.DECODE, 0.5)
    assert told.of("pyramid_serve_queue_wait_seconds", **LABELS) == [2.0]
    assert told.of("pyramid_serve_time_to_first_frame_seconds", **LABELS) == [3.0]
    assert told.of("pyramid_serve_stage_seconds", stage="decode", **LABELS) == [0.5]


def test_a_finished_video_tells_its_speed_its_seconds_and_how_much_of_its_decoding_was_hidden(told: Told) -> None:
    metrics = VideoMetrics(ServedModels((MODEL,)))
    timeline = [
        TimelineEntry(stage=stage, unit=unit, start=start, end=end, replica="a")
        for stage, unit, start, end in (
            (Stage.DECODE, 0, 1.0, 3.0),
            (Stage.DENOISE, 1, 2.0, 4.0),
            (Stage.DECODE, 1, 4.0, 9.0),
        )
    ]
    seconds = PLAN.num_frames / PLAN.fps
    metrics.video(PLAN, since_accepted_s=9.0, making_s=2 * seconds, timeline=timeline)
    assert told.of("pyramid_serve_video_seconds", **LABELS) == [9.0]
    assert told.of("pyramid_serve_real_time_factor", **LABELS) == [2.0]
    assert told.of("pyramid_serve_made_video_seconds", **LABELS) == [seconds]
    assert told.of("pyramid_serve_decode_hidden_share", **LABELS) == [0.5]


def test_a_video_of_one_unit_has_no_hidden_share(told: Told) -> None:
    metrics = VideoMetrics(ServedModels((MODEL,)))
    metrics.video(PLAN, since_accepted_s=9.0, making_s=1.0, timeline=[])
    assert told.labels_of("pyramid_serve_decode_hidden_share") == set()


def test_sizes_that_the_model_does_not_offer_by_name_share_one_label(told: Told) -> None:
    metrics = VideoMetrics(ServedModels((MODEL,)))
    for width in range(64, 6400, 64):
        metrics.begun(PLAN.model_copy(update={"width": width}), since_accepted_s=1.0)
    assert told.labels_of("pyramid_serve_queue_wait_seconds") == {
        labels(model="tiny", size="64x64"),
        labels(model="tiny", size="128x64"),
        labels(model="tiny", size="other"),
    }
