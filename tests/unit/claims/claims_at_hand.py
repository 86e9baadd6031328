"""A claims deployment without Ray Serve, over a storage in a folder and orchestrators that only take notes."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from deployments.claims.config import ClaimsConfig
from deployments.claims.deployment import Claims
from pyramid_serve.api import VideoError, VideoRecord, new_record
from tests.unit.api.plans_at_hand import record_of

PLAN = record_of(seed=1, seconds=1).plan
QUICK: dict[str, Any] = {"lease_s": 60.0, "sweep_interval_s": 0.05, "backoff_s": 0.01}
BROKEN = VideoError(code="server_error", message="ValueError: broken")


class FakeOrchestrators:
    """Notes which videos it is given; a run ends when it is let go."""

    def __init__(self) -> None:
        self.given: list[str] = []
        self.stopped: list[str] = []
        self.ends: dict[str, asyncio.Future[None]] = {}

    async def run(self, video_id: str) -> None:
        self.given.append(video_id)
        self.ends[video_id] = asyncio.get_running_loop().create_future()
        await self.ends[video_id]

    async def stop(self, video_id: str) -> None:
        self.stopped.append(video_id)

    async def are_ready(self) -> bool:
        return True


@asynccontextmanager
async def claims_of(
    root: Path | str, orchestrators: FakeOrchestrators, *, app: str = "app", **settings: Any
) -> AsyncIterator[Claims]:
    """Claims, which is killed at the end of the block."""
    claims = Claims.__new__(Claims)
    config = ClaimsConfig(**{**QUICK, **settings})
    await claims.__init__(str(root), config, orchestrators=orchestrators, app=app)  # type: ignore[misc]
    try:
        yield claims
    finally:
        kill(claims)


def kill(claims: Claims) -> None:
    """As if the process had been killed."""
    for task in (*claims._sweep._loops, *claims._sweep._runs.values()):
        task.cancel()


async def eventually(condition: Callable[[], bool], *, within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.01)


async def submitted(claims: Claims, **fields: Any) -> VideoRecord:
    return await submitted_as(claims, new_record(PLAN, **fields))


async def submitted_as(claims: Claims, record: VideoRecord) -> VideoRecord:
    """What claims makes of a record. Raises what it returns as an error."""
    (result,) = await claims.submit([record])
    if isinstance(result, Exception):
        raise result
    return result.record


async def claimed(claims: Claims, video_id: str, owner: str = "a") -> VideoRecord:
    record = await claims.claim(video_id, owner, uuid4().hex)
    assert record is not None
    return record


def end_lease(claims: Claims, video_id: str) -> None:
    """As if its owner had been silent for so long."""
    claims._ledger._leases[video_id] = 0
