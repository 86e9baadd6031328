"""A cable between a browser and a server that can be pulled out: every connection breaks, and none can be made."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

from deployments.local.cluster import free_port
from tests.in_a_thread import in_a_thread


class Cable:
    """A relay of TCP connections to a server."""

    def __init__(self, target: str) -> None:
        self._host, port = target.removeprefix("http://").split(":")
        self._port = int(port)
        self._own_port = free_port()
        self.url = f"http://127.0.0.1:{self._own_port}"
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._loop: asyncio.AbstractEventLoop

    def pull(self) -> None:
        asyncio.run_coroutine_threadsafe(self._pull(), self._loop).result(10)

    def plug_in(self) -> None:
        asyncio.run_coroutine_threadsafe(self._plug_in(), self._loop).result(10)

    async def _plug_in(self) -> None:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", self._own_port)

    async def _pull(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            to_server = await asyncio.open_connection(self._host, self._port)
            await asyncio.gather(self._copy(reader, to_server[1]), self._copy(to_server[0], writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with suppress(OSError):
            while received := await reader.read(65536):
                writer.write(received)
                await writer.drain()
        writer.close()
        self._writers.discard(writer)


@contextmanager
def cable_to(target: str) -> Iterator[Cable]:
    """A cable to the server at a URL, plugged in, for as long as the block runs."""
    cable = Cable(target)

    async def relay(until_over: Callable[[], Awaitable[None]]) -> None:
        cable._loop = asyncio.get_running_loop()
        await cable._plug_in()
        await until_over()
        await cable._pull()

    with in_a_thread(relay):
        yield cable
