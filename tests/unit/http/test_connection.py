"""Connections to the ingress's own HTTP server, of clients that are slow, endless or many."""

import asyncio
import gc
import socket
import struct
import time

import httpx
import pytest

from deployments.http.connection import Connection
from tests.unit.http.listener_at_hand import HEAD, LARGE, POST, all_of, connect, listening, new_app, until

pytestmark = pytest.mark.asyncio


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
        assert not [found for found in gc.get_objects() if type(found) is Connection]
