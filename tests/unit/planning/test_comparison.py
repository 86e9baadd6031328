"""The simulation beside a bench that was run on two CPU cores; docs/planning.md tells how."""

from pathlib import Path

import pytest

from deployments.planning.bench_times import read_bench, times_of_bench
from deployments.planning.comparison import Compared, compare, to_text
from deployments.planning.simulation import Layout
from pyramid_serve.pyramid_flow.family import FAMILY

BENCH = read_bench(Path(__file__).parent / "bench.json")
TIMES = times_of_bench(BENCH, FAMILY, source="bench.json")


@pytest.fixture(scope="module")
def compared() -> dict[int, Compared]:
    return {one.concurrency: one for one in compare(BENCH, TIMES, FAMILY, Layout())}


@pytest.mark.parametrize("concurrency", [1, 2, 4, 8])
def test_a_simulated_bench_is_near_the_measured_one(concurrency: int, compared: dict[int, Compared]) -> None:
    """Levels 2 and 4 have no part in the times."""
    assert abs(compared[concurrency].throughput_error) < 0.1
    assert abs(compared[concurrency].p95_error) < 0.25


def test_the_table_has_both(compared: dict[int, Compared]) -> None:
    lines = to_text(list(compared.values())).splitlines()
    assert len(lines) == 1 + len(BENCH.levels)
    assert f"{compared[8].measured_per_minute:.2f} {compared[8].simulated_per_minute:.2f}" in lines[-1]
