from collections.abc import Iterable
from itertools import count

import pytest

from deployments.planning.simulation import Layout, Simulated, simulate
from deployments.planning.stage_times import StageTimes, VideoWork
from tests.unit.planning.work_at_hand import TIMES, times, video


def run(*videos: VideoWork, at: Iterable[float] | None = None, by: StageTimes = TIMES, **layout: int) -> Simulated:
    arrivals = [0.0] * len(videos) if at is None else list(at)
    return simulate(iter(list(zip(arrivals, videos, strict=True))), by, Layout(**layout))


def latencies(simulated: Simulated) -> list[float]:
    return [one.latency_s for one in simulated.videos]


def test_a_video_alone_takes_its_denoising_and_the_last_units_decoding() -> None:
    by = times(begin_s=0.5, encode_s=0.25, handover_s=0.125, join_s=1.0)
    (one,) = run(video(3), by=by).videos
    assert one.wait_s == pytest.approx(0.75)
    assert one.first_frame_s == pytest.approx(0.75 + 1.0 + 0.25 + 0.125)
    assert one.latency_s == pytest.approx(0.75 + 3 * 1.0 + 2 * 0.125 + 0.25 + 0.125 + 1.0)


def test_decoding_that_is_slower_than_denoising_sets_the_pace() -> None:
    (one,) = run(video(3, decode_s=2.0)).videos
    assert one.latency_s == pytest.approx(1.0 + 3 * 2.0 + 0.125)


def test_units_are_not_decoded_far_ahead_of_what_is_saved() -> None:
    simulated = run(video(8, num_steps=1, step_s=0.01, decode_s=0.01, save_s=1.0), num_save_cores=1)
    (one,) = simulated.videos
    assert one.latency_s == pytest.approx(8.0, abs=0.1)
    assert simulated.pools["Decoder"].busy_share == pytest.approx(0.08 / one.latency_s)


def test_videos_that_fit_a_forward_share_what_is_fixed_of_it() -> None:
    fixed = times(forward_fixed_s=1.0, begin_s=0.125)
    alone = run(video(2, step_s=0.5), by=fixed)
    together = run(*[video(2, step_s=0.5)] * 3, by=fixed)
    assert alone.videos[0].latency_s == pytest.approx(4 * 1.5 + 0.5)
    assert together.pools["Denoiser"].mean_pack == 3
    assert max(latencies(together)) == pytest.approx(0.125 + 4 * (1.0 + 3 * 0.5) + 3 * 0.25 + 0.125 * 2)


def test_a_forward_takes_no_less_than_its_floor() -> None:
    assert latencies(run(video(1, step_s=0.01), by=times(forward_floor_s=1.0))) == [pytest.approx(2.375)]


def test_units_that_do_not_fit_the_budget_together_take_turns() -> None:
    simulated = run(*[video(1, num_steps=10)] * 2, token_budget=150)
    assert simulated.pools["Denoiser"].mean_pack == 1
    # The oldest goes first, but for a turn of the other after each five.
    assert min(latencies(simulated)) == pytest.approx(10 * 0.5 + 1 * 0.5 + 0.375)
    assert max(latencies(simulated)) == pytest.approx(20 * 0.5 + 0.375)


def test_a_video_that_comes_during_a_forward_joins_the_next() -> None:
    by = times(forward_fixed_s=1.0)
    simulated = run(video(1, num_steps=3, step_s=0.0), video(1, num_steps=1, step_s=0.0), at=[0.0, 0.25], by=by)
    first, second = simulated.videos
    assert second.begun == pytest.approx(1.0)
    assert (first.latency_s, second.latency_s) == (pytest.approx(3.375), pytest.approx(2.0 - 0.25 + 0.375))


def test_videos_past_the_limit_wait_for_the_end_of_those_before() -> None:
    simulated = run(*[video(1)] * 3, max_running=1)
    assert [one.wait_s for one in simulated.videos] == [pytest.approx(index * 1.375) for index in range(3)]
    assert simulated.most_running == 1


def test_pools_on_one_device_take_turns() -> None:
    apart = run(*[video(4, decode_s=1.0)] * 4).videos
    shared = run(*[video(4, decode_s=1.0)] * 4, on_one_device=True).videos
    assert max(one.latency_s for one in apart) < max(one.latency_s for one in shared)
    assert max(one.ended or 0.0 for one in shared) >= 4 * 4 * (2 * 0.5 + 1.0)


def test_a_decoder_decodes_again_what_it_does_not_remember() -> None:
    kept = run(*[video(4)] * 2, memories_on_device=2)
    moved = run(*[video(4)] * 2, by=times(memory_move_s=1.0), memories_on_device=1, memories_in_host=1)
    lost = run(*[video(4)] * 2, memories_on_device=1, memories_in_host=0)
    assert (kept.num_rebuilt, moved.num_rebuilt) == (0, 0)
    assert lost.num_rebuilt > 0
    assert max(latencies(moved)) > max(latencies(kept))


def test_the_same_seed_gives_the_same_times() -> None:
    def once(seed: int) -> list[float]:
        videos = [(0.1 * index, video()) for index in range(40)]
        return latencies(simulate(iter(videos), TIMES, Layout(num_denoisers=3, num_decoders=2), seed=seed))

    assert once(1) == once(1)
    assert once(1) != once(2)


def test_only_videos_of_the_time_that_counts_are_told_of_while_others_go_on_coming() -> None:
    arrivals = ((float(second), video(1)) for second in count())
    simulated = simulate(arrivals, TIMES, Layout(num_denoisers=2), counted_from=5.0, counted_until=9.0)
    assert [one.arrived for one in simulated.videos] == [5.0, 6.0, 7.0, 8.0]


def test_an_app_that_falls_behind_is_given_up() -> None:
    arrivals = ((0.1 * number, video(3)) for number in count())
    simulated = simulate(arrivals, TIMES, Layout(), counted_until=100.0, give_up_at=150.0)
    assert simulated.num_unfinished > 0
    assert simulated.wall_s < 151.0


def test_time_never_goes_back_where_the_times_of_a_bench_are_those_of_larger_videos() -> None:
    by = times(forward_fixed_s=-1.0, decode_fixed_s=-1.0)
    simulated = run(*[video(2, step_s=0.5)] * 2, at=[0.0, 0.0], by=by)
    assert all(one.latency_s >= one.first_frame_s >= one.wait_s >= 0 for one in simulated.videos)
