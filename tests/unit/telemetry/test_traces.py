import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from deployments.telemetry.traces import VideoTraces, traces_to
from pyramid_serve.api import Stage, Status, TimelineEntry, VideoError, VideoRecord
from tests.unit.api.plans_at_hand import record_of

TIMELINE = (
    TimelineEntry(stage=Stage.ENCODE, unit=None, start=1001.0, end=1001.5, replica="TextEncoder"),
    TimelineEntry(stage=Stage.DENOISE, unit=0, start=1002.0, end=1003.0, replica="Denoiser#a"),
    TimelineEntry(stage=Stage.DECODE, unit=0, start=1003.0, end=1004.25, replica="Decoder#b"),
    TimelineEntry(stage="polish", unit=0, start=1004.5, end=1005.0, replica="of a later release"),
)


def ended(**fields: object) -> VideoRecord:
    times = {"created_at": 1000.0, "started_at": 1002.0, "completed_at": 1006.0}
    return record_of(seed=1).model_copy(
        update={**times, "status": Status.COMPLETED, "timeline": TIMELINE, "attempts": 2, **fields}
    )


def spans_of(record: VideoRecord) -> list[ReadableSpan]:
    exporter = InMemorySpanExporter()
    VideoTraces(SimpleSpanProcessor(exporter)).send(record)
    return list(exporter.get_finished_spans())


def seconds_of(span: ReadableSpan) -> tuple[float, float]:
    assert span.start_time is not None and span.end_time is not None
    return span.start_time / 1e9, span.end_time / 1e9


def test_a_video_is_one_trace_whose_spans_are_its_wait_and_its_timeline() -> None:
    spans = spans_of(ended())
    assert {span.name: seconds_of(span) for span in spans} == {
        "video": (1000.0, 1006.0),
        "queued": (1000.0, 1002.0),
        "encode": (1001.0, 1001.5),
        "denoise": (1002.0, 1003.0),
        "decode": (1003.0, 1004.25),
        "polish": (1004.5, 1005.0),
    }
    (video,) = (span for span in spans if span.parent is None)
    assert video.name == "video"
    assert {span.parent.span_id for span in spans if span.parent is not None} == {video.context.span_id}
    assert len({span.context.span_id for span in spans}) == len(spans)


def test_the_trace_has_the_digits_of_the_videos_id() -> None:
    record = ended()
    assert {f"video_{span.context.trace_id:032x}" for span in spans_of(record)} == {record.id}


def test_spans_say_what_was_made_where_and_no_prompt() -> None:
    record = ended()
    spans = {span.name: dict(span.attributes or {}) for span in spans_of(record)}
    assert spans["denoise"] == {"replica": "Denoiser#a", "unit": 0}
    assert spans["encode"] == {"replica": "TextEncoder"}
    told = spans["video"]
    assert (told["video_id"], told["model"], told["size"]) == (record.id, record.plan.model, record.plan.size)
    assert (told["status"], told["attempts"]) == ("completed", 2)
    assert record.plan.prompt not in str(spans)


def test_a_video_that_failed_before_it_was_begun_waited_to_its_end() -> None:
    error = VideoError(code="cancelled", message="the video was cancelled")
    spans = {
        span.name: span for span in spans_of(ended(status=Status.FAILED, error=error, started_at=None, timeline=()))
    }
    assert spans.keys() == {"video", "queued"}
    assert seconds_of(spans["queued"]) == (1000.0, 1006.0)
    assert (spans["video"].status.status_code, spans["video"].status.description) == (StatusCode.ERROR, "cancelled")


def test_traces_of_several_videos_are_kept_apart() -> None:
    exporter = InMemorySpanExporter()
    traces = VideoTraces(SimpleSpanProcessor(exporter))
    records = [ended(), ended(id="video_" + "ab" * 16)]
    for record in records:
        traces.send(record)
    assert len({span.context.trace_id for span in exporter.get_finished_spans()}) == 2


@contextmanager
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """The URL of a collector of traces, and what it is sent."""
    sent: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            sent.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1/traces", sent
        finally:
            server.shutdown()
            thread.join()


def test_a_collector_gets_the_traces_over_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with collector() as (url, sent):
        traces = traces_to(url)
        traces.send(ended())
        traces.close()
    (of_service,) = (resource for request in sent for resource in request.resource_spans)
    names = [span.name for scope in of_service.scope_spans for span in scope.spans]
    assert sorted(names) == ["decode", "denoise", "encode", "polish", "queued", "video"]
    attributes = {attribute.key: attribute.value.string_value for attribute in of_service.resource.attributes}
    assert attributes["service.name"] == "pyramid-serve"
