"""Middleware that protects the server and browsers: host names, origins, CORS, security headers.

All of it is plain ASGI, so that streams are passed on at once and a client that leaves is noticed at once.
"""

import re
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import FastAPI
from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.http.errors import ApiError, error_response, on_unexpected
from deployments.http.hosts import is_address_or_localhost

ANY = "*"
DOTLESS = "<local>"
"""Stands for every host name without a dot, as in the proxy settings of browsers and of Windows."""
PROBE_PATHS = ("/healthz", "/readyz")
POLL_HEADER = "openai-poll-after-ms"
VIDEO_ID_HEADER = "X-Video-Id"

API_POLICY = "default-src 'none'; img-src 'self'; media-src 'self'; frame-ancestors 'none'"
"""The policy of every answer that sets none itself: no script may run. A browser puts a video that is opened by its URL
in a page of its own making, and the policy must let that page show the video."""
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": API_POLICY,
}
CORS_METHODS = ("GET", "HEAD", "POST", "DELETE")
CORS_REQUEST_HEADERS = (
    *("Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID", "Cache-Control"),
    *("Range", "If-Range", "If-None-Match", "OpenAI-Organization", "OpenAI-Project"),
    # The openai SDK sends these from browsers.
    *(
        f"X-Stainless-{name}"
        for name in (
            *("Arch", "Lang", "OS", "Package-Version", "Runtime", "Runtime-Version", "Retry-Count", "Timeout"),
            *("Async", "Helper-Method", "Poll-Helper", "Custom-Poll-Interval"),
        )
    ),
)
CORS_ANSWER_HEADERS = (
    *(POLL_HEADER, VIDEO_ID_HEADER, "Accept-Ranges", "Allow", "Content-Disposition", "Content-Length"),
    *("Content-Range", "ETag", "Retry-After", "WWW-Authenticate", "X-Should-Retry", "X-Request-Id"),
)

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_HOST_PATTERN = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")


def _check_origin(origin: str) -> str:
    if origin in (ANY, "null"):
        return origin
    parts = urlsplit(origin)
    if parts.scheme and parts.hostname and origin.lower() == f"{parts.scheme}://{parts.netloc.lower()}":
        return origin.lower()
    raise ValueError(f"{origin!r}: must be like https://example.com or http://localhost:3000, without a path, or '*'")


def _check_host(pattern: str) -> str:
    lowered = pattern.lower()
    if lowered in (ANY, DOTLESS) or _HOST_PATTERN.fullmatch(lowered):
        return lowered
    raise ValueError(f"{pattern!r}: must be a host name without a port, or like '*.example.com'")


HostPattern = Annotated[str, AfterValidator(_check_host)]
"""``video.example.com``; ``*.example.com``: names with that ending; ``<local>``: names without a dot; ``*``: all."""


class CorsConfig(BaseModel):
    """Which web pages of other origins may use this server from a browser."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    origins: tuple[Annotated[str, AfterValidator(_check_origin)], ...] = ()
    """Like ``https://example.com``; ``*`` allows every page."""

    @model_validator(mode="before")
    @classmethod
    def _of_list(cls, value: object) -> object:
        """A list is short for ``{"origins": list}``."""
        return {"origins": value} if isinstance(value, list | tuple) else value


def add_guards(app: FastAPI, *, allowed_hosts: tuple[HostPattern, ...] | None, cors: CorsConfig) -> None:
    """Wrap an app in the middleware of this module. Each is outside of those that are added before it."""
    # The innermost, so that an answer with status 500 has the headers of the others too.
    app.add_middleware(ServerErrorMiddleware, handler=on_unexpected)
    app.add_middleware(TrailingSlashes)
    app.add_middleware(OriginCheck, allowed=cors.origins)
    if allowed_hosts and ANY not in allowed_hosts:
        app.add_middleware(HostCheck, allowed=allowed_hosts)
    if cors.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors.origins,
            allow_methods=CORS_METHODS,
            allow_headers=CORS_REQUEST_HEADERS,
            expose_headers=CORS_ANSWER_HEADERS,
            allow_private_network=True,
        )
    app.add_middleware(SecurityHeaders)


class SecurityHeaders:
    """Adds each of ``SECURITY_HEADERS`` that an answer does not have."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", [])
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers)


class HostCheck:
    """Refuses requests whose ``Host`` is not one of the allowed names.

    The owner of a web page can make its own host name point to this machine (DNS rebinding); a browser then treats this
    server as part of that page. This is not possible with an IP address, ``localhost`` or ``*.localhost``, which always
    pass. So do the probes, which load balancers send with any name.
    """

    def __init__(self, app: ASGIApp, *, allowed: tuple[str, ...]) -> None:
        self._app = app
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _route_path(scope).removesuffix("/") not in PROBE_PATHS:
            hosts = Headers(scope=scope).getlist("host")
            if len(hosts) != 1 or not self._is_allowed(hosts[0]):
                host = ", ".join(hosts)[:60]
                error = ApiError(
                    400,
                    f"Host={host!r}: this server does not go by that name; "
                    "to let it, add the name to ingress.settings.allowed_hosts",
                    param="Host",
                    code="host_not_allowed",
                )
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_allowed(self, host: str) -> bool:
        address = _address_of(host, default_port=None)
        if address is None:
            return False
        name = address[0]
        if DOTLESS in self._allowed and name and "." not in name:
            return True
        name = name.removesuffix(".")
        return is_address_or_localhost(name) or any(_matches(name, pattern) for pattern in self._allowed)


class OriginCheck:
    """Refuses requests that change something and come from web pages of another origin, unless CORS allows the origin.

    A browser sends such a request without a preflight if an HTML form could send it too, and only hides the answer from
    the page. Other programs send no ``Origin`` and pass.
    """

    def __init__(self, app: ASGIApp, *, allowed: tuple[str, ...]) -> None:
        self._app = app
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in _SAFE_METHODS:
            headers = Headers(scope=scope)
            foreign = self._foreign(headers)
            if foreign is not None:
                error = ApiError(
                    403,
                    f"{foreign}={headers[foreign][:60]!r}: a web page of another origin may not do this; "
                    "to let it, add its origin to ingress.settings.cors.origins",
                    param=foreign,
                    code="origin_not_allowed",
                )
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _foreign(self, headers: Headers) -> str | None:
        """The header that shows that a page of another origin sent the request; None if no such page did."""
        origins = headers.getlist("origin")
        if not origins:
            # Browsers send an Origin with these requests. If a proxy removes it, this header is still there.
            site = headers.get("sec-fetch-site", "none").lower()
            return None if site in ("none", "same-origin") else "Sec-Fetch-Site"
        host = headers.get("host", "")
        if ANY in self._allowed or all(each.lower() in self._allowed or _is_same(each, host) for each in origins):
            return None
        return "Origin"


class TrailingSlashes:
    """Removes a slash from the end of the path. A redirect instead would lose the body of a POST."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].endswith("/") and _route_path(scope) not in ("", "/"):
            scope = {**scope, "path": scope["path"][:-1]}
        await self._app(scope, receive, send)


def _route_path(scope: Scope) -> str:
    """The path relative to the root of the app, which may be mounted under a prefix."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def _is_same(origin: str, host: str) -> bool:
    """Whether an origin is that of the server itself, by the ``Host`` of the request.

    The scheme is not compared, because a proxy that terminates TLS forwards plain HTTP. A missing port is the default
    port of the origin's scheme, on both sides.
    """
    scheme, separator, netloc = origin.partition("://")
    default_port = _DEFAULT_PORTS.get(scheme.lower())
    if not separator or default_port is None:
        return False
    page = _address_of(netloc, default_port=default_port)
    return page is not None and page == _address_of(host, default_port=default_port)


def _address_of(netloc: str, *, default_port: int | None) -> tuple[str, int | None] | None:
    """(name in lower case, port) of ``name`` or ``name:port``; None for any other text."""
    try:
        parts = urlsplit(f"//{netloc}")
        port = parts.port
    except ValueError:
        return None
    if not parts.hostname or parts.netloc != netloc or "@" in netloc:
        return None
    return parts.hostname, default_port if port is None else port


def _matches(name: str, pattern: str) -> bool:
    return name.endswith(pattern[1:]) if pattern.startswith("*.") else name == pattern
