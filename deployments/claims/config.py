"""The settings of the claims deployment."""

from importlib.util import find_spec
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator


class ClaimsConfig(BaseModel):
    """How long an owner may be silent, how often a video is tried, how many run at once and how long they are kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lease_s: Annotated[float, Field(gt=0)] = 5.0
    """A video is given to another owner when its own has not been heard from for this long."""
    app_lease_s: Annotated[float, Field(gt=0)] = 10.0
    """Where several apps share a storage, one takes the videos of another that has said nothing for this long. It says
    four times in that time that it is there, which takes some four accesses to the storage."""
    sweep_interval_s: Annotated[float, Field(gt=0)] = 1.0
    rescan_interval_s: Annotated[float, Field(gt=0)] = 10.0
    """How often the storage is searched for unfinished videos that are not known here. At every sweep while another app
    shares the storage."""
    max_running: Annotated[int, Field(ge=1)] = 32
    """Videos given to orchestrators at once; the others wait here, oldest first."""
    max_queued: Annotated[int, Field(ge=1)] = 1000
    """Videos that may wait; further ones are refused."""
    max_attempts: Annotated[int, Field(ge=1)] = 4
    """A video fails after this many errors in a row without a finished unit."""
    max_losses: Annotated[int, Field(ge=1)] = 12
    """A video fails after this many lost orchestrators in a row without a finished unit: it may be what kills them."""
    backoff_s: Annotated[float, Field(gt=0)] = 0.5
    """The pause after an error, or after the second lost orchestrator. It doubles with each further one, to 60 s."""
    retention_s: Annotated[float, Field(gt=0)] = 7 * 24 * 3600.0
    """A video is deleted this long after it ended."""
    traces_endpoint: Annotated[str, Field(pattern=r"^https?://.+")] | None = None
    """Where a trace of each video is sent when it is over, as OTLP over HTTP: ``http://collector:4318/v1/traces``. It
    needs the extra ``otel``. None: nowhere."""

    @field_validator("traces_endpoint")
    @classmethod
    def _can_be_sent(cls, endpoint: str | None) -> str | None:
        if endpoint is not None and not _has_exporter():
            raise ValueError('traces need OpenTelemetry: pip install "pyramid-serve[otel]"')
        return endpoint


def _has_exporter() -> bool:
    try:
        return find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:  # of one of the packages above it
        return False
