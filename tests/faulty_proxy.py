"""A proxy before an S3 that goes wrong at random: it answers 503 SlowDown, resets connections, or is slow."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

import aiohttp
from aiohttp import web

from tests.in_a_thread import in_a_thread

_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect", "date", "server"}
_MAX_BODY = 2**30


class Fault(StrEnum):
    """What happens to a request in place of an answer, or before it."""

    SLOW_DOWN = "slow_down"
    RESET_BEFORE = "reset_before"
    """The connection is reset, and S3 never hears of the request."""
    RESET_AFTER = "reset_after"
    """The connection is reset when S3 has done what it was asked for."""
    WAIT = "wait"
    """The answer comes ``wait_s`` later."""


@dataclass
class FaultyProxy:
    """What goes wrong, which may be changed at any time, and what went wrong so far."""

    url: str = ""
    share: float = 0.0
    """Of the requests, which meet a fault."""
    faults: tuple[Fault, ...] = tuple(Fault)
    wait_s: float = 2.0
    generator: random.Random = field(default_factory=lambda: random.Random(0))
    num_faults: Counter[Fault] = field(default_factory=Counter)
    requests: list[str] = field(default_factory=list)
    """Each as its method and the path of its URL."""

    def draw(self) -> Fault | None:
        if self.generator.random() >= self.share:
            return None
        return self.generator.choice(self.faults)


@contextmanager
def faulty_proxy(target: str) -> Iterator[FaultyProxy]:
    """A proxy before the server at a URL, in a thread, for as long as the block runs."""
    proxy = FaultyProxy()

    async def serve(until_over: Callable[[], Awaitable[None]]) -> None:
        async with aiohttp.ClientSession(auto_decompress=False) as session:

            async def handle(request: web.Request) -> web.StreamResponse:
                return await _answer(request, proxy, session, target)

            application = web.Application(client_max_size=_MAX_BODY)
            application.router.add_route("*", "/{path:.*}", handle)
            runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            proxy.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            await until_over()
            await runner.cleanup()

    with in_a_thread(serve):
        yield proxy


async def _answer(
    request: web.Request, proxy: FaultyProxy, session: aiohttp.ClientSession, target: str
) -> web.StreamResponse:
    proxy.requests.append(f"{request.method} {request.path}")
    fault = proxy.draw()
    if fault is not None:
        proxy.num_faults[fault] += 1
    content = await request.read()
    if fault is Fault.SLOW_DOWN:
        body = b"" if request.method == "HEAD" else _SLOW_DOWN
        return web.Response(status=503, body=body, content_type="application/xml")
    if fault is Fault.RESET_BEFORE:
        return _reset(request)
    headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
    async with session.request(request.method, target + request.raw_path, data=content, headers=headers) as answer:
        body = await answer.read()
        kept = [(name, value) for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP]
        if request.method == "HEAD":
            kept.append(("Content-Length", answer.headers.get("Content-Length", "0")))
    if fault is Fault.RESET_AFTER:
        return _reset(request)
    if fault is Fault.WAIT:
        await asyncio.sleep(proxy.wait_s)
    response = web.Response(status=answer.status, body=None if request.method == "HEAD" else body)
    for name in {name for name, _ in kept}:
        response.headers.popall(name, None)
    for name, value in kept:
        response.headers.add(name, value)
    return response


def _reset(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()  # which reaches nobody
