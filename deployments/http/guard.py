"""Who may ask this server, and what browsers are told with every answer: host names, origins, CORS, security headers.

All of it is plain ASGI, so that streams pass as they come and a client that leaves is noticed at once.
"""

import ipaddress
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

ANY = "*"
DOTLESS = "<local>"
"""Stands for every host name without a dot, as in the proxy settings of browsers and of Windows."""
PROBE_PATHS = ("/healthz", "/readyz")
POLL_HEADER = "openai-poll-after-ms"
VIDEO_ID_HEADER = "X-Video-Id"

API_POLICY = "default-src 'none'; img-src 'self'; media-src 'self'; frame-ancestors 'none'"
"""Of every answer that has no policy of its own: nothing may run. Browsers show a video that is opened by its URL in a
page of their own, for which this policy holds as well."""
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
    # The SDK of openai sends these from browsers.
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
"""``video.example.com``, ``*.example.com`` for all names that end so, ``<local>`` for names without a dot, or ``*``."""


class CorsConfig(BaseModel):
    """Which web pages of other origins may use this server from a browser."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    origins: tuple[Annotated[str, AfterValidator(_check_origin)], ...] = ()
    """Like ``https://example.com``; ``*`` is every page there is."""

    @model_validator(mode="before")
    @classmethod
    def _of_list(cls, value: object) -> object:
        """A list of origins alone means the same."""
        return {"origins": value} if isinstance(value, list | tuple) else value


def add_guards(app: FastAPI, *, allowed_hosts: tuple[HostPattern, ...] | None, cors: CorsConfig) -> None:
    """Put the guards around an app. Each is outside of those that are added before it."""
    # Inside of the others, so that an answer of status 500 has their headers too.
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
    """Gives every answer ``SECURITY_HEADERS``, but for those that it has already."""

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
    """Refuses requests to host names that this server does not have.

    A page elsewhere can let its own name point to this machine (DNS rebinding), and its browser then takes this server
    for the page's own. It cannot do so with an IP address, ``localhost``, or ``*.localhost``: these always pass, as do
    the probes, which load balancers send with any name.
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
        return _is_of_this_machine(name) or any(_matches(name, pattern) for pattern in self._allowed)


class OriginCheck:
    """Refuses requests that change something and come from web pages of another origin, unless CORS allows it.

    A browser sends such requests without asking first where they are like those of an HTML form, and only keeps the
    answer from the page. Programs that are no browsers send no ``Origin`` and pass.
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
        """The header that tells of a page of another origin which may not ask; None where there is none."""
        origins = headers.getlist("origin")
        if not origins:
            # Browsers send an Origin with these requests; where something took it out, they still tell this.
            site = headers.get("sec-fetch-site", "none").lower()
            return None if site in ("none", "same-origin") else "Sec-Fetch-Site"
        host = headers.get("host", "")
        if ANY in self._allowed or all(each.lower() in self._allowed or _is_same(each, host) for each in origins):
            return None
        return "Origin"


class TrailingSlashes:
    """Lets a path with a slash at its end be the path without it. A redirect would lose the body of a POST."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].endswith("/") and _route_path(scope) not in ("", "/"):
            scope = {**scope, "path": scope["path"][:-1]}
        await self._app(scope, receive, send)


def _route_path(scope: Scope) -> str:
    """The path inside of the app, which may be mounted elsewhere than at the root."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def _is_same(origin: str, host: str) -> bool:
    """Whether a page of this origin is one of the server that was asked by this ``Host``.

    The scheme does not count, for a proxy that ends TLS asks by plain HTTP; a port left out is that of the page's
    scheme on both sides.
    """
    scheme, separator, netloc = origin.partition("://")
    default_port = _DEFAULT_PORTS.get(scheme.lower())
    if not separator or default_port is None:
        return False
    page = _address_of(netloc, default_port=default_port)
    return page is not None and page == _address_of(host, default_port=default_port)


def _address_of(netloc: str, *, default_port: int | None) -> tuple[str, int | None] | None:
    """Name in lower case and port of ``name`` or ``name:port``; None for what is neither."""
    try:
        parts = urlsplit(f"//{netloc}")
        port = parts.port
    except ValueError:
        return None
    if not parts.hostname or parts.netloc != netloc or "@" in netloc:
        return None
    return parts.hostname, default_port if port is None else port


def _is_of_this_machine(name: str) -> bool:
    """Whether a name is an IP address or ``localhost``, which nobody can point elsewhere."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _matches(name: str, pattern: str) -> bool:
    return name.endswith(pattern[1:]) if pattern.startswith("*.") else name == pattern
