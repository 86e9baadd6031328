"""The ingress's own HTTP server."""

import asyncio
import logging
import os
import resource
import socket
import time

import httpx
import pytest

from deployments.http.listener import Listener, ListenOptions
from deployments.local.cluster import free_port
from tests.unit.http.listener_at_hand import all_of, connect, listening, new_app

pytestmark = pytest.mark.asyncio


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


async def test_a_line_of_the_access_log_cannot_be_forged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        async with listening() as listener, httpx.AsyncClient() as client:
            await client.get(f"http://127.0.0.1:{listener.port}/a%0AGET%20/forged")
    (line,) = {record.getMessage() for record in caplog.records if record.name == "ray.serve"}
    assert line.startswith("GET /a%0AGET%20/forged 404 ")


async def test_more_files_may_be_open_than_connections() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = max(int(name) for name in os.listdir("/dev/fd")) + 100  # other tests of this process may hold many files
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        async with listening(max_connections=few + 100):
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > few + 100
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_connections_leave_files_to_the_app_where_few_may_be_open(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (20, 20))
    async with listening() as listener:
        held = [await connect(listener) for _ in range(10)]
        await asyncio.sleep(0.05)
        reader, writer = await connect(listener)
        assert (await all_of(reader)).startswith(b"HTTP/1.1 503 ")
        for _, other in (*held, (reader, writer)):
            other.close()
    assert "connections.max_connections=5000: at most 10" in caplog.text
