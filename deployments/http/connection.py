"""One HTTP connection: uvicorn's, with bounds on headers, on the time without progress, and on their number."""

import asyncio
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

_NUM_HEADER_MARKS = len(b": \r\n")
_MAX_PIPELINED = 64
"""How many requests may wait for an answer that is being sent. Each takes far more memory than its bytes."""
_MIN_TAKEN_BYTES = 16 * 1024


class ConnectionLimits(BaseModel):
    """What one connection may take. Limits of bodies are in ``BodyLimits``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_connections: PositiveInt = 5000
    """Further ones get 503 and are closed."""
    max_header_bytes: PositiveInt = 32 * 1024
    """The request line and all headers. A request with more gets 431, as does one with more between parts of a body."""
    header_timeout_s: PositiveFloat = 10.0
    """How long the headers of a request may take, and how long the rest of a body is read that nobody needs."""
    keep_alive_s: PositiveInt = 60
    """How long a connection may wait for its next request."""
    send_timeout_s: PositiveFloat = 120.0
    """How long a client may take nothing of an answer, or less than 16 KiB where more is left."""


class Connection(HttpToolsProtocol):
    """A connection with limits. Create it as uvicorn does; the last argument is ours."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **options: Any) -> None:
        super().__init__(*args, **options)
        self._limits = limits
        self._is_in_headers = False
        self._has_new_part = False
        self._num_received_bytes = 0
        self._num_parsed_bytes = 0
        self._problem: str | None = None
        self._running: RequestResponseCycle | None = None
        """The request that is being answered; ``cycle`` is the last that has come."""
        self._deadline: asyncio.TimerHandle | None = None
        self._send_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # `pause_writing` is called whenever anything has to wait
        if len(self.connections) > self._limits.max_connections:
            self._refuse(b"503 Service Unavailable", b"Retry-After: 1\r\n")
            return
        self._set_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        self._unset_keepalive_if_required()  # uvicorn leaves it after a reset
        self.resume_writing()
        super().connection_lost(exc)
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True  # uvicorn tells only the last request
            self._running.message_event.set()

    def data_received(self, data: bytes) -> None:
        self._has_new_part = False
        super().data_received(data)
        if self.transport.is_closing():
            return
        if not self._has_new_part:
            self._num_received_bytes += len(data)  # a header or trailer that has no end yet is not parsed
            if self._num_received_bytes > self._limits.max_header_bytes:
                self._refuse_headers()
                return
        if not self._is_in_headers and self._is_between_requests and self._deadline is None:
            self._set_deadline()  # uvicorn's own was ended by bytes that begin no request

    # What the parser calls

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._unset_keepalive_if_required()  # set where these bytes also ended a body that nobody needed
        self._is_in_headers, self._num_received_bytes, self._num_parsed_bytes = True, 0, 0
        self._set_deadline()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_headers:  # otherwise it is a trailer
            super().on_header(name, value)
        self._count(len(name) + len(value) + _NUM_HEADER_MARKS)

    def on_headers_complete(self) -> None:
        self._is_in_headers = False
        self._clear_deadline()
        if len(self.pipeline) >= _MAX_PIPELINED:
            raise ValueError("too many requests at once")  # the parser stops
        if self.parser.should_upgrade() and self._has_body:
            self._problem = "Upgrade: not for a request with a body; send it without."
            raise ValueError(self._problem)  # the parser would take the body for another protocol, or for a request
        super().on_headers_complete()
        if not self.pipeline:
            self._running = self.cycle

    def on_body(self, body: bytes) -> None:
        self._end_part()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._end_part()
        if self.cycle.response_complete and not self.transport.is_closing():
            self._clear_deadline()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.transport.is_closing():
            self._clear_deadline()  # what is left of the answer has its own
        elif self.pipeline:
            self._running, _ = self.pipeline[-1]
        elif self.cycle.more_body:
            # The rest of the body is read, so that the client sees the answer, but not for ever.
            self._set_deadline()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        if self._is_answering:
            self.transport.abort()
        elif self._num_parsed_bytes > self._limits.max_header_bytes:
            self._refuse_headers()
        else:
            super().send_400_response(self._problem or msg)

    # What the transport calls

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_taken()

    def resume_writing(self) -> None:
        if self._send_deadline is not None:
            self._send_deadline.cancel()
            self._send_deadline = None
        super().resume_writing()

    def _expect_taken(self) -> None:
        num_left = self.transport.get_write_buffer_size()
        self._send_deadline = self.loop.call_later(self._limits.send_timeout_s, self._check_taken, num_left)

    def _check_taken(self, num_left_before: int) -> None:
        if num_left_before - self.transport.get_write_buffer_size() < _MIN_TAKEN_BYTES:
            self.transport.abort()
        else:
            self._expect_taken()

    @property
    def _is_between_requests(self) -> bool:
        return (self.cycle is None or self.cycle.response_complete) and self.timeout_keep_alive_task is None

    @property
    def _has_body(self) -> bool:
        return any(
            name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0"))
            for name, value in self.headers
        )

    @property
    def _is_answering(self) -> bool:
        """Whether bytes written now would stand within or before the answer to an earlier request."""
        running = self._running
        if running is None or running.response_complete:
            return False
        return self._is_in_headers or running.response_started or bool(self.pipeline)

    def _end_part(self) -> None:
        """A part of a body, or a request, has come."""
        self._has_new_part, self._num_received_bytes = True, 0

    def _count(self, num_bytes: int) -> None:
        """Count bytes of the headers. Raises ``ValueError``, at which the parser stops, if there are too many."""
        self._num_parsed_bytes += num_bytes
        if self._num_parsed_bytes > self._limits.max_header_bytes:
            raise ValueError("the headers are too large")

    def _refuse_headers(self) -> None:
        self._refuse(b"431 Request Header Fields Too Large")

    def _refuse(self, status: bytes, headers: bytes = b"") -> None:
        if self._is_answering:
            self.transport.abort()
            return
        self.transport.write(
            b"HTTP/1.1 " + status + b"\r\n" + headers + b"Content-Length: 0\r\nConnection: close\r\n\r\n"
        )
        self.transport.close()

    def _set_deadline(self) -> None:
        self._clear_deadline()
        self._deadline = self.loop.call_later(self._limits.header_timeout_s, self._on_deadline)

    def _on_deadline(self) -> None:
        if self.flow.read_paused:  # what is missing may have come
            self._set_deadline()
        else:
            self.transport.abort()

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
