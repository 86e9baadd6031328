"""The command that sizes a cluster: ``plan``."""

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from deployments.cli.printing import say
from pyramid_serve.api import Plan, RequestLimits, parse_request
from pyramid_serve.families import Family, family_of
from pyramid_serve.served_model import ServedModel

if TYPE_CHECKING:
    from deployments.planning.bench_times import Bench
    from deployments.planning.overlay import Overlay
    from deployments.planning.sizing import Sized
    from deployments.planning.stage_times import StageTimes

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_BASE = Path("k8s/overlays/pools")
_PATIENCE = 3.0
"""Without --p95: nineteen of twenty videos take at most so many times what they take alone."""


def add_planning_commands(commands: "Commands") -> None:
    """Add the command to a command line; its namespace has the function to call as ``run``."""
    parser = commands.add_parser(
        "plan",
        help="how many GPUs a load takes",
        description="How many replicas of each pool, and GPUs, a load takes, how long videos then wait and what they "
        "cost, by a simulation of the app's own rules with random arrivals; docs/planning.md says how far it is right.",
    )
    parser.add_argument("--model", default="shapes", help="a folder, a URL, a Hub id, or the one in the package")
    parser.add_argument("--variant", help="which transformer of the model, such as 384p")
    parser.add_argument("--family", metavar="MODULE:NAME", help="of a model whose family is not in this package")
    parser.add_argument("--size", metavar="WxH,...", help="the model's own unless given")
    parser.add_argument("--seconds", metavar="S,...", help="all sizes and lengths come equally often")
    load = parser.add_mutually_exclusive_group(required=True)
    load.add_argument("--videos-per-minute", type=_positive, metavar="N")
    load.add_argument("--gpus", type=int, metavar="N", help="instead: the most videos a minute for so many GPUs")
    parser.add_argument(
        "--p95",
        type=_positive,
        metavar="S",
        help=f"19 of 20 videos take at most so many seconds; {_PATIENCE:g} times what one takes alone unless given",
    )
    load.add_argument("--compare", action="store_true", help="instead: simulate the bench itself, beside its figures")
    times = parser.add_mutually_exclusive_group(required=True)
    times.add_argument("--bench", type=Path, metavar="FILE", help="stage times from pyramid-serve bench -o FILE")
    times.add_argument("--gpu", metavar="NAME", help="stage times by arithmetic: H200, H100, A100 or L40S")
    parser.add_argument(
        "--share",
        type=_share,
        metavar="X",
        help="of the GPU's matrix rate, for the transformer; 0.22 unless given, which an H200 reached before compiling",
    )
    parser.add_argument("--decoder-share", type=_share, metavar="X", help="the same for the decoder; 0.41 unless given")
    parser.add_argument("--floor-ms", type=_positive, metavar="MS", help="the least time of a step; 38 unless given")
    parser.add_argument("--price-per-gpu-hour", type=_positive, metavar="X")
    parser.add_argument("--seed", type=int, metavar="N", help="of the arrivals; 0 unless given")
    parser.add_argument(
        "--base",
        type=Path,
        metavar="FOLDER",
        help=f"the overlay whose settings hold, and that --write changes; unless given {_BASE} or, where that is "
        "not there, the app's defaults",
    )
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write an overlay with these replicas over --base")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=plan)


def plan(arguments: argparse.Namespace) -> None:
    """Run ``pyramid-serve plan``. Raises ``ValueError`` for what the user got wrong."""
    from deployments.planning.published import CARDS, published_of
    from deployments.planning.report import Report, needs_of

    if arguments.write is not None and arguments.gpus == 1:
        raise ValueError("--write: is for a GPU to each replica; for one GPU there is k8s/overlays/single-gpu")
    if arguments.compare:
        _compare(arguments)
        return
    family, overlay = _family(arguments), _overlay(arguments)
    published = published_of(arguments.model, arguments.variant)
    times = _times(arguments, family, overlay)
    if arguments.write is not None:
        overlay.check_can_be_written_over(arguments.write)
    sized = _sized(arguments, _plans(arguments, family), family, times, overlay)
    needs = None if published is None else needs_of(published, **overlay.decoder_settings)
    problems: list[str] = []
    if needs is not None and arguments.gpu is not None:
        problems = needs.problems(CARDS[arguments.gpu], share_one=sized.layout.on_one_device)
    report = Report(
        model=arguments.model,
        times=times,
        sized=sized,
        gpu=arguments.gpu,
        needs=needs,
        memory_problems=tuple(problems),
        price_per_gpu_hour=arguments.price_per_gpu_hour,
        knows_text=arguments.bench is None,
    )
    # With --json, stdout is nothing but the JSON.
    settings = "the app's defaults" if overlay.folder is None else f"of {overlay.folder}"
    say(f"Settings: {settings}", file=sys.stderr if arguments.json else None)
    say(report.to_json() if arguments.json else report.to_text())
    if arguments.write is not None:
        overlay.write(
            arguments.write,
            sized.layout,
            model=arguments.model,
            variant=arguments.variant,
            family=arguments.family,
            default_size=_served(arguments, family).offer.default_size,
        )
        if not arguments.json:
            say(f"{arguments.write}: the overlay; kubectl apply -k {arguments.write}")


def _family(arguments: argparse.Namespace) -> Family:
    from deployments.planning.published import check_variant, config_source

    check_variant(arguments.model, arguments.variant)
    return family_of(config_source(arguments.model, arguments.variant), arguments.family)


def _overlay(arguments: argparse.Namespace) -> "Overlay":
    """The overlay of --base; unless given the one of this repository or, where that is not there, the app's own."""
    from deployments.planning.overlay import Overlay

    if arguments.base is not None and not arguments.base.is_dir():
        raise ValueError(f"--base {arguments.base}: must be a folder with an overlay")
    if arguments.base is None and arguments.write is None and not _BASE.is_dir():
        return Overlay.of_defaults()
    return Overlay.read(arguments.base or _BASE)


def _compare(arguments: argparse.Namespace) -> None:
    from deployments.planning.bench_times import times_of_bench
    from deployments.planning.comparison import compare, to_text
    from deployments.planning.overlay import Overlay

    without_effect = ("p95", "price_per_gpu_hour", "write", "base", "size", "seconds", "seed")
    given = [name for name in without_effect if getattr(arguments, name) is not None]
    if arguments.json:
        given.append("json")
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')}: has no effect with --compare")
    if arguments.bench is None:
        raise ValueError("--compare: goes with --bench FILE")
    family, overlay = _family(arguments), _overlay(arguments)
    bench = _bench(arguments, family, overlay)
    times = times_of_bench(bench, family, source=str(arguments.bench))
    say(to_text(compare(bench, times, family, Overlay.of_defaults().layout(None))))


def _bench(arguments: argparse.Namespace, family: Family, overlay: "Overlay") -> "Bench":
    """The bench of --bench, which must be of --model, under the model's own name or the one that the overlay gives."""
    from deployments.planning.bench_times import check_model, read_bench

    of_arithmetic = [name for name in ("share", "decoder_share", "floor_ms") if getattr(arguments, name) is not None]
    if of_arithmetic:
        raise ValueError(f"--{of_arithmetic[0].replace('_', '-')}: goes with --gpu, not with --bench")
    bench = read_bench(arguments.bench)
    own = arguments.model.rstrip("/").rpartition("/")[2].partition("@")[0]
    given = overlay.name_of(arguments.model)
    names = [own] if given in (None, own) else [own, given]
    check_model(bench, family, names=names, source=str(arguments.bench))
    return bench


def _times(arguments: argparse.Namespace, family: Family, overlay: "Overlay") -> "StageTimes":
    from deployments.planning import published

    if arguments.bench is not None:
        from deployments.planning.bench_times import times_of_bench

        return times_of_bench(_bench(arguments, family, overlay), family, source=str(arguments.bench))
    if arguments.gpu not in published.CARDS:
        raise ValueError(f"--gpu {arguments.gpu}: must be one of {', '.join(published.CARDS)}")
    model = published.published_of(arguments.model, arguments.variant)
    if model is None or model.arithmetic is None:
        known = ", ".join(f"{one} --variant {variant}" for one, variant in published.MODELS if variant)
        raise ValueError(f"--gpu: the arithmetic is known of --model {known}; for others give --bench FILE")
    return published.times_of_card(
        model,
        model.arithmetic,
        published.CARDS[arguments.gpu],
        name=arguments.gpu,
        share=arguments.share or published.SHARE,
        decoder_share=arguments.decoder_share or published.DECODER_SHARE,
        floor_s=published.FLOOR_S if arguments.floor_ms is None else arguments.floor_ms / 1000,
    )


def _served(arguments: argparse.Namespace, family: Family) -> ServedModel:
    from deployments.planning.published import config_source

    capabilities = family.capabilities(config_source(arguments.model, arguments.variant), arguments.variant)
    return ServedModel(arguments.model, family, capabilities, RequestLimits())


def _plans(arguments: argparse.Namespace, family: Family) -> list[Plan]:
    """One of each size and length."""
    model = _served(arguments, family)
    plans = []
    for size, seconds in product(_items("size", arguments.size), _items("seconds", arguments.seconds)):
        fields = {"prompt": "any", "size": size, "seconds": seconds}
        plans.append(model.plan(parse_request({name: value for name, value in fields.items() if value is not None})))
    return plans


def _items(name: str, text: str | None) -> list[str | None]:
    """What a list with commas has; one None where it was not given."""
    if text is None:
        return [None]
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise ValueError(f"--{name} {text}: an item is empty; separate them by single commas")
    return list(items)


def _sized(
    arguments: argparse.Namespace, plans: Sequence[Plan], family: Family, times: "StageTimes", overlay: "Overlay"
) -> "Sized":
    from deployments.planning.published import published_of
    from deployments.planning.sizing import Demand, alone_s, fill, size
    from deployments.planning.stage_times import work_of

    kinds = tuple(work_of(plan, family, times) for plan in plans)
    p95_s = arguments.p95 or _PATIENCE * max(alone_s(kind, times) for kind in kinds)
    layout = overlay.layout(published_of(arguments.model, arguments.variant))
    if arguments.gpus is not None:
        return fill(arguments.gpus, Demand(kinds, 1.0, p95_s), times, layout, seed=arguments.seed or 0)
    return size(Demand(kinds, arguments.videos_per_minute / 60, p95_s), times, layout, seed=arguments.seed or 0)


def _positive(text: str) -> float:
    number = _number(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be a number above 0")
    return number


def _share(text: str) -> float:
    number = _number(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a number above 0 and at most 1")
    return number


def _number(text: str) -> float:
    """NaN, which is in no range, for what is not a number."""
    try:
        return float(text)
    except ValueError:
        return float("nan")
