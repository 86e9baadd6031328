"""Look at a long queue as clients do: how long a look and a submission take while many wait.

``python -m benchmarks.long_queue http://127.0.0.1:8000 --waiting 1000 --clients 300`` asks a server that runs, such as
``pyramid-serve up --config FILE`` with ``claims.settings.max_queued`` large enough. What it submits is deleted at the
end.
"""

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Sequence

import aiohttp  # an httpx client of 300 connections takes more of the processor than the server

REQUEST = {"prompt": "a red circle", "seconds": "1"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("url")
    parser.add_argument("--waiting", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=300, help="each looks once a second")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--submits", type=int, default=500, help="more videos that are submitted as fast as they go")
    asyncio.run(measure(parser.parse_args(arguments)))


async def measure(given: argparse.Namespace) -> None:
    connections = aiohttp.TCPConnector(limit=400)
    async with aiohttp.ClientSession(given.url, connector=connections, raise_for_status=True) as client:
        started = time.monotonic()
        ids = await submitted(client, given.waiting, at_once=16)
        print(f"{len(ids)} submitted, {len(ids) / (time.monotonic() - started):.0f} a second")
        until = time.monotonic() + given.seconds
        times = await asyncio.gather(*(looks(client, ids, until) for _ in range(given.clients)))
        seconds = sorted(second for one in times for second in one)
        p50, p95 = statistics.median(seconds), seconds[int(0.95 * len(seconds))]
        rate = len(seconds) / given.seconds
        print(f"{rate:.0f} looks a second: p50 {p50:.3f} s, p95 {p95:.3f} s, longest {seconds[-1]:.3f} s")
        started = time.monotonic()
        ids += await submitted(client, given.submits, at_once=16)
        print(f"{given.submits} more submitted, {given.submits / (time.monotonic() - started):.0f} a second")
        for video_id in ids:
            async with client.delete(f"/v1/videos/{video_id}"):
                pass


async def submitted(client: aiohttp.ClientSession, number: int, *, at_once: int) -> list[str]:
    places = asyncio.Semaphore(at_once)

    async def submit() -> str:
        async with places, client.post("/v1/videos", json=REQUEST) as answer:
            return str((await answer.json())["id"])

    return await asyncio.gather(*(submit() for _ in range(number)))


async def looks(client: aiohttp.ClientSession, ids: Sequence[str], until: float) -> list[float]:
    """Look at one of the videos once a second, as SDKs do, and return how long each look took."""
    await asyncio.sleep(random.random())
    video_id = random.choice(ids)
    seconds = []
    while time.monotonic() < until:
        started = time.monotonic()
        async with client.get(f"/v1/videos/{video_id}") as answer:
            await answer.read()
        seconds.append(time.monotonic() - started)
        await asyncio.sleep(max(1.0 - seconds[-1], 0.0))
    return seconds


if __name__ == "__main__":
    main()
