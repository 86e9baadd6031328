import json
from pathlib import Path
from typing import Any

import pytest

from deployments.planning.bench_times import read_bench, times_of_bench
from pyramid_serve.pyramid_flow.family import FAMILY
from tests.unit.api.plans_at_hand import SMALL, plan_of

PLAN = plan_of(SMALL, seconds=1.0, size="128x64")
TEXT, FIXED_S, UNIT_S, TOKEN_S = 7, 0.004, 0.001, 0.0001
RUNS = [FAMILY.step_runs(PLAN, unit, num_text_tokens=TEXT) for unit in range(PLAN.num_units)]
NUM_STEPS = sum(run.num_steps for runs in RUNS for run in runs)
NUM_TOKENS = sum(run.num_steps * sum(run.sequence_tokens) for runs in RUNS for run in runs)


def level(concurrency: int) -> dict[str, Any]:
    """What bench would write, were forwards to take just what the constants say, and all videos in step."""
    denoise = [
        sum(run.num_steps * (FIXED_S + UNIT_S + TOKEN_S * sum(run.sequence_tokens)) for run in runs) for runs in RUNS
    ]
    busy_s = NUM_STEPS * (FIXED_S + concurrency * UNIT_S) + concurrency * NUM_TOKENS * TOKEN_S
    num_units = PLAN.num_units
    decode_s = num_units * (0.05 + concurrency * 0.1) + concurrency * 0.0
    return {
        "concurrency": concurrency,
        "wall": 100.0,
        "stages": {
            "begin": 0.1,
            "encode": 0.2,
            "denoise": denoise,
            "decode": [0.15] * num_units,
            "save": [0.01] * num_units,
            "handover": 0.03,
            "join": 0.4,
        },
        "pools": {
            "Denoiser": {
                "num_replicas": 1,
                "busy_share": busy_s / 100.0,
                "mean_pack": float(concurrency),
                "mean_tokens": concurrency * NUM_TOKENS / NUM_STEPS,
            },
            "Decoder": {
                "num_replicas": 1,
                "busy_share": decode_s / 100.0,
                "mean_pack": float(concurrency),
                "mean_tokens": 0.0,
            },
        },
    }


def report(*levels: int) -> dict[str, Any]:
    return {"plan": PLAN.model_dump(mode="json"), "levels": [level(each) for each in levels]}


def test_the_times_of_a_bench_are_those_that_made_it() -> None:
    times = times_of_bench(report(4, 1), FAMILY, source="bench.json")
    assert times.num_text_tokens == TEXT
    assert times.forward_fixed_s == pytest.approx(FIXED_S)
    assert times.unit_s == pytest.approx(UNIT_S)
    assert times.token_s == pytest.approx(TOKEN_S)
    assert times.decode_fixed_s == pytest.approx(0.05)
    assert times.pixel_s == pytest.approx(0.1 / (8 * 128 * 64))
    assert times.first_pixel_s == pytest.approx(0.1 / (128 * 64))
    assert (times.begin_s, times.encode_s, times.handover_s, times.join_s) == (0.1, 0.2, 0.03, 0.4)


def test_one_level_says_nothing_of_packs() -> None:
    times = times_of_bench(report(1), FAMILY, source="bench.json")
    assert times.forward_fixed_s == 0.0
    assert times.unit_s == pytest.approx(FIXED_S + UNIT_S)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    with pytest.raises(ValueError, match=r"bench\.json: cannot be read"):
        read_bench(path)
    for content in ("", "[]", "{}", json.dumps({"levels": [{"pools": {}}], "plan": {}})):
        path.write_text(content)
        with pytest.raises(ValueError, match="not the JSON that pyramid-serve bench of this release writes"):
            read_bench(path)


def test_an_app_without_decoders_is_refused(tmp_path: Path) -> None:
    shared = report(1)
    del shared["levels"][0]["pools"]["Decoder"]
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(shared))
    with pytest.raises(ValueError, match="decodes in the denoiser's replicas"):
        read_bench(path)
