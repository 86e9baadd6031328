"""The settings of the HTTP server, ``ingress.settings`` in the configuration file."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, PositiveFloat, PositiveInt

from deployments.http.body import BodyLimits
from deployments.http.connection import ConnectionLimits
from deployments.http.guard import CorsConfig, HostPattern
from deployments.http.key_folder import check_key
from deployments.http.listener import ListenOptions

ApiKey = Annotated[str, AfterValidator(check_key)]


class HttpConfig(BaseModel):
    """The settings of the HTTP server. Limits on the videos themselves are in ``RequestLimits``."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    listen: ListenOptions | None = None
    """Where each replica listens itself, for clients that need not go through Serve's proxy. None: nowhere.
    ``pyramid-serve up`` sets it to the host and port that it is given."""
    connections: ConnectionLimits = ConnectionLimits()
    """What one connection may take, where replicas listen themselves."""
    body: BodyLimits = BodyLimits()
    api_keys: tuple[ApiKey, ...] = ()
    """Every request to ``/v1`` must carry one of these as ``Authorization: Bearer KEY``. Empty: no key is needed. Each
    must be printable ASCII characters, without spaces around them."""
    api_keys_folder: Path | None = None
    """Further keys, so that they need not be in a configuration file: a folder that every ingress replica sees, such as
    a Secret of Kubernetes. Each file in it has one key and the name of its owner. With a folder a key is always needed.
    Read again at most every 10 s."""
    allowed_hosts: tuple[HostPattern, ...] | None = None
    """The host names that this server answers to, besides IP addresses and ``localhost``. None or empty: every name.
    ``pyramid-serve up`` sets it to ``<local>``, names without a dot, if it listens on this machine only and the
    configuration does not set it."""
    cors: CorsConfig = CorsConfig()
    max_streams: PositiveInt = 100
    """How many streams and events one replica sends at once. Each costs it work with every change of its video."""
    max_waits: PositiveInt = 500
    """How many requests of one replica may wait at once until their videos are over (``wait=true`` and ``/sync``)."""
    max_downloads: PositiveInt = 200
    """How many files of finished videos, or their previews, one replica sends at once."""
    events_keep_alive_s: PositiveFloat = 15.0
    """A comment is sent on a stream of events that has been silent for this long."""
    preview_timeout_s: PositiveFloat = 60.0
    """How long a request waits for a preview that is being made."""
    ready_timeout_s: PositiveFloat = 5.0
    storage_check_interval_s: PositiveFloat = 10.0
    """``/readyz`` writes a small object to the storage at most this often, to see whether it accepts videos."""

    @property
    def needs_key(self) -> bool:
        """Whether requests to ``/v1`` need a key."""
        return bool(self.api_keys) or self.api_keys_folder is not None
