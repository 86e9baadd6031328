"""The settings of the claims deployment."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class ClaimsConfig(BaseModel):
    """How long an owner may be silent, how often a video is tried, how many run at once and how long they are kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lease_s: Annotated[float, Field(gt=0)] = 5.0
    """A video is given to another owner when its own has not been heard from for this long."""
    sweep_interval_s: Annotated[float, Field(gt=0)] = 1.0
    rescan_interval_s: Annotated[float, Field(gt=0)] = 10.0
    """How often the storage is searched for unfinished videos that are not known here."""
    max_running: Annotated[int, Field(ge=1)] = 32
    """Videos given to orchestrators at once; the others wait here, oldest first."""
    max_queued: Annotated[int, Field(ge=1)] = 1000
    """Videos that may wait; further ones are refused."""
    max_attempts: Annotated[int, Field(ge=1)] = 4
    """A video fails after this many errors in a row without a finished unit."""
    max_losses: Annotated[int, Field(ge=1)] = 20
    """A video fails after this many lost orchestrators in a row without a finished unit: it may be what kills them."""
    backoff_s: Annotated[float, Field(gt=0)] = 0.5
    """The pause before the second attempt. It doubles with each further attempt, up to a minute."""
    retention_s: Annotated[float, Field(gt=0)] = 7 * 24 * 3600.0
    """A video is deleted this long after it ended."""
