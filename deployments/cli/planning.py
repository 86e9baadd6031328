"""The command that sizes a cluster: ``plan``."""

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from deployments.cli.printing import say
from pyramid_serve.api import Plan, RequestLimits, parse_request
from pyramid_serve.families import Family, family_of
from pyramid_serve.served_model import ServedModel

if TYPE_CHECKING:
    from deployments.planning.overlay import Overlay
    from deployments.planning.sizing import Sized
    from deployments.planning.stage_times import StageTimes

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

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
    parser.add_argument("--size", default="", metavar="WxH,...", help="the model's own unless given")
    parser.add_argument("--seconds", default="", metavar="S,...", help="all sizes and lengths come equally often")
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
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals")
    parser.add_argument(
        "--base",
        type=Path,
        default=Path("k8s/overlays/pools"),
        metavar="FOLDER",
        help="the overlay whose settings hold, and that --write changes; k8s/overlays/pools unless given",
    )
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write an overlay with these replicas over --base")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=plan)


def plan(arguments: argparse.Namespace) -> None:
    """Run ``pyramid-serve plan``. Raises ``ValueError`` for what the user got wrong."""
    from deployments.planning.overlay import Overlay
    from deployments.planning.published import CARDS, config_source, published_of
    from deployments.planning.report import Report, needs_of

    if arguments.write is not None and arguments.gpus == 1:
        raise ValueError("--write: is for a GPU to each replica; for one GPU there is k8s/overlays/single-gpu")
    family = family_of(config_source(arguments.model, arguments.variant), arguments.family)
    if arguments.compare:
        _compare(arguments, family)
        return
    published = published_of(arguments.model, arguments.variant)
    overlay = Overlay.read(arguments.base) if arguments.base.is_dir() or arguments.write else Overlay.of_defaults()
    times = _times(arguments, family)
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


def _compare(arguments: argparse.Namespace, family: Family) -> None:
    from deployments.planning.bench_times import read_bench
    from deployments.planning.comparison import compare, to_text
    from deployments.planning.overlay import Overlay

    if arguments.bench is None:
        raise ValueError("--compare: goes with --bench FILE")
    report = read_bench(arguments.bench)
    say(to_text(compare(report, _times(arguments, family), family, Overlay.of_defaults().layout(None))))


def _times(arguments: argparse.Namespace, family: Family) -> "StageTimes":
    from deployments.planning import published

    if arguments.bench is not None:
        from deployments.planning.bench_times import read_bench, times_of_bench

        given = [name for name in ("share", "decoder_share", "floor_ms") if getattr(arguments, name) is not None]
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')}: goes with --gpu, not with --bench")
        return times_of_bench(read_bench(arguments.bench), family, source=str(arguments.bench))
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
    for size, seconds in product(arguments.size.split(","), arguments.seconds.split(",")):
        fields = {"prompt": "any", "size": size.strip(), "seconds": seconds.strip()}
        plans.append(model.plan(parse_request({name: value for name, value in fields.items() if value})))
    return plans


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
        return fill(arguments.gpus, Demand(kinds, 1.0, p95_s), times, layout, seed=arguments.seed)
    return size(Demand(kinds, arguments.videos_per_minute / 60, p95_s), times, layout, seed=arguments.seed)


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be more than 0")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be more than 0 and at most 1")
    return number
