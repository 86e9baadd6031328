"""The ingress's own HTTP server, against clients that are slow, endless or many."""

import asyncio
import gc
import logging
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from deployments.http.connection import Connection as HttpConnection
from deployments.http.connection import ConnectionLimits
from deployments.http.listener import Listener, ListenOptions
from deployments.local.cluster import free_port

pytestmark = pytest.mark.asyncio

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


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: loc", b"\r\n"])
async def test_a_connection_whose_headers_do_not_come_is_closed(sent: bytes) -> None:
    async with listening(header_timeout_s=0.3) as listener:
        reader, writer = await connect(listener)
        writer.write(sent)
        started = time.monotonic()
        assert await all_of(reader) == b""
        assert time.monotonic() - started < 3
        writer.close()


async def test_headers_that_trickle_in_do_not_keep_a_connection_open() -> None:
    async with listening(header_timeout_s=0.5) as listener:
        reader, writer = await connect(listener)

        async def trickle() -> None:
            writer.write(HEAD)
            while not writer.is_closing():
                writer.write(b"X: y\r\n")
                await asyncio.sleep(0.05)

        task = asyncio.create_task(trickle())
        assert await all_of(reader, within_s=5) == b""
        writer.close()
        await asyncio.gather(task, return_exceptions=True)


async def test_slow_headers_on_a_connection_that_is_used_again_are_closed_too() -> None:
    async with listening(header_timeout_s=0.3) as listener:
        reader, writer = await connect(listener)
        writer.write(HEAD + b"\r\n")
        assert (await reader.readuntil(b"hello")).startswith(b"HTTP/1.1 200")
        writer.write(b"\r\n")  # begins no request, and ends uvicorn's own timer
        assert await all_of(reader, within_s=5) == b""
        writer.close()


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(b"X: " + b"a" * 40_000 + b"\r\n\r\n", id="one that is long"),
        pytest.param(b"X: y\r\n" * 8_000 + b"\r\n", id="many"),
        pytest.param(b"X: " + b"a" * 40_000, id="one without an end"),
    ],
)
async def test_headers_that_are_too_large_get_431(headers: bytes) -> None:
    async with listening() as listener:
        reader, writer = await connect(listener)
        writer.write(HEAD + headers)
        assert (await all_of(reader)).startswith(b"HTTP/1.1 431 ")
        writer.close()


async def test_a_url_that_is_too_long_gets_431() -> None:
    async with listening() as listener:
        reader, writer = await connect(listener)
        writer.write(b"GET /" + b"a" * 40_000)
        assert (await all_of(reader)).startswith(b"HTTP/1.1 431 ")
        writer.close()


async def test_headers_within_the_limit_are_taken() -> None:
    async with listening() as listener:
        reader, writer = await connect(listener)
        writer.write(HEAD + b"X: " + b"a" * 30_000 + b"\r\nConnection: close\r\n\r\n")
        assert (await all_of(reader)).startswith(b"HTTP/1.1 200 ")
        writer.close()


async def test_a_request_that_is_not_http_gets_400() -> None:
    async with listening() as listener:
        reader, writer = await connect(listener)
        writer.write(b"nonsense\r\n\r\n")
        assert (await all_of(reader)).startswith(b"HTTP/1.1 400 ")
        writer.close()


async def test_a_long_answer_is_not_cut_by_the_limit_of_headers() -> None:
    async with listening(header_timeout_s=0.1) as listener, httpx.AsyncClient() as client:
        assert (await client.get(f"http://127.0.0.1:{listener.port}/slow")).text == "slow"


async def test_a_slow_body_is_left_to_the_app() -> None:
    async with listening(header_timeout_s=0.2) as listener:
        reader, writer = await connect(listener)
        writer.write(
            b"POST /length HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 10\r\n\r\n12345"
        )
        await asyncio.sleep(0.5)
        writer.write(b"67890")
        assert b'"length":10' in await all_of(reader)
        writer.close()


async def test_a_body_that_nobody_reads_keeps_the_answer_but_not_the_connection() -> None:
    async with listening(header_timeout_s=0.5) as listener:
        reader, writer = await connect(listener)
        writer.write(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        assert (await reader.readuntil(b"hello")).startswith(b"HTTP/1.1 200")
        started = time.monotonic()
        with pytest.raises(ConnectionError):
            while time.monotonic() - started < 5:
                writer.write(b"5\r\nhello\r\n")
                await writer.drain()
                await asyncio.sleep(0.01)
        writer.close()


async def test_after_a_body_that_was_left_unread_the_connection_is_used_again() -> None:
    async with listening(header_timeout_s=0.5, keep_alive_s=10) as listener:
        reader, writer = await connect(listener)
        writer.write(POST + b"Content-Length: 5\r\n\r\n12")
        await reader.readuntil(b"hello")
        writer.write(b"345")
        await asyncio.sleep(1.0)  # longer than the limit, which ended with the body
        writer.write(HEAD + b"Connection: close\r\n\r\n")
        assert (await all_of(reader)).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_a_client_that_takes_nothing_of_its_answer_is_left() -> None:
    app = new_app()
    async with listening(app, send_timeout_s=0.3) as listener:
        _, writer = await connect(listener)
        writer.write(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await until(lambda: app.state.is_stream_over)
        writer.close()


async def test_connections_past_the_limit_get_503_and_later_ones_are_taken_again() -> None:
    async with listening(max_connections=2, header_timeout_s=30) as listener:
        held = [await connect(listener) for _ in range(2)]
        await asyncio.sleep(0.05)
        reader, writer = await connect(listener)
        refused = await all_of(reader)
        assert refused.startswith(b"HTTP/1.1 503 ") and b"Retry-After" in refused
        for _, other in (*held, (reader, writer)):
            other.close()
        await asyncio.sleep(0.05)
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"http://127.0.0.1:{listener.port}/")).text == "hello"


async def test_hundreds_of_silent_connections_do_not_delay_the_others() -> None:
    async with listening() as listener, httpx.AsyncClient() as client:
        held = [await connect(listener) for _ in range(400)]
        started = time.monotonic()
        assert (await client.get(f"http://127.0.0.1:{listener.port}/")).text == "hello"
        assert time.monotonic() - started < 1
        for _, writer in held:
            writer.close()


async def test_a_probe_does_not_wait_for_the_requests_before_it() -> None:
    async with listening() as listener, httpx.AsyncClient() as client:
        held = [await connect(listener) for _ in range(300)]
        await client.get(f"http://127.0.0.1:{listener.port}/healthz")
        for _, writer in held:
            writer.write(b"GET /busy HTTP/1.1\r\nHost: localhost\r\n\r\n")
        started = time.monotonic()
        await client.get(f"http://127.0.0.1:{listener.port}/healthz")
        probed_s = time.monotonic() - started
        assert all([(await reader.readline()).startswith(b"HTTP/1.1 200") for reader, _ in held])
        assert probed_s < (time.monotonic() - started) / 3
        for _, writer in held:
            writer.close()


async def test_an_app_under_a_prefix_knows_its_root_and_nothing_else_is_there() -> None:
    async with listening(route_prefix="/video") as listener, httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{listener.port}"
        answer = await client.post(f"{url}/video/length", content=b"12345")
        assert answer.json() == {"length": 5, "root": "/video"}
        assert (await client.get(f"{url}/length")).status_code == 404


async def test_each_answer_has_the_id_of_its_request(caplog: pytest.LogCaptureFixture) -> None:
    async with listening() as listener, httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.port}") as client:
        first, second = [(await client.get("/")).headers["x-request-id"] for _ in range(2)]
        assert first != second and len(first) == 36
        assert (await client.get("/", headers={"X-Request-Id": "mine"})).headers["x-request-id"] == "mine"
        assert len((await client.get("/", headers={"X-Request-Id": "a" * 200})).headers["x-request-id"]) == 36


async def test_requests_are_in_the_access_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        async with listening() as listener, httpx.AsyncClient() as client:
            await client.get(f"http://127.0.0.1:{listener.port}/?key=secret", headers={"X-Request-Id": "mine"})
    (line,) = {record.getMessage() for record in caplog.records if record.name == "ray.serve"}
    assert line.startswith("GET / 200 ") and line.endswith(" mine")


@pytest.mark.parametrize("host", ["localhost", "0.0.0.0", ""])
async def test_names_are_reached_by_ipv4(host: str) -> None:
    options = ListenOptions(host=host, port=free_port(), drain_timeout_s=1)
    listener = await Listener.start(new_app(), options)
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"http://127.0.0.1:{options.port}/")).text == "hello"
    await listener.stop()


async def test_a_port_that_is_taken_is_one_line() -> None:
    taken = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = taken.sockets[0].getsockname()[1]
    with pytest.raises(OSError, match=f"port {port} of 127.0.0.1: address already in use"):
        await Listener.start(new_app(), ListenOptions(port=port))
    taken.close()


@pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT"), reason="ports are not shared here")
async def test_a_new_replica_takes_over_the_port_while_the_old_one_ends_its_answers() -> None:
    options = ListenOptions(port=free_port(), drain_timeout_s=5)
    old = await Listener.start(new_app(), options)
    async with httpx.AsyncClient() as client:
        running = asyncio.create_task(client.get(f"http://127.0.0.1:{options.port}/slow"))
        await asyncio.sleep(0.1)
        new = await Listener.start(new_app(), options)
        stopping = asyncio.create_task(old.stop())
        await asyncio.sleep(0.3)
        async with httpx.AsyncClient() as other:
            assert (await other.get(f"http://127.0.0.1:{options.port}/")).text == "hello"
        assert (await running).text == "slow"
        await stopping
    await new.stop()


async def test_a_server_that_has_ended_is_noticed() -> None:
    async with listening() as listener:
        listener.check()
        await listener.stop()
        with pytest.raises(RuntimeError, match="has ended"):
            listener.check()


async def test_a_trailer_without_an_end_gets_431() -> None:
    async with listening() as listener:
        reader, writer = await connect(listener)
        writer.write(b"POST /length HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ")
        await asyncio.sleep(0.05)
        writer.write(b"a" * 40_000)
        assert (await all_of(reader, within_s=2)).startswith(b"HTTP/1.1 431 ")
        writer.close()


async def test_a_trailer_is_not_taken_for_a_header() -> None:
    async with listening() as listener:
        reader, writer = await connect(listener)
        chunked = b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        writer.write(b"POST /length HTTP/1.1\r\nHost: localhost\r\n" + chunked + b"0\r\nX-Request-Id: late\r\n\r\n")
        answer = await all_of(reader)
        assert b'"length":0' in answer and b"late" not in answer
        writer.close()


async def test_a_body_together_with_a_part_of_the_next_headers_is_not_taken_for_large_headers() -> None:
    async with listening() as listener:
        reader, writer = await connect(listener)
        body = b"a" * 60_000
        writer.write(b"POST /length HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60000\r\n\r\n" + body + HEAD)
        await reader.readuntil(b'"length":60000')
        writer.write(b"Connection: close\r\n\r\n")
        assert b"hello" in await all_of(reader)
        writer.close()


async def test_the_end_of_an_unread_body_does_not_limit_the_time_of_the_next_answer() -> None:
    async with listening(keep_alive_s=1) as listener:
        reader, writer = await connect(listener)
        writer.write(POST + b"Content-Length: 5\r\n\r\n12")
        await reader.readuntil(b"hello")
        writer.write(b"345GET /slow?seconds=1.3 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with asyncio.timeout(5):
            await reader.readuntil(b"slow")
        writer.close()


async def test_a_slow_body_after_the_answer_to_an_earlier_request_is_left_to_the_app() -> None:
    async with listening(header_timeout_s=0.2) as listener:
        reader, writer = await connect(listener)
        writer.write(
            b"GET /slow?seconds=0.1 HTTP/1.1\r\nHost: localhost\r\n\r\n"
            b"POST /length HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n12345"
        )
        await reader.readuntil(b"slow")
        await asyncio.sleep(0.4)
        writer.write(b"67890")
        async with asyncio.timeout(5):
            await reader.readuntil(b'"length":10')
        writer.close()


async def test_a_stream_ends_with_its_connection_also_if_another_request_waits_behind_it() -> None:
    app = new_app()
    async with listening(app) as listener:
        _, writer = await connect(listener)
        writer.write(b"GET /quiet HTTP/1.1\r\nHost: localhost\r\n\r\n" + HEAD + b"\r\n")
        await asyncio.sleep(0.1)
        writer.transport.abort()
        await until(lambda: app.state.is_stream_over, within_s=2)


async def test_too_many_requests_at_once_end_the_connection() -> None:
    async with listening() as listener:
        reader, writer = await connect(listener)
        writer.write((HEAD + b"\r\n") * 20)
        async with asyncio.timeout(5):
            for _ in range(20):
                await reader.readuntil(b"hello")
        writer.write(b"GET /quiet HTTP/1.1\r\nHost: localhost\r\n\r\n" + (HEAD + b"\r\n") * 1_000)
        assert b"hello" not in await all_of(reader, within_s=2)
        writer.close()


@pytest.mark.parametrize("length", [b"Content-Length: 33\r\n", b"Transfer-Encoding: chunked\r\n"])
async def test_a_body_after_an_upgrade_is_refused_rather_than_taken_for_a_request(length: bytes) -> None:
    async with listening() as listener:
        reader, writer = await connect(listener)
        writer.write(POST + b"Connection: Upgrade\r\nUpgrade: h2c\r\n" + length + b"\r\n")
        await asyncio.sleep(0.05)
        writer.write(HEAD + b"\r\n")
        answers = await all_of(reader, within_s=2)
        assert answers.startswith(b"HTTP/1.1 400 ") and b"Upgrade: not for a request with a body" in answers
        assert answers.count(b"HTTP/1.1 ") == 1
        writer.close()


async def test_an_upgrade_without_a_body_is_ignored() -> None:
    async with listening() as listener:
        reader, writer = await connect(listener)
        writer.write(HEAD + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 0\r\n\r\n")
        await reader.readuntil(b"hello")
        writer.write(HEAD + b"Connection: close\r\n\r\n")
        assert b"hello" in await all_of(reader)
        writer.close()


async def test_no_error_is_written_into_an_answer() -> None:
    async with listening() as listener:
        reader, writer = await connect(listener)
        writer.write(b"GET /quiet HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await reader.readuntil(b"begun")
        writer.write(b"nonsense\r\n\r\n")
        assert b"HTTP/1.1" not in await all_of(reader, within_s=2)
        writer.close()


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
async def test_a_client_that_takes_its_answer_slowly_gets_all_of_it(connection: str) -> None:
    async with listening(send_timeout_s=0.2) as listener:
        reader, writer = await connect(listener)
        writer.write(f"GET /large HTTP/1.1\r\nHost: localhost\r\nConnection: {connection}\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        num_bytes = 0
        while num_bytes < LARGE:
            num_bytes += len(await reader.readexactly(1_000_000))
            await asyncio.sleep(0.04)
        writer.close()


async def test_nothing_is_left_of_connections_that_were_reset() -> None:
    async with listening() as listener:
        for ended in (b"keep-alive", b"close"):
            reader, writer = await connect(listener)
            writer.write(HEAD + b"Connection: " + ended + b"\r\n\r\n")
            await reader.readuntil(b"hello")
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()  # with that, a reset
        await asyncio.sleep(0.1)
        gc.collect()
        assert not [found for found in gc.get_objects() if type(found) is HttpConnection]


async def test_a_line_of_the_access_log_cannot_be_forged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        async with listening() as listener, httpx.AsyncClient() as client:
            await client.get(f"http://127.0.0.1:{listener.port}/a%0AGET%20/forged")
    (line,) = {record.getMessage() for record in caplog.records if record.name == "ray.serve"}
    assert line.startswith("GET /a%0AGET%20/forged 404 ")
