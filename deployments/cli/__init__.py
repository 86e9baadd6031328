"""``pyramid-serve``: the library's commands, a server on this machine, and a client for any server.

What a command needs is imported when it runs, for Ray and torch take seconds and a client needs neither.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyramid_serve import cli
from pyramid_serve.outputs import check_output
from pyramid_serve.terminal import printable, printable_lines

if TYPE_CHECKING:
    from deployments.app import ModelOptions
    from deployments.cli.server import Server, Video
    from deployments.local.signals import StopSignals

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

DEFAULT_URL = "http://127.0.0.1:8000"
VARIANTS = {"video": ".mp4", "thumbnail": ".webp", "spritesheet": ".webp"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``pyramid-serve``; the exit status."""
    parser, commands = cli.new_parser()
    cli.add_commands(commands)
    _add_server_commands(commands)
    _add_client_commands(commands)
    return cli.run(parser, arguments)


# --- a server on this machine ---------------------------------------------------------------------------------------


def _add_server_commands(commands: "Commands") -> None:
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
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default=None, help="of the app and the loop"
    )
    parser.add_argument(
        "--concurrency", default="1,2,4,8", metavar="N,...", help="videos at once; 1,2,4,8 unless given"
    )
    parser.add_argument("-o", "--output", type=Path, default=None, metavar="FILE", help="the figures as JSON")
    cli.add_request_arguments(parser)
    parser.set_defaults(run=bench)

    parser = commands.add_parser(
        "demo",
        help="see it at work: start, make a video, stop",
        description="Start the app on this machine, make a video over HTTP, show where its units were when, and leave "
        "the video, its frames side by side, and nothing running.",
    )
    parser.add_argument("prompt", nargs="?", help="what the video shows")
    parser.add_argument("-o", "--output", type=Path, default=Path("demo.mp4"), help="demo.mp4 unless given")
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
    """Run ``pyramid-serve up``: until SIGTERM, which is its ordinary end, or Ctrl-C or SIGHUP."""
    with _ending("up", terminated=0) as signals:
        from deployments.local.cluster import check_port, precision_text, read_app, running
        from deployments.local.demo import LiveRows, status_rows
        from pyramid_serve.storage import check_root, shown_root

        app = read_app(arguments.config, host=arguments.host, port=arguments.port)
        check_port(app.host, app.port)
        signals.begin()
        check_root(app.config.storage_root)
        storage = shown_root(app.config.storage_root)
        _say(f"Model {app.config.model.public_name} in {precision_text(app.config)}.")
        _say(f"Starting Ray and the app, videos in {storage} ...")
        started = time.monotonic()
        rows = LiveRows(sys.stdout)
        with running(app, show=lambda statuses: rows.show(status_rows(statuses)), warn=rows.say) as logs:
            at = "" if app.url == DEFAULT_URL else f" --url {app.url}"
            _say(
                f"Ready after {time.monotonic() - started:.0f} s: {app.url}  (docs: {app.url}/docs)\n"
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
    _check_output(output, ".mp4")
    _check_output(output.with_suffix(".png"), ".png")

    with _ending("demo") as signals:
        from deployments.cli.server import Server
        from deployments.local.cluster import precision_text, running
        from deployments.local.demo import PROMPT, LiveRows, demo_app, make, status_rows

        signals.begin()
        rows = LiveRows(sys.stdout)
        with demo_app() as app:
            _say(f"Model {app.config.model.public_name} in {precision_text(app.config)}.")
            _say("Starting Ray and the app on this machine ...")
            started = time.monotonic()
            with running(app, show=lambda statuses: rows.show(status_rows(statuses))):
                _say(f"Ready after {time.monotonic() - started:.0f} s.\n")
                make(Server(app.url), arguments.prompt or PROMPT, output, out=sys.stdout)
            _say("\nEverything that was started is stopped. To keep a server: pyramid-serve up")


def doctor(arguments: argparse.Namespace) -> None:
    """Run ``pyramid-serve doctor``. Raises ``ValueError`` when something is broken that ``generate`` needs."""
    with _ending("doctor") as signals:
        from deployments.local.doctor import examine, to_json

        signals.begin()
        lines = []
        for line in examine(storage=arguments.storage, config=arguments.config, with_ray=arguments.ray):
            lines.append(line)
            if not arguments.json:
                _say(str(line))
        if arguments.json:
            _say(to_json(lines))
    broken = [line.name for line in lines if line.is_needed and not line.is_ok]
    if broken:
        raise ValueError(f"generate does not work here: see {', '.join(broken)}")


def bench(arguments: argparse.Namespace) -> None:
    """Run ``pyramid-serve bench``."""
    request = cli.request_from(arguments)

    with _ending("bench") as signals:
        from deployments.local.bench import parse_levels, run_bench

        levels = parse_levels(arguments.concurrency)
        signals.begin()
        with _app_to_measure(arguments) as (app, model):
            report = run_bench(request, app=app, model=model, levels=levels)
    _say(report.to_text())
    if arguments.output is not None:
        arguments.output.write_text(report.to_json())
        _say(f"{arguments.output}: the same as JSON")


@contextmanager
def _app_to_measure(arguments: argparse.Namespace) -> Iterator[tuple[str, "ModelOptions"]]:
    """The app's name and its model: of a cluster that runs, or of one of our own for as long as the block."""
    if arguments.app is not None:
        import ray

        from deployments.app import ModelOptions

        ray.init(address=arguments.address, log_to_driver=False)
        try:
            yield arguments.app, ModelOptions(source=arguments.model, variant=arguments.variant, dtype=arguments.dtype)
        finally:
            ray.shutdown()
        return

    from deployments.local.cluster import free_port, precision_text, read_app, running
    from deployments.local.demo import LiveRows, status_rows

    app = read_app(arguments.config, port=free_port())
    rows = LiveRows(sys.stdout)
    # In a folder that goes with it: a server that runs here may use the one that is configured.
    with tempfile.TemporaryDirectory(prefix="pyramid-serve-bench-", ignore_cleanup_errors=True) as storage:
        model = app.config.model.model_copy(update={"dtype": arguments.dtype or app.config.model.dtype})
        app = app._replace(config=app.config.model_copy(update={"storage": storage, "model": model}))
        _say(f"Model {model.public_name} in {precision_text(app.config)}.")
        _say("Starting Ray and the app ...")
        with running(app, show=lambda statuses: rows.show(status_rows(statuses))):
            yield app.name, model


def _wait_for_interrupt() -> None:
    while True:
        threading.Event().wait(3600)


@contextmanager
def _ending(command: str, *, terminated: int = cli.INTERRUPTED) -> Iterator["StopSignals"]:
    """End the block at SIGTERM, SIGINT and SIGHUP with nothing left behind: see ``StopSignals``.

    ``terminated``: the exit status after SIGTERM; 0 is an end without a complaint.
    """

    def leave(number: int) -> int:
        is_stopped = number == signal.SIGTERM and terminated == 0
        with suppress(OSError):  # the terminal may be closed
            _say(f"pyramid-serve {command}: {'stopped' if is_stopped else 'interrupted'}", file=sys.stderr)
        return terminated if number == signal.SIGTERM else cli.INTERRUPTED

    with _terminable(leave) as signals:
        try:
            yield signals
        except KeyboardInterrupt:
            signals.end()
            if signals.received != signal.SIGTERM or terminated:
                raise
            _say(f"pyramid-serve {command}: stopped", file=sys.stderr)


@contextmanager
def _terminable(leave: Callable[[int], int] | None = None) -> Iterator["StopSignals"]:
    """Let SIGTERM, SIGINT and SIGHUP end the block as Ctrl-C does; see ``StopSignals``."""
    from deployments.local.signals import StopSignals

    with StopSignals(leave=leave) as signals:
        yield signals


# --- a client -------------------------------------------------------------------------------------------------------


def _add_client_commands(commands: "Commands") -> None:
    parser = _add_client_command(commands, "submit", "ask for a video")
    parser.set_defaults(run=submit)
    parser.add_argument("prompt")
    parser.add_argument("-o", "--output", type=Path, help="wait for the video and write it here")
    parser.add_argument("--wait", action="store_true", help="wait until it is over")
    parser.add_argument("--model", default=argparse.SUPPRESS, help="unless the server has only one")
    parser.argument_default = argparse.SUPPRESS
    cli.add_request_arguments(parser)

    parser = _add_client_command(commands, "status", "how a video stands")
    parser.set_defaults(run=status)
    parser.add_argument("id")
    parser.add_argument("--json", action="store_true", help="the video object as the server has it")

    parser = _add_client_command(commands, "list", "the newest videos")
    parser.set_defaults(run=list_videos)
    parser.add_argument("--limit", type=int, default=20, help="20 unless given")

    parser = _add_client_command(commands, "cancel", "stop a video that is being made")
    parser.set_defaults(run=cancel)
    parser.add_argument("id")

    parser = _add_client_command(commands, "delete", "delete a video with its files")
    parser.set_defaults(run=delete)
    parser.add_argument("id")

    parser = _add_client_command(commands, "download", "write a video to a file, once it is finished")
    parser.set_defaults(run=download)
    parser.add_argument("id")
    parser.add_argument("-o", "--output", type=Path, help="ID.mp4 unless given")
    parser.add_argument("--variant", choices=sorted(VARIANTS), default="video")


def _add_client_command(commands: "Commands", name: str, what: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    parser.add_argument("--url", default=DEFAULT_URL, help=f"of the server; {DEFAULT_URL} unless given")
    parser.add_argument("--api-key", metavar="KEY", help="where the server asks for one; else $PYRAMID_SERVE_API_KEY")
    return parser


def _server(arguments: argparse.Namespace) -> "Server":
    from deployments.cli.server import Server

    return Server(arguments.url, api_key=arguments.api_key or os.environ.get("PYRAMID_SERVE_API_KEY"))


def submit(arguments: argparse.Namespace) -> None:
    """Run ``pyramid-serve submit``."""
    from pyramid_serve.api import VideoRequest

    if arguments.output is not None:
        _check_output(arguments.output, ".mp4")
    server = _server(arguments)
    names = VideoRequest.model_fields.keys() - {"prompt", "input_reference"}
    fields = {name: value for name, value in vars(arguments).items() if name in names}
    video = server.submit({"prompt": arguments.prompt, **fields}, picture=vars(arguments).get("image"))
    if arguments.output is None and not arguments.wait:
        video_id = printable(video["id"])
        _say(f"{video_id}\n\nTo follow it and fetch it: pyramid-serve download {video_id}{_at(arguments)}")
        return
    video = _wait(server, video, arguments)
    if arguments.output is None:
        _say(f"{printable(video['id'])}: completed")
    else:
        _write(server, video, arguments.output, "video")


def status(arguments: argparse.Namespace) -> None:
    """Run ``pyramid-serve status``."""
    from deployments.local.demo import summary

    video = _server(arguments).get(arguments.id)
    if arguments.json:
        _say(json.dumps(video, indent=2).replace("\x7f", "\\u007f"))  # the one control that JSON leaves as it is
        return
    _say(f"{printable(video['id'])}: {_state(video)}")
    _say(f"  prompt   {printable(video['prompt'])}")
    _say(f"  video    {_frames(video)}, seed {video['seed']}, model {printable(video['model'])}")
    _say(f"  units    {video['num_units_done']} of {video['num_units']} can be watched")
    _say(f"  created  {_time(video['created_at'])}")
    if video["expires_at"] is not None:
        _say(f"  expires  {_time(video['expires_at'])}")
    _say_truncation(video)
    if video["timeline"]:
        _say(f"\n{summary(video)}")


def list_videos(arguments: argparse.Namespace) -> None:
    """Run ``pyramid-serve list``."""
    if arguments.limit < 1:
        raise ValueError(f"--limit {arguments.limit}: must be at least 1")
    videos = list(_server(arguments).list(limit=arguments.limit))
    if not videos:
        _say("no videos yet")
        return
    _say(f"{'ID':38}  {'STATUS':11}  {'DONE':>4}  {'CREATED':16}  {'SIZE':>9}  {'FRAMES':>6}  PROMPT")
    for video in videos:
        prompt = video["prompt"] if len(video["prompt"]) <= 60 else video["prompt"][:57] + "..."
        _say(
            f"{printable(video['id']):38}  {_status(video):11}  {video['progress']:3}%  "
            f"{_time(video['created_at']):16}  {printable(video['size']):>9}  {video['num_frames']:6}  "
            f"{printable(' '.join(prompt.split()))}"
        )


def cancel(arguments: argparse.Namespace) -> None:
    """Run ``pyramid-serve cancel``."""
    video = _server(arguments).cancel(arguments.id)
    _say(f"{printable(video['id'])}: {_state(video)}")


def delete(arguments: argparse.Namespace) -> None:
    """Run ``pyramid-serve delete``."""
    _server(arguments).delete(arguments.id)
    _say(f"{arguments.id}: deleted")


def download(arguments: argparse.Namespace) -> None:
    """Run ``pyramid-serve download``."""
    suffix = VARIANTS[arguments.variant]
    output = arguments.output or Path(f"{arguments.id}{suffix}")
    _check_output(output, suffix)
    server = _server(arguments)
    video = server.get(arguments.id)
    if video["status"] != "completed":
        video = _wait(server, video, arguments)
    _write(server, video, output, arguments.variant)


def _wait(server: "Server", video: "Video", arguments: argparse.Namespace) -> "Video":
    """The finished video, with a bar meanwhile. ``ValueError`` with its error where it fails."""
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
    try:
        from tqdm import tqdm  # here, for Ctrl-C during this slow import is answered too

        with tqdm(total=100, bar_format=bar_format, disable=None, leave=False) as bar:

            def show(now: "Video") -> None:
                bar.set_description_str(_status(now).replace("_", " "), refresh=False)
                bar.set_postfix_str(_outlook(now), refresh=False)
                bar.n = now["progress"]
                bar.refresh()

            video = server.wait(video["id"], show)
    except KeyboardInterrupt:
        video_id = printable(video["id"])
        _say(
            f"\n{video_id} goes on without you. To fetch it: pyramid-serve download {video_id}{_at(arguments)}\n"
            f"To stop it: pyramid-serve cancel {video_id}{_at(arguments)}",
            file=sys.stderr,
        )
        raise
    if video["status"] != "completed":
        raise ValueError(f"{video['id']}: {_state(video)}")
    return video


def _write(server: "Server", video: "Video", output: Path, variant: str) -> None:
    server.download(video["id"], output, variant=variant)
    what = _frames(video) if variant == "video" else variant
    _say(f"{output}: {what}, seed {video['seed']}")
    _say_truncation(video)


def _say_truncation(video: "Video") -> None:
    """Say on stderr that the prompt was cut, if it was."""
    truncated_at = video.get("prompt_truncated_at")
    if truncated_at is not None:
        from pyramid_serve.truncation import truncation_note

        note = truncation_note(video["prompt"] + video.get("prompt_suffix", ""), truncated_at)
        _say(printable(f"note: {note}"), file=sys.stderr)


def _check_output(output: Path, suffix: str) -> None:
    """``ValueError`` where a file of this kind cannot be written there."""
    if output.suffix.lower() != suffix:
        raise ValueError(f"{output}: must end in {suffix}")
    check_output(output)
    if output.is_dir():
        raise ValueError(f"{output}: is a folder")


# --- how things are told --------------------------------------------------------------------------------------------


def _say(text: str, *, file: Any = None) -> None:
    print(printable_lines(text), file=file or sys.stdout, flush=True)


def _at(arguments: argparse.Namespace) -> str:
    """The option that a command which is suggested needs, to mean the same server."""
    return "" if arguments.url == DEFAULT_URL else f" --url {arguments.url}"


def _status(video: "Video") -> str:
    """The status, with cancelled told apart from failed."""
    is_cancelled = video["error"] is not None and video["error"]["code"] == "cancelled"
    return "cancelled" if is_cancelled else str(video["status"])


def _frames(video: "Video") -> str:
    return f"{video['num_frames']} frames of {printable(video['size'])}"


def _state(video: "Video") -> str:
    """The status in words, with what there is to say of it."""
    if video["status"] == "failed" and _status(video) != "cancelled":
        return f"failed: {_message(video)}"
    if video["status"] in ("completed", "failed"):
        return _status(video)
    outlook = _outlook(video)
    return f"{video['status'].replace('_', ' ')}, {video['progress']}% done" + (f", {outlook}" if outlook else "")


def _message(video: "Video") -> str:
    """Why a video failed."""
    return "no reason given" if video["error"] is None else printable(video["error"]["message"])


def _outlook(video: "Video") -> str:
    parts = []
    if video["queue_position"] is not None:
        ahead = video["queue_position"]
        parts.append("next in the queue" if ahead == 0 else f"{ahead} ahead in the queue")
    if video["eta_seconds"] is not None:
        parts.append(f"about {max(round(video['eta_seconds']), 1)} s left")
    return ", ".join(parts)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
