import json

import pytest

from deployments.local.bench import (
    Level,
    Loop,
    PoolUse,
    Report,
    _pool_use,
    _transfer_bytes,
    parse_levels,
)
from deployments.telemetry.forwards import ReplicaStats
from deployments.telemetry.timelines import StageSeconds
from pyramid_serve.api import Plan
from tests.unit.api.plans_at_hand import SMALL, plan_of

PLAN = plan_of(SMALL, seconds=0.7, size="128x64")


def stats(replica: str, *, forwards: int, slots: int, busy: float) -> ReplicaStats:
    return ReplicaStats(
        replica=replica,
        at=0.0,
        num_forwards=forwards,
        num_slots=slots,
        num_tokens=10 * slots,
        busy_seconds=busy,
        num_present=0,
        queue_depth=0,
    )


def test_levels_are_read() -> None:
    assert parse_levels("1,2, 8") == [1, 2, 8]


@pytest.mark.parametrize("text", ["", "0", "1,x", "-1", "1.5"])
def test_levels_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--concurrency"):
        parse_levels(text)


def test_pool_use_is_the_difference_of_two_looks() -> None:
    before = {"a": stats("a", forwards=10, slots=20, busy=5.0)}
    after = {"a": stats("a", forwards=14, slots=36, busy=7.0), "b": stats("b", forwards=4, slots=8, busy=1.0)}
    use = _pool_use(before, after, wall=3.0)
    assert use == PoolUse(num_replicas=2, busy_share=0.5, mean_pack=3.0, mean_tokens=30.0)


def test_transfers_are_histories_latents_and_frames() -> None:
    latents = 16 * 8 * 16 * 4
    assert _transfer_bytes(PLAN) == (0 + 1 + 2) * latents + 2 * 3 * latents + 17 * 128 * 64 * 3


def test_the_table_sets_each_level_beside_the_loop() -> None:
    use = PoolUse(num_replicas=1, busy_share=0.5, mean_pack=4.0, mean_tokens=100.0)
    level = Level(
        concurrency=8,
        wall=60.0,
        videos_per_minute=8.0,
        latency_p50=30.0,
        latency_p95=58.0,
        time_to_first_frame=3.0,
        real_time_factor=1.5,
        decode_hidden=0.93,
        transfer_bytes=2_000_000,
        transfer_seconds=0.2,
        pools=dict.fromkeys(("TextEncoder", "Denoiser", "Decoder"), use),
        stages=StageSeconds(0.1, 0.2, (1.0, 2.0, 2.0), (0.1, 0.4, 0.4), (0.1, 0.1, 0.1), handover=0.1, join=0.2),
    )
    loop = Loop(num_videos=8, wall=120.0, videos_per_minute=4.0, seconds_per_video=15.0)
    report = Report(model="tiny", size="128x64", num_frames=17, num_steps=9, loop=loop, levels=(level,), plan=PLAN)
    assert "2.00x" in report.to_text()
    assert "93%" in report.to_text()
    written = json.loads(report.to_json())
    assert written["levels"][0]["videos_per_minute"] == 8.0
    assert written["levels"][0]["stages"]["denoise"] == [1.0, 2.0, 2.0]
    assert Plan.model_validate(written["plan"]) == PLAN
