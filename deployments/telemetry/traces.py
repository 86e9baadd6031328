"""Traces of videos for OpenTelemetry, made from their records when they are over; nothing is traced while they run.

It needs the extra ``otel``, so only who has an address for traces imports it.
"""

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import Span, StatusCode, set_span_in_context
from opentelemetry.util.types import AttributeValue

from pyramid_serve.api import VideoRecord

_SERVICE = "pyramid-serve"
_MAX_SPANS_WAITING = 20_000
"""Of a hundred long videos or so. Further ones are dropped until the collector has taken some."""


class VideoTraces:
    """Gives a trace of each video to a processor of OpenTelemetry's SDK.

    The trace has the 32 hexadecimal digits of the video's id as its own. Its root is the whole video, from acceptance
    to end; under it are the wait in the queue and each entry of the timeline. Prompts are not in it.
    """

    def __init__(self, processor: SpanProcessor) -> None:
        self._ids = _VideoIds()
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": _SERVICE}), id_generator=self._ids, shutdown_on_exit=False
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer(__name__)

    def send(self, record: VideoRecord) -> None:
        """Trace a video that is over. It takes some microseconds a span; sending is the processor's."""
        assert record.completed_at is not None
        self._ids.video_id = record.id
        video = self._span("video", None, record.created_at, **_attributes_of(record))
        if record.error is not None:
            video.set_status(StatusCode.ERROR, record.error.code)
        begun = record.completed_at if record.started_at is None else record.started_at
        self._span("queued", video, record.created_at).end(_nanoseconds(begun))
        for entry in record.timeline:
            unit = {} if entry.unit is None else {"unit": entry.unit}
            self._span(str(entry.stage), video, entry.start, replica=entry.replica, **unit).end(_nanoseconds(entry.end))
        video.end(_nanoseconds(record.completed_at))

    def close(self) -> None:
        """Send what is left, and take no more."""
        self._provider.shutdown()

    def _span(self, name: str, parent: Span | None, start: float, **attributes: AttributeValue) -> Span:
        context = Context() if parent is None else set_span_in_context(parent, Context())
        return self._tracer.start_span(name, context, attributes=attributes, start_time=_nanoseconds(start))


def traces_to(endpoint: str) -> VideoTraces:
    """Traces that a thread sends every few seconds, as OTLP over HTTP to this URL."""
    return VideoTraces(BatchSpanProcessor(OTLPSpanExporter(endpoint), max_queue_size=_MAX_SPANS_WAITING))


class _VideoIds(RandomIdGenerator):
    """The id of a trace is that of its video; the ids of spans are random."""

    video_id = ""

    def generate_trace_id(self) -> int:
        return int(self.video_id.removeprefix("video_"), 16)


def _attributes_of(record: VideoRecord) -> dict[str, AttributeValue]:
    plan = record.plan
    return {
        "video_id": record.id,
        "model": plan.model,
        "size": plan.size,
        "num_frames": plan.num_frames,
        "num_units": plan.num_units,
        "status": str(record.status),
        "attempts": record.attempts,
        "num_units_retried": record.num_units_retried,
    }


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
