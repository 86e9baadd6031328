import statistics
from dataclasses import replace

import pytest

from deployments.planning.simulation import Layout
from deployments.planning.sizing import Demand, alone_s, fill, quantile, size, try_layout
from tests.unit.planning.work_at_hand import TIMES, video

WORK = video(4, num_steps=10, step_s=0.25, decode_s=0.5, save_s=0.05)
ALONE_S = 4 * 2.5 + 0.5 + 0.05


def demand(videos_per_s: float, p95_s: float = 3 * ALONE_S) -> Demand:
    return Demand((WORK,), videos_per_s, p95_s)


def test_a_quantile_is_the_value_that_so_many_do_not_exceed() -> None:
    values = [float(number) for number in range(20, 0, -1)]
    assert (quantile(values, 0.5), quantile(values, 0.95), quantile(values, 1.0)) == (10.0, 19.0, 20.0)


def test_alone_is_the_latency_without_others() -> None:
    assert alone_s(WORK, TIMES) == pytest.approx(ALONE_S)


def test_a_plan_has_the_fewest_denoisers_that_are_fast_enough() -> None:
    sized = size(demand(0.5), TIMES, Layout())
    assert sized.is_fast_enough
    assert sized.layout.num_denoisers >= 0.5 * 10  # the work of half a video a second
    fewer = replace(sized.layout, num_denoisers=sized.layout.num_denoisers - 1)
    assert not try_layout(sized.demand, TIMES, fewer).is_fast_enough


def test_a_plan_has_the_decoders_that_its_videos_take() -> None:
    slow = video(4, num_steps=1, step_s=0.25, decode_s=2.0)
    sized = size(Demand((slow,), 0.5, 60.0), TIMES, Layout())
    assert sized.layout.num_decoders >= 4
    assert sized.layout.num_decoders > sized.layout.num_denoisers


def test_a_tighter_limit_takes_more_gpus() -> None:
    loose, tight = size(demand(0.3), TIMES, Layout()), size(demand(0.3, 1.2 * ALONE_S), TIMES, Layout())
    assert tight.num_gpus > loose.num_gpus


def test_a_limit_below_a_video_alone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--p95 5: not reached .* 10\.\d s alone"):
        size(demand(0.1, 5.0), TIMES, Layout())


def test_more_videos_at_once_than_claims_lets_run_raise_its_limit() -> None:
    assert size(demand(0.1), TIMES, Layout()).layout.max_running == 32
    assert size(demand(4.0), TIMES, Layout()).layout.max_running > 32


def test_so_many_gpus_are_filled_and_no_more() -> None:
    filled = fill(12, demand(1.0), TIMES, Layout())
    assert filled.num_gpus == 12
    assert filled.is_fast_enough
    work = filled.demand.videos_per_s * 10.0 / filled.layout.num_denoisers
    assert 0.6 < work < 1.0


def test_one_gpu_holds_all_pools() -> None:
    filled = fill(1, demand(1.0, 6 * ALONE_S), TIMES, Layout())
    assert filled.num_gpus == 1
    assert filled.layout.on_one_device
    assert 0.3 / 12 < filled.demand.videos_per_s < 1 / 12


@pytest.mark.parametrize("num_gpus", [0, 2])
def test_two_gpus_are_no_layout(num_gpus: int) -> None:
    with pytest.raises(ValueError, match=f"--gpus {num_gpus}"):
        fill(num_gpus, demand(1.0), TIMES, Layout())


def test_a_large_pool_is_simulated_by_a_part_of_it() -> None:
    layout = Layout(num_denoisers=1000, num_decoders=250, num_save_cores=100, max_running=4000)
    sized = try_layout(demand(75.0), TIMES, layout)
    assert 20 <= sized.num_parts <= 40
    assert sized.layout.num_denoisers == 1000
    assert sized.is_fast_enough
    assert sized.mean_running > 800


@pytest.mark.parametrize(("num_denoisers", "num_decoders"), [(850, 149), (86, 13), (40, 9), (3, 1)])
def test_a_part_has_nearly_as_many_decoders_for_its_denoisers(num_denoisers: int, num_decoders: int) -> None:
    layout = Layout(num_denoisers=num_denoisers, num_decoders=num_decoders, max_running=4000)
    num_parts = try_layout(demand(0.01 * num_denoisers), TIMES, layout).num_parts
    denoisers, decoders = round(num_denoisers / num_parts), round(num_decoders / num_parts)
    assert decoders / denoisers == pytest.approx(num_decoders / num_denoisers, rel=0.03)
    assert denoisers <= 100


@pytest.mark.parametrize("num_denoisers", [8, 200])
def test_as_many_videos_are_at_once_as_littles_law_says(num_denoisers: int) -> None:
    layout = Layout(num_denoisers=num_denoisers, num_decoders=num_denoisers // 4, num_save_cores=20, max_running=4000)
    at_rate = demand(0.08 * num_denoisers)
    sized = try_layout(at_rate, TIMES, layout, num_counted=1000)
    latency_s = statistics.mean(video.latency_s for video in sized.simulated.videos)
    assert sized.mean_running == pytest.approx(at_rate.videos_per_s * latency_s, rel=0.06)


def test_a_plan_holds_for_arrivals_that_it_was_not_made_by() -> None:
    sized = size(demand(2.0), TIMES, Layout())
    p95 = [
        try_layout(sized.demand, TIMES, sized.layout, seed=seed, num_counted=2000).latency(0.95) for seed in (7, 8, 9)
    ]
    assert statistics.median(p95) <= 1.05 * sized.demand.latency_p95_s
