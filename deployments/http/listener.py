"""An HTTP server within a replica of the ingress, which clients reach without Serve's proxy.

Serve's proxy costs as much processor time per request as the app itself, and bounds neither the headers of a request
nor the time for which a connection may do nothing. This server is uvicorn, with connections that have these bounds.
"""

import asyncio
import errno
import logging
import os
import socket
import sys
import time
import uuid
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Annotated, Self

import uvicorn
from pydantic import BaseModel, ConfigDict, Field
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.http.connection import Connection, ConnectionLimits
from deployments.http.errors import CLIENT_LEFT
from deployments.http.guard import PROBE_PATHS

REQUEST_ID_HEADER = "X-Request-Id"

_MAX_REQUEST_ID_CHARACTERS = 128
_BACKLOG = 2048
_START_S = 10.0
_MAX_BEGUN = 8
_NUM_OTHER_FILES = 1000

logger = logging.getLogger(__name__)

access_logger = logging.getLogger("ray.serve")
"""Serve's own, whose files it rotates; ``logging_config.enable_access_log`` of Serve applies."""


class ListenOptions(BaseModel):
    """Where a replica listens. What one connection may take is in ``ConnectionLimits``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)]
    """All replicas of a node share it; the operating system spreads the connections over them."""
    route_prefix: Annotated[str, Field(pattern="^/")] = "/"
    """The app's own in the configuration of Serve."""
    drain_timeout_s: Annotated[int, Field(ge=0)] = 25
    """A replica that is stopped takes no new connections, and waits so long for the answers that it is sending."""


class Listener:
    """A running server. Create it with :meth:`start`, in the event loop that it is to run in."""

    def __init__(self, server: "_Server", listening: socket.socket, task: asyncio.Task[None]) -> None:
        self._server = server
        self._socket = listening
        self._task = task

    @classmethod
    async def start(cls, app: ASGIApp, options: ListenOptions, limits: ConnectionLimits | None = None) -> Self:
        """Listen, and return when connections are accepted. Raises ``OSError`` for a port that cannot be had."""
        limits = limits or ConnectionLimits()
        limits = limits.model_copy(update={"max_connections": _possible_connections(limits.max_connections)})
        if options.route_prefix != "/":
            app = Starlette(routes=[Mount(options.route_prefix.rstrip("/"), app=app)])
        listening = bound_socket(options.host, options.port)
        listening.listen(_BACKLOG)
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # malformed requests are the client's business
        server = _Server(
            uvicorn.Config(
                RequestLog(Turns(app)),
                http=partial(Connection, limits=limits),  # type: ignore[arg-type]  # it only calls it
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=limits.keep_alive_s,
                timeout_graceful_shutdown=options.drain_timeout_s,
            )
        )
        listener = cls(server, listening, asyncio.create_task(server.serve([listening])))
        async with asyncio.timeout(_START_S):
            while not server.started:
                listener.check()
                await asyncio.sleep(0.01)
        return listener

    @property
    def port(self) -> int:
        port: int = self._socket.getsockname()[1]
        return port

    def check(self) -> None:
        """Raise ``RuntimeError`` if the server has ended."""
        if self._task.done():
            raise RuntimeError("the HTTP server of this replica has ended") from self._task.exception()

    async def stop(self) -> None:
        """Take no more connections, and return when the last answer is sent or ``drain_timeout_s`` is over."""
        self._server.should_exit = True
        await asyncio.wait([self._task])
        self._socket.close()


class RequestLog:
    """Gives each request an id, which its answer carries, and writes a line to the access log.

    A client's own id is kept, as Serve's proxy does.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        request_id = _request_id(Headers(scope=scope).get(REQUEST_ID_HEADER, ""))
        status = CLIENT_LEFT

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            access_logger.info(
                "%s %s %d %.1fms %s",
                scope["method"],
                scope["raw_path"].decode("ascii", "backslashreplace"),  # as it came: a decoded one may hold line breaks
                status,
                1000 * (time.monotonic() - started),
                request_id,
                extra={"serve_access_log": True},
            )


class Turns:
    """Lets a few requests begin in each turn of the event loop, and probes at once.

    A thousand requests of one instant take seconds of processor time, even to be refused. Without this, a probe that
    comes then would be answered after all of them.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not scope["path"].removesuffix("/").endswith(PROBE_PATHS):
            await self._next()
        await self._app(scope, receive, send)

    async def _next(self) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._let_begin())
        await turn

    async def _let_begin(self) -> None:
        while self._waiting:
            for _ in range(min(_MAX_BEGUN, len(self._waiting))):
                turn = self._waiting.popleft()
                if not turn.done():  # the server stops, and does not wait for it any more
                    turn.set_result(None)
            await asyncio.sleep(0)


class _Server(uvicorn.Server):
    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """Signals are Serve's business."""
        return nullcontext()


def _request_id(given: str) -> str:
    if given and len(given) <= _MAX_REQUEST_ID_CHARACTERS and given.isascii() and given.isprintable():
        return given
    return str(uuid.uuid4())


def _possible_connections(wanted: int) -> int:
    """How many connections this process may have beside other files, once its soft limit of open files is raised."""
    if sys.platform == "win32":
        return wanted
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _NUM_OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed and soft != hard:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    possible = min(wanted, max(soft - _NUM_OTHER_FILES, soft // 2))
    if possible < wanted:
        logger.warning(
            "connections.max_connections=%d: at most %d, as the limit of open files (ulimit -n) is %d",
            wanted,
            possible,
            soft,
        )
    return possible


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket bound to the address, which other replicas of this user may share. Of a name, an IPv4 address if any.

    Raises ``OSError``.
    """
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        number = error.errno or errno.EADDRNOTAVAIL
        raise OSError(number, f"port {port} of {host}: {os.strerror(number).lower()}") from None
    return bound
