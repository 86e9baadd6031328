"""What the pools of each model do, for ``/v1/status``: asked of their replicas, for all who ask within moments."""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from deployments.http.answer_schema import ModelStatus, PoolStatus
from deployments.rpc.tasks import begin_apart
from deployments.telemetry.forwards import ReplicaStats

logger = logging.getLogger(__name__)

PoolHandles = Mapping[str, Mapping[str, Any]]
"""By model and by part (``text_encoder``, ``denoiser``, ``decoder``): the handle of the deployment. A decoder
that is in the denoiser's replicas is left out."""

_KEPT_S = 2.0
_TIMEOUT_S = 1.5
_SHORTEST_S = 1.0
"""Shares of the time are of at least so long."""


class Pools:
    """Asks the pools at most every two seconds. All calls must come from one event loop."""

    def __init__(self, handles: PoolHandles) -> None:
        self._handles = handles
        self._seen: dict[tuple[str, str], dict[str, ReplicaStats]] = {}
        self._busy: dict[tuple[str, str], float | None] = {}
        self._asking: asyncio.Task[list[ModelStatus]] | None = None
        self._asked_at = float("-inf")

    async def status(self) -> list[ModelStatus]:
        """Each model with its pools. A pool that does not answer in time has no replicas."""
        if self._asking is None or (self._asking.done() and time.monotonic() - self._asked_at > _KEPT_S):
            self._asked_at = time.monotonic()
            self._asking = begin_apart(self._ask())  # so that it does not end with the request that began it
        return await asyncio.shield(self._asking)  # others wait for the same answer

    async def _ask(self) -> list[ModelStatus]:
        keys = [(model, part) for model, parts in self._handles.items() for part in parts]
        found = dict(zip(keys, await asyncio.gather(*(self._ask_pool(*key) for key in keys)), strict=True))
        return [
            ModelStatus(id=model, pools=[found[model, part] for part in parts])
            for model, parts in self._handles.items()
        ]

    async def _ask_pool(self, model: str, part: str) -> PoolStatus:
        try:
            responses = self._handles[model][part].broadcast("stats")
            answers = await responses.results_async(timeout_s=_TIMEOUT_S, return_exceptions=True)
        except Exception as error:  # Serve raises many classes; the next look may find them
            logger.debug("%s of %s does not tell what it does: %r", part, model, error)
            answers = []
        # A replica that ends answers with any exception.
        now = {stats.replica: stats for stats in answers if isinstance(stats, ReplicaStats)}
        before = self._seen.get((model, part))
        if before is None or _seconds_between(before, now) >= _SHORTEST_S:
            self._busy[model, part] = None if before is None else busy_share(before, now)
            self._seen[model, part] = now
        return PoolStatus(
            part=part,  # type: ignore[arg-type]  # the keys are parts
            num_replicas=len(now),
            busy=self._busy[model, part],
            num_ongoing=sum(stats.num_present for stats in now.values()),
        )


def busy_share(before: Mapping[str, ReplicaStats], now: Mapping[str, ReplicaStats]) -> float | None:
    """The share of the time in which replicas computed, 0 to 1, between two looks. None: none was seen twice."""
    shares = []
    for replica, stats in now.items():
        earlier = before.get(replica)
        if earlier is not None and stats.at > earlier.at:
            shares.append((stats.busy_seconds - earlier.busy_seconds) / (stats.at - earlier.at))
    return min(max(sum(shares) / len(shares), 0.0), 1.0) if shares else None


def _seconds_between(before: Mapping[str, ReplicaStats], now: Mapping[str, ReplicaStats]) -> float:
    """Infinite where no replica was seen twice, so that the next look counts from this one."""
    return min((now[name].at - before[name].at for name in now.keys() & before.keys()), default=float("inf"))
