"""The commands that run the app on this machine: ``up``, ``demo``, ``doctor`` and ``bench``."""

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from deployments.cli.ending import ending
from deployments.cli.printing import duration, say, url_option
from deployments.cli.variants import variant_of
from pyramid_serve.cli_options import add_request_options, request_from
from pyramid_serve.dtypes import DTypeName
from pyramid_serve.families import Family, known_families
from pyramid_serve.outputs import check_file_output

if TYPE_CHECKING:
    from deployments.config import ModelOptions

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_serving_commands(commands: "Commands", families: Sequence[Family]) -> None:
    """Add the commands to a command line; the namespace of each has the function to call as ``run``.

    families: those whose options are taken.
    """
    parser = commands.add_parser(
        "up",
        help="start a server on this machine",
        description="Start a Ray of its own on this machine, and the app on it. Ctrl-C ends both; videos that are not "
        "finished go on when it is started again.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="like serve_config.yaml; every key is checked")
    parser.add_argument("--host", help="127.0.0.1, or the file's; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, help="8000, or the file's")
    parser.set_defaults(run=up)

    parser = commands.add_parser(
        "bench",
        help="measure the app, beside the plain loop",
        description="Measure the app on this machine, or one that runs in a Ray cluster, at several levels of "
        "concurrency, beside the library's plain loop making the same videos one after another.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("prompt", nargs="?", default="a red circle moves right on a black background")
    parser.add_argument(
        "--config", type=Path, default=None, metavar="FILE", help="start this app; else the default one"
    )
    parser.add_argument("--app", default=None, help="measure this app of the cluster at --address instead")
    parser.add_argument("--address", default="auto", help="of the Ray cluster that --app runs in; auto unless given")
    parser.add_argument("--model", default="shapes", help="what --app serves, for the loop; shapes unless given")
    parser.add_argument("--variant", default=None)
    parser.add_argument("--dtype", choices=get_args(DTypeName), default=None, help="of the app and the loop")
    parser.add_argument(
        "--concurrency", default="1,2,4,8", metavar="N,...", help="videos at once; 1,2,4,8 unless given"
    )
    parser.add_argument("-o", "--output", type=Path, default=None, metavar="FILE", help="the figures as JSON")
    add_request_options(parser, families)
    parser.set_defaults(run=bench)

    parser = commands.add_parser(
        "demo",
        help="see it at work: start, make a video, stop",
        description="Start the app on this machine, make a video over HTTP, show where its units were when, and leave "
        "the video, its frames side by side, and nothing running.",
    )
    parser.add_argument("prompt", nargs="?", help="what the video shows")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("demo.mp4"),
        help="demo.mp4 unless given; .gif, .webp or .zip (of PNG)",
    )
    parser.set_defaults(run=demo)

    parser = commands.add_parser(
        "doctor",
        help="what a bug report needs to say of this machine",
        description="Print versions, processor, GPU, ffmpeg and free space, and what does not work; no secrets. "
        "The exit status is 0 unless something is broken that generate needs.",
    )
    parser.add_argument(
        "--storage", metavar="URL", help="a storage root to try: writes, reads and deletes a small file"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="try the storage that this file names")
    parser.add_argument("--ray", action="store_true", help="try whether Ray can start here")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=doctor)


def up(arguments: argparse.Namespace) -> None:
    """Run ``pyramid-serve up`` until SIGTERM, which is its usual end, Ctrl-C or SIGHUP."""
    with ending("up", terminated=0) as signals:
        from deployments.cli.demo import LiveRows, status_rows
        from deployments.local.cluster import check_port, models_text, read_app, running
        from pyramid_serve.storage import check_root, shown_root

        app = read_app(arguments.config, host=arguments.host, port=arguments.port)
        check_port(app.host, app.port)
        signals.begin()
        check_root(app.config.storage_root)
        storage = shown_root(app.config.storage_root)
        say(models_text(app.config))
        say(f"Starting Ray and the app, videos in {storage} ...")
        started = time.monotonic()
        rows = LiveRows(sys.stdout)
        with running(app, show=lambda statuses: rows.show(status_rows(statuses)), warn=rows.say) as logs:
            at = url_option(app.url)
            say(
                f"Ready after {duration(time.monotonic() - started)}: {app.url}  (docs: {app.url}/docs)\n"
                f"Logs: {logs}\n\n"
                f"In another terminal:\n"
                f'  pyramid-serve submit "a red circle moves right on a black background" -o circle.mp4{at}\n'
                f"  pyramid-serve list{at}\n\n"
                "Ctrl-C stops it."
            )
            _wait_for_interrupt()


def demo(arguments: argparse.Namespace) -> None:
    """Run ``pyramid-serve demo``."""
    output: Path = arguments.output
    sheet = output.with_suffix(".png")
    if variant_of(output) == "frame":
        raise ValueError(
            f"{output}: a sheet of its frames is written there; the video must end in another way than .png"
        )
    check_file_output(sheet, ".png")

    with ending("demo") as signals:
        from deployments.cli.demo import PROMPT, LiveRows, demo_app, make, status_rows
        from deployments.cli.server import Server
        from deployments.local.cluster import models_text, running

        signals.begin()
        rows = LiveRows(sys.stdout)
        with demo_app() as app:
            say(models_text(app.config))
            say("Starting Ray and the app on this machine ...")
            started = time.monotonic()
            with running(app, show=lambda statuses: rows.show(status_rows(statuses))):
                say(f"Ready after {duration(time.monotonic() - started)}.\n")
                make(Server(app.url), arguments.prompt or PROMPT, output, out=sys.stdout)
            say("\nEverything that was started is stopped. To keep a server: pyramid-serve up")


def doctor(arguments: argparse.Namespace) -> None:
    """Run ``pyramid-serve doctor``. Raises ``ValueError`` when something is broken that ``generate`` needs."""
    with ending("doctor") as signals:
        from deployments.local.doctor import examine, to_json

        signals.begin()
        lines = []
        for line in examine(storage=arguments.storage, config=arguments.config, with_ray=arguments.ray):
            lines.append(line)
            if not arguments.json:
                say(str(line))
        if arguments.json:
            say(to_json(lines))
    broken = [line.name for line in lines if line.is_needed and not line.is_ok]
    if broken:
        raise ValueError(f"generate does not work here: see {', '.join(broken)}")


def bench(arguments: argparse.Namespace) -> None:
    """Run ``pyramid-serve bench``."""
    request = request_from(arguments, known_families())

    with ending("bench") as signals:
        from deployments.local.bench import parse_levels, run_bench

        levels = parse_levels(arguments.concurrency)
        signals.begin()
        with _app_to_measure(arguments) as (app, model):
            report = run_bench(request, app=app, model=model, levels=levels)
    say(report.to_text())
    if arguments.output is not None:
        arguments.output.write_text(report.to_json())
        say(f"{arguments.output}: the same as JSON")


@contextmanager
def _app_to_measure(arguments: argparse.Namespace) -> Iterator[tuple[str, "ModelOptions"]]:
    """(name, model) of the app to measure: one in a running cluster, or one that runs for the duration of the block."""
    if arguments.app is not None:
        import ray

        from deployments.config import ModelOptions

        ray.init(address=arguments.address, log_to_driver=False)
        try:
            yield arguments.app, ModelOptions(source=arguments.model, variant=arguments.variant, dtype=arguments.dtype)
        finally:
            ray.shutdown()
        return

    from deployments.cli.demo import LiveRows, status_rows
    from deployments.local.cluster import free_port, models_text, read_app, running

    app = read_app(arguments.config, port=free_port())
    rows = LiveRows(sys.stdout)
    # In a temporary folder, because a server on this machine may be using the configured one.
    with tempfile.TemporaryDirectory(prefix="pyramid-serve-bench-", ignore_cleanup_errors=True) as storage:
        first, *others = app.config.models
        model = first.model_copy(update={"dtype": arguments.dtype or first.dtype})
        app = app._replace(config=app.config.model_copy(update={"storage": storage, "models": (model, *others)}))
        say(models_text(app.config))
        say("Starting Ray and the app ...")
        with running(app, show=lambda statuses: rows.show(status_rows(statuses))):
            yield app.name, model


def _wait_for_interrupt() -> None:
    while True:
        threading.Event().wait(3600)
