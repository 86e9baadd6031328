import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from deployments.planning.bench_times import Bench, read_bench, times_of_bench
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
        "videos_per_minute": 0.6 * concurrency,
        "latency_p95": 100.0,
        "time_to_first_frame": 10.0,
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


def bench(*levels: int) -> Bench:
    return Bench.model_validate(report(*levels))


def test_the_times_of_a_bench_are_those_that_made_it() -> None:
    times = times_of_bench(bench(4, 1), FAMILY, source="bench.json")
    assert times.num_text_tokens == TEXT
    assert times.forward_fixed_s == pytest.approx(FIXED_S)
    assert times.unit_s == pytest.approx(UNIT_S)
    assert times.token_s == pytest.approx(TOKEN_S)
    assert times.decode_fixed_s == pytest.approx(0.05)
    assert times.pixel_s == pytest.approx(0.1 / (8 * 128 * 64))
    assert times.first_pixel_s == pytest.approx(0.1 / (128 * 64))
    assert (times.begin_s, times.encode_s, times.handover_s, times.join_s) == (0.1, 0.2, 0.03, 0.4)


def test_one_level_says_nothing_of_packs() -> None:
    times = times_of_bench(bench(1), FAMILY, source="bench.json")
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


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        (("levels",), [], "levels: "),
        (("levels", 0, "concurrency"), None, "levels.0.concurrency: "),
        (("levels", 0, "concurrency"), 0, "levels.0.concurrency: "),
        (("levels", 0, "wall"), 0, "levels.0.wall: "),
        (("levels", 0, "latency_p95"), math.nan, "levels.0.latency_p95: "),
        (("levels", 0, "pools", "Denoiser", "mean_pack"), 0, "pools.Denoiser.mean_pack=0: must be at least 1"),
        (("levels", 0, "pools", "Decoder", "mean_pack"), 0, "pools.Decoder.mean_pack=0: must be at least 1"),
        (("levels", 0, "pools", "Denoiser", "busy_share"), None, "levels.0.pools.Denoiser.busy_share: "),
        (("levels", 0, "pools", "Denoiser", "num_replicas"), 10**9, "levels.0.pools.Denoiser.num_replicas: "),
        (("levels", 0, "stages", "save"), None, "levels.0.stages.save: "),
        (("levels", 0, "stages", "encode"), "1", "levels.0.stages.encode: "),
        (("levels", 0, "stages", "encode"), -1, "levels.0.stages.encode: "),
        (("levels", 0, "stages", "encode"), 1e300, "levels.0.stages.encode: "),
        (("levels", 0, "stages", "encode"), math.inf, "levels.0.stages.encode: "),
        (("levels", 0, "stages", "decode"), [], "levels.0.stages.decode: 0 times, but the plan has 4 units"),
        (("levels", 0, "stages", "denoise"), [1.0] * 9, "levels.0.stages.denoise: 9 times, but the plan has 4 units"),
        (("levels", 0, "stages", "denoise"), [0.0] * 4, "levels.0.stages: denoising and decoding must take some time"),
        (("plan", "width"), 0, "plan: of 0x64 pixels"),
        (("plan", "units"), [], "plan.units: "),
    ],
)
def test_a_damaged_file_is_refused_in_a_line(
    path: tuple[str | int, ...], value: object, where: str, tmp_path: Path
) -> None:
    content: Any = report(1)
    *folders, last = path
    of = content
    for key in folders:
        of = of[key]
    of[last] = value
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(where)) as caught:
        read_bench(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b'{"levels": ['])
def test_what_is_not_json_is_refused_in_a_line(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="not the JSON that pyramid-serve bench") as caught:
        read_bench(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{}, {"num_inference_steps": "x"}, {"num_inference_steps": [0, 0, 0]}])
def test_a_plan_that_its_family_does_not_make_is_refused(settings: dict[str, Any]) -> None:
    content = report(1)
    content["plan"]["settings"] = settings
    with pytest.raises(ValueError, match=r"bench\.json: its plan is not one that the family Pyramid Flow makes"):
        times_of_bench(Bench.model_validate(content), FAMILY, source="bench.json")
