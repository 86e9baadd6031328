"""How many replicas a demand takes: the fewest that a simulation finds fast enough."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from deployments.planning.simulation import Layout, Simulated, simulate
from deployments.planning.stage_times import StageTimes, VideoWork

MOST_SIMULATED = 32
"""Denoisers. Of more, a part is simulated with its part of the videos, since a larger pool never waits longer."""
_MOST_BUSY = 0.9
"""The share of the time that the work of a pool may take, packed as well as can be."""
_SAVE_BUSY = 0.6
_MOST_GROWTH = 64.0
_MOST_GROWN = 20
_MORE_DECODERS = (0.7, 1.0, 1.5, 2.2, 3.0)
_FEWEST_COUNTED = 200
"""Videos of a simulation by which layouts are compared."""
NUM_CONFIRMING = 1000
"""Videos of each of the three that confirm the layout that was found, with arrivals that it was not chosen by."""
_NUM_CONFIRMATIONS = 3


@dataclass(frozen=True)
class Demand:
    """What is asked for: videos a second, each of the kinds equally often, and how fast nineteen of twenty must be."""

    kinds: tuple[VideoWork, ...]
    videos_per_s: float
    latency_p95_s: float

    @property
    def denoise_s(self) -> float:
        """Of one video, as the mean over the kinds; so the others."""
        return statistics.mean(kind.denoise_s for kind in self.kinds)

    @property
    def decode_s(self) -> float:
        return statistics.mean(kind.decode_s for kind in self.kinds)

    @property
    def save_s(self) -> float:
        return statistics.mean(kind.save_s for kind in self.kinds)


@dataclass(frozen=True)
class Sized:
    """A layout, and what a simulation of it (or of one of ``num_parts`` equal parts of it) came to."""

    layout: Layout
    demand: Demand
    simulated: Simulated
    num_parts: int

    @property
    def is_fast_enough(self) -> bool:
        return not self.simulated.num_unfinished and self.latency(0.95) <= self.demand.latency_p95_s

    def latency(self, share: float) -> float:
        return quantile([video.latency_s for video in self.simulated.videos], share)

    def wait(self, share: float) -> float:
        return quantile([video.wait_s for video in self.simulated.videos], share)

    def first_frame(self, share: float) -> float:
        return quantile([video.first_frame_s for video in self.simulated.videos], share)

    @property
    def num_gpus(self) -> int:
        layout = self.layout
        return 1 if layout.on_one_device else layout.num_text_encoders + layout.num_denoisers + layout.num_decoders

    @property
    def text_busy_share(self) -> float:
        """Of the text encoders, of which every part that is simulated has at least one."""
        num_simulated = self.num_parts * math.ceil(self.layout.num_text_encoders / self.num_parts)
        return self.simulated.pools["TextEncoder"].busy_share * num_simulated / self.layout.num_text_encoders

    @property
    def mean_running(self) -> float:
        return self.simulated.mean_running * self.num_parts


def quantile(values: Sequence[float], share: float) -> float:
    """The least value that at least this share of the values does not exceed; 0 for none."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)] if ordered else 0.0


def alone_s(kind: VideoWork, times: StageTimes) -> float:
    """The latency of a video that meets no other."""
    (video,) = simulate(iter([(0.0, kind)]), times, Layout()).videos
    return video.latency_s


def size(demand: Demand, times: StageTimes, layout: Layout, *, seed: int = 0) -> Sized:
    """The fewest replicas that are fast enough; ``layout`` has the settings. Raises ``ValueError`` where none are.

    All pools are grown together until they are fast enough; then decoders, and after them denoisers, are taken away
    again as long as they are.
    """
    fastest_s = min(alone_s(kind, times) for kind in demand.kinds)
    least = _least(demand, times, layout)
    sized = try_layout(demand, times, least, seed=seed)
    factor = 1.0
    while not sized.is_fast_enough:
        factor *= 1.25
        if factor > _MOST_GROWTH or demand.latency_p95_s < fastest_s:
            raise ValueError(
                f"--p95 {demand.latency_p95_s:.3g}: not reached by any number of replicas; a video takes "
                f"{fastest_s:.3g} s alone"
            )
        grown = replace(
            least,
            num_denoisers=math.ceil(factor * least.num_denoisers),
            num_decoders=math.ceil(factor * least.num_decoders),
            num_save_cores=math.ceil(factor * least.num_save_cores),
            max_running=math.ceil(factor * least.max_running),
        )
        sized = try_layout(demand, times, grown, seed=seed)
    for pool in ("num_decoders", "num_denoisers"):
        sized = _without_spare(sized, pool, times, seed=seed)
    return _confirmed(sized, times, seed=seed)


def _confirmed(sized: Sized, times: StageTimes, *, seed: int) -> Sized:
    """A layout that is fast enough for other and more arrivals as well: the busiest pool grows until it is."""
    layout = sized.layout
    for attempt in range(_MOST_GROWN):
        sized = _tried_anew(replace(sized, layout=layout), times, seed=seed, attempt=attempt)
        if sized.is_fast_enough:
            break
        pools = sized.simulated.pools
        name = "num_denoisers" if pools["Denoiser"].busy_share >= pools["Decoder"].busy_share else "num_decoders"
        num_replicas = getattr(layout, name)
        layout = replace(layout, **{name: num_replicas + max(1, num_replicas // 50)})
    return sized


def _tried_anew(sized: Sized, times: StageTimes, *, seed: int, attempt: int) -> Sized:
    """The slowest of some simulations of the same layout and demand, whose arrivals nothing was chosen by."""
    tried = []
    for number in range(_NUM_CONFIRMATIONS):
        own_seed = seed + 1_000_003 * (1 + attempt * _NUM_CONFIRMATIONS + number)
        tried.append(try_layout(sized.demand, times, sized.layout, seed=own_seed, num_counted=NUM_CONFIRMING))
        if not tried[-1].is_fast_enough:
            return tried[-1]
    return max(tried, key=lambda one: one.latency(0.95))


def _without_spare(sized: Sized, pool: str, times: StageTimes, *, seed: int) -> Sized:
    """With as few replicas of a pool as are still fast enough, to within a fiftieth."""
    low, high = 0, getattr(sized.layout, pool)
    while high - low > max(1, high // 50):
        middle = (low + high) // 2
        tried = try_layout(sized.demand, times, replace(sized.layout, **{pool: middle}), seed=seed)
        if tried.is_fast_enough:
            sized, high = tried, middle
        else:
            low = middle
    return sized


def fill(num_gpus: int, demand: Demand, times: StageTimes, layout: Layout, *, seed: int = 0) -> Sized:
    """The most videos that so many GPUs make fast enough; ``demand`` says which, and how fast.

    The best of some shares of decoders is taken, around that of the smallest plan for a load near. One GPU holds all
    pools. Raises ``ValueError`` where that makes none.
    """
    if num_gpus < 1 or num_gpus == 2:
        raise ValueError(f"--gpus {num_gpus}: must be 1, which all pools share, or at least 3, one for each pool")
    most = num_gpus / (demand.denoise_s + demand.decode_s)
    if num_gpus == 1:
        shares = [replace(layout, on_one_device=True)]
    else:
        near = size(replace(demand, videos_per_s=0.7 * most), times, layout, seed=seed)
        shares = _shared_out(num_gpus, near)
    tried = [_fullest(one, demand, most, times, seed=seed) for one in shares]
    found = max((one for one in tried if one), key=lambda one: one.demand.videos_per_s, default=None)
    if found is None:
        raise ValueError(f"--gpus {num_gpus}: too few for {demand.latency_p95_s:.3g} s, however few videos come")
    for attempt in range(_MOST_GROWN):
        anew = _tried_anew(found, times, seed=seed, attempt=attempt)
        if anew.is_fast_enough:
            break
        found = replace(found, demand=replace(found.demand, videos_per_s=0.98 * found.demand.videos_per_s))
    return anew


def _fullest(shared: Layout, demand: Demand, most: float, times: StageTimes, *, seed: int) -> Sized | None:
    """A layout under the most videos that it makes fast enough, of at most ``most`` a second. None: it makes none."""
    found: Sized | None = None
    low, high = 0.0, most
    while high - low > 0.02 * most:
        at_rate = replace(demand, videos_per_s=(low + high) / 2)
        least = _least(at_rate, times, shared)
        layout = replace(shared, num_save_cores=least.num_save_cores, max_running=least.max_running)
        tried = try_layout(at_rate, times, layout, seed=seed)
        if tried.is_fast_enough:
            found, low = tried, at_rate.videos_per_s
        else:
            high = at_rate.videos_per_s
    return found


def _shared_out(num_gpus: int, near: Sized) -> list[Layout]:
    """The pools of a plan, made larger or smaller to so many GPUs together, with as many decoders and with more."""
    factor = num_gpus / near.num_gpus
    num_text_encoders = max(1, round(factor * near.layout.num_text_encoders))
    most_decoders = num_gpus - num_text_encoders - 1
    numbers = {max(1, min(round(more * factor * near.layout.num_decoders), most_decoders)) for more in _MORE_DECODERS}
    return [
        replace(
            near.layout,
            num_decoders=num_decoders,
            num_text_encoders=num_text_encoders,
            num_denoisers=num_gpus - num_decoders - num_text_encoders,
        )
        for num_decoders in sorted(numbers)
    ]


def try_layout(
    demand: Demand, times: StageTimes, layout: Layout, *, seed: int = 0, num_counted: int | None = None
) -> Sized:
    """A simulation of a layout under a demand, with random arrivals. num_counted: at least so many videos count."""
    num_parts = _num_parts(layout)
    part = replace(
        layout,
        num_text_encoders=math.ceil(layout.num_text_encoders / num_parts),
        num_denoisers=max(1, round(layout.num_denoisers / num_parts)),
        num_decoders=max(1, round(layout.num_decoders / num_parts)),
        num_save_cores=math.ceil(layout.num_save_cores / num_parts),
        max_running=math.ceil(layout.max_running / num_parts),
    )
    videos_per_s = demand.videos_per_s / layout.num_denoisers * part.num_denoisers
    warm_up_s = 4 * max(alone_s(kind, times) for kind in demand.kinds)
    counted_s = max((num_counted or _FEWEST_COUNTED) / videos_per_s, 3 * warm_up_s)
    simulated = simulate(
        _poisson(demand.kinds, videos_per_s, Random(seed)),
        times,
        part,
        seed=seed,
        counted_from=warm_up_s,
        counted_until=warm_up_s + counted_s,
        give_up_at=warm_up_s + 2 * counted_s + demand.latency_p95_s,
    )
    return Sized(layout, demand, simulated, num_parts)


def _num_parts(layout: Layout) -> int:
    """Into how many equal parts a layout is divided so that each has nearly as many decoders for its denoisers."""
    near = max(1, round(layout.num_denoisers / MOST_SIMULATED))

    def error(num_parts: int) -> float:
        decoders, denoisers = layout.num_decoders / num_parts, layout.num_denoisers / num_parts
        return abs(max(1, round(decoders)) / decoders * denoisers / max(1, round(denoisers)) - 1)

    return min(range(near + near // 4, near // 2, -1) if near > 3 else range(near, 0, -1), key=error)


def _poisson(kinds: Sequence[VideoWork], videos_per_s: float, random: Random) -> Iterator[tuple[float, VideoWork]]:
    at = 0.0
    while True:
        at += random.expovariate(videos_per_s)
        yield at, random.choice(kinds)


def _least(demand: Demand, times: StageTimes, layout: Layout) -> Layout:
    """Replicas that the work just fits, were it packed as well as can be, and whose decoders remember most videos."""
    num_denoisers = _replicas(demand.videos_per_s * demand.denoise_s)
    latency_s = statistics.mean(alone_s(kind, times) for kind in demand.kinds)
    num_running = 1.5 * demand.videos_per_s * latency_s
    remembered = max(layout.memories_on_device + layout.memories_in_host, 1)
    return replace(
        layout,
        num_denoisers=num_denoisers,
        num_decoders=max(_replicas(demand.videos_per_s * demand.decode_s), math.ceil(num_running / remembered)),
        num_text_encoders=_replicas(demand.videos_per_s * times.encode_s / 4),  # prompts come in batches
        num_save_cores=max(1, math.ceil(demand.videos_per_s * demand.save_s / _SAVE_BUSY)),
        max_running=max(layout.max_running, math.ceil(2 * num_running)),
    )


def _replicas(work: float) -> int:
    """That work so many seconds a second together."""
    return max(1, math.ceil(work / _MOST_BUSY))
