"""A listener with a small app behind it, and connections to it."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from deployments.http.connection import ConnectionLimits
from deployments.http.listener import Listener, ListenOptions
from deployments.local.cluster import free_port

HEAD = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
LARGE = 16_000_000
POST = b"POST /unread HTTP/1.1\r\nHost: localhost\r\n"


async def hello(request: Request) -> Response:
    return PlainTextResponse("hello")


async def length(request: Request) -> Response:
    return JSONResponse({"length": len(await request.body()), "root": request.scope["root_path"]})


async def busy(request: Request) -> Response:
    until = time.perf_counter() + 0.005
    while time.perf_counter() < until:
        pass
    return PlainTextResponse("busy")


async def slow(request: Request) -> Response:
    await asyncio.sleep(float(request.query_params.get("seconds", 0.5)))
    return PlainTextResponse("slow")


async def large(request: Request) -> Response:
    return Response(bytes(LARGE))


async def quiet(request: Request) -> Response:
    async def chunks() -> AsyncIterator[bytes]:
        try:
            yield b"begun"
            await asyncio.sleep(60)
        finally:
            request.app.state.is_stream_over = True

    return StreamingResponse(chunks())


async def endless(request: Request) -> Response:
    async def chunks() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x" * 100_000
                await asyncio.sleep(0)
        finally:
            request.app.state.is_stream_over = True

    return StreamingResponse(chunks())


def new_app() -> Starlette:
    app = Starlette(
        routes=[
            Route("/", hello),
            Route("/healthz", hello),
            Route("/busy", busy),
            Route("/slow", slow),
            Route("/large", large),
            Route("/endless", endless),
            Route("/quiet", quiet),
            Route("/length", length, methods=["POST"]),
            Route("/unread", hello, methods=["POST"]),
        ]
    )
    app.state.is_stream_over = False
    return app


@asynccontextmanager
async def listening(
    app: Starlette | None = None, *, route_prefix: str = "/", drain_timeout_s: int = 1, **limits: float
) -> AsyncIterator[Listener]:
    options = ListenOptions(port=free_port(), route_prefix=route_prefix, drain_timeout_s=drain_timeout_s)
    listener = await Listener.start(app or new_app(), options, ConnectionLimits.model_validate(limits))
    try:
        yield listener
    finally:
        await listener.stop()


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connect(listener: Listener) -> Connection:
    return await asyncio.open_connection("127.0.0.1", listener.port)


async def all_of(reader: asyncio.StreamReader, *, within_s: float = 10.0) -> bytes:
    """What comes until the server closes the connection, which may end with a reset."""
    received = b""
    async with asyncio.timeout(within_s):
        try:
            while chunk := await reader.read(65536):
                received += chunk
        except ConnectionResetError:
            pass
    return received


async def until(is_so: Callable[[], bool], *, within_s: float = 10.0) -> None:
    async with asyncio.timeout(within_s):
        while not is_so():
            await asyncio.sleep(0.02)
