"""How much of a core claims takes for each update of a running video: where the control plane ends.

``python -m benchmarks.claims --videos 50 200 400`` starts a Ray of its own, with the real claims and orchestrators that
make nothing: each tells its lease of a step, as the real ones do, every half second.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import psutil
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.claims.config import ClaimsConfig
from deployments.claims.deployment import Claims
from deployments.orchestrator.lease import Lease
from pyramid_serve.api import RequestLimits, new_record, parse_request
from pyramid_serve.families import family_of
from pyramid_serve.served_model import ServedModel

STEP_S = 0.5


class Orchestrator:
    """Holds every video that it is given, and tells of a step each half second."""

    def __init__(self, claims: DeploymentHandle[Any]) -> None:
        self._claims = claims

    async def run(self, video_id: str) -> None:
        record = await self._claims.claim.remote(video_id, "nobody", video_id)
        if record is not None:
            lease = Lease(record, self._claims, heartbeat_s=1.0)
            await asyncio.gather(lease.keep(), self._tell(lease))

    async def stop(self, video_id: str) -> None:
        pass

    async def _tell(self, lease: Lease) -> None:
        step = 0
        while True:
            await asyncio.sleep(STEP_S)
            step += 1
            lease.tell(has_started=True, num_steps_done=step)


class CountedClaims(Claims):
    """Counts updates, and the processor time of its process."""

    num_updates = 0

    async def update(self, *arguments: Any) -> bool:
        CountedClaims.num_updates += 1
        return await super().update(*arguments)

    async def used(self) -> tuple[int, float]:
        times = psutil.Process().cpu_times()
        return CountedClaims.num_updates, times.user + times.system


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--videos", type=int, nargs="+", default=[50, 200, 400])
    parser.add_argument("--seconds", type=float, default=15.0)
    given = parser.parse_args(arguments)
    ray.init(address="local", log_to_driver=False, include_dashboard=False, num_cpus=4)
    for num_videos in given.videos:
        with tempfile.TemporaryDirectory() as storage:
            print(json.dumps(asyncio.run(measure(storage, num_videos, given.seconds))), flush=True)
    ray.shutdown()


async def measure(storage: str, num_videos: int, seconds: float) -> dict[str, float]:
    config = ClaimsConfig(max_running=num_videos, max_queued=num_videos + 1)
    claims = serve.deployment(CountedClaims).options(
        name="Claims", max_ongoing_requests=100_000, ray_actor_options={"num_cpus": 0}
    )
    app = serve.deployment(Orchestrator).options(max_ongoing_requests=100_000, ray_actor_options={"num_cpus": 0})
    serve.run(app.bind(claims.bind(storage, config)), name="claims", route_prefix=None)
    handle = serve.get_deployment_handle("Claims", "claims")
    family = family_of("shapes")
    model = ServedModel("shapes", family, family.capabilities("shapes", None), RequestLimits())
    records = [new_record(model.plan(parse_request({"prompt": "a"}))) for _ in range(num_videos)]
    await handle.submit.remote(records)
    await asyncio.sleep(10.0)  # until all are handed out
    before, started = await handle.used.remote(), time.monotonic()
    waits = []
    while time.monotonic() - started < seconds:
        asked = time.monotonic()
        await handle.queue.remote()
        waits.append(time.monotonic() - asked)
        await asyncio.sleep(0.1)
    after, passed = await handle.used.remote(), time.monotonic() - started
    running = (await handle.queue.remote()).num_in_progress
    serve.delete("claims")
    num_updates, used_s = after[0] - before[0], after[1] - before[1]
    return {
        "videos": running,
        "updates_a_second": num_updates / passed,
        "share_of_a_core": used_s / passed,
        "core_ms_an_update": 1000 * used_s / max(num_updates, 1),
        "wait_p50_s": sorted(waits)[len(waits) // 2],
        "wait_p95_s": sorted(waits)[int(0.95 * len(waits))],
    }


if __name__ == "__main__":
    main()
