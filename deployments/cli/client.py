"""The commands that ask a server: ``submit``, ``status``, ``list``, ``cancel``, ``delete`` and ``download``."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deployments.cli.printing import (
    DEFAULT_URL,
    frames_of,
    outlook_of,
    say,
    state_of,
    status_of,
    time_of,
    url_option,
)
from deployments.cli.variants import ENDINGS, OF_ALL_FRAMES, TOLD, variant_of
from pyramid_serve.cli_options import add_request_options, request_fields_from
from pyramid_serve.families import Family, known_families
from pyramid_serve.outputs import check_file_output
from pyramid_serve.terminal import printable

if TYPE_CHECKING:
    from deployments.cli.answers import Video
    from deployments.cli.server import Server

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_client_commands(commands: "Commands", families: Sequence[Family]) -> None:
    """Add the commands to a command line; the namespace of each has the function to call as ``run``.

    families: those whose options are taken.
    """
    parser = add_client_command(commands, "submit", "ask for a video")
    parser.set_defaults(run=submit)
    parser.add_argument("prompt")
    parser.add_argument(
        "-o", "--output", type=Path, help=f"wait for the video and write it here, by its ending: {TOLD}"
    )
    parser.add_argument("--wait", action="store_true", help="wait until it is over")
    parser.add_argument("--model", default=argparse.SUPPRESS, help="the server's first unless given")
    parser.argument_default = argparse.SUPPRESS
    add_request_options(parser, families)

    parser = add_client_command(commands, "status", "how a video stands")
    parser.set_defaults(run=status)
    parser.add_argument("id")
    parser.add_argument("--json", action="store_true", help="the video object as the server has it")

    parser = add_client_command(commands, "list", "the newest videos")
    parser.set_defaults(run=list_videos)
    parser.add_argument("--limit", type=int, default=20, help="20 unless given")

    parser = add_client_command(commands, "cancel", "stop a video that is being made")
    parser.set_defaults(run=cancel)
    parser.add_argument("id")

    parser = add_client_command(commands, "delete", "delete a video with its files")
    parser.set_defaults(run=delete)
    parser.add_argument("id")

    parser = add_client_command(commands, "download", "write a video to a file, once it is finished")
    parser.set_defaults(run=download)
    parser.add_argument("id")
    parser.add_argument("-o", "--output", type=Path, help=f"ID.mp4 unless given; by its ending: {TOLD}")
    parser.add_argument(
        "--variant", choices=sorted(ENDINGS), help="what to write; unless given, by the output's ending"
    )
    parser.add_argument("--at", help="which frame, for a .png: first (the default), last, or a time in seconds")


def add_client_command(commands: "Commands", name: str, what: str) -> argparse.ArgumentParser:
    """Add a command that asks a server, with the options that name the server."""
    parser = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    parser.add_argument("--url", default=DEFAULT_URL, help=f"of the server; {DEFAULT_URL} unless given")
    parser.add_argument("--api-key", metavar="KEY", help="where the server asks for one; else $PYRAMID_SERVE_API_KEY")
    return parser


def server_of(arguments: argparse.Namespace, *, pause: Callable[[float], object] | None = None) -> "Server":
    """The server that the options of ``add_client_command`` name. pause: as ``Server`` takes it."""
    from deployments.cli.server import Server

    key = arguments.api_key or os.environ.get("PYRAMID_SERVE_API_KEY")
    return Server(arguments.url, api_key=key, pause=pause)


def submit(arguments: argparse.Namespace) -> None:
    """Run ``pyramid-serve submit``."""
    variant = "video" if arguments.output is None else variant_of(arguments.output)
    server = server_of(arguments)
    video = server.submit(request_fields_from(arguments, known_families()), picture=vars(arguments).get("image"))
    if arguments.output is None and not arguments.wait:
        video_id = printable(video["id"])
        say(f"{video_id}\n\nTo follow it and fetch it: pyramid-serve download {video_id}{url_option(arguments.url)}")
        return
    video = _wait(server, video, arguments)
    if arguments.output is None:
        say(f"{printable(video['id'])}: completed")
    else:
        _write(server, video, arguments.output, variant)


def status(arguments: argparse.Namespace) -> None:
    """Run ``pyramid-serve status``."""
    from deployments.cli.demo import summary

    video = server_of(arguments).get(arguments.id)
    if arguments.json:
        # DEL is the only control character that JSON does not escape.
        say(json.dumps(video, indent=2).replace("\x7f", "\\u007f"))
        return
    say(f"{printable(video['id'])}: {state_of(video)}")
    say(f"  prompt   {printable(video['prompt'])}")
    say(f"  video    {frames_of(video)}, seed {video['seed']}, model {printable(video['model'])}")
    say(f"  units    {video['num_units_done']} of {video['num_units']} can be watched")
    say(f"  created  {time_of(video['created_at'])}")
    if video["expires_at"] is not None:
        say(f"  expires  {time_of(video['expires_at'])}")
    _say_truncation(video)
    if video["timeline"]:
        say(f"\n{summary(video)}")


def list_videos(arguments: argparse.Namespace) -> None:
    """Run ``pyramid-serve list``."""
    if arguments.limit < 1:
        raise ValueError(f"--limit {arguments.limit}: must be at least 1")
    videos = list(server_of(arguments).list(limit=arguments.limit))
    if not videos:
        say("no videos yet")
        return
    say(f"{'ID':38}  {'STATUS':11}  {'DONE':>4}  {'CREATED':16}  {'SIZE':>9}  {'FRAMES':>6}  PROMPT")
    for video in videos:
        prompt = video["prompt"] if len(video["prompt"]) <= 60 else video["prompt"][:57] + "..."
        say(
            f"{printable(video['id']):38}  {status_of(video):11}  {video['progress']:3}%  "
            f"{time_of(video['created_at']):16}  {printable(video['size']):>9}  {video['num_frames']:6}  "
            f"{printable(' '.join(prompt.split()))}"
        )


def cancel(arguments: argparse.Namespace) -> None:
    """Run ``pyramid-serve cancel``."""
    video = server_of(arguments).cancel(arguments.id)
    say(f"{printable(video['id'])}: {state_of(video)}")


def delete(arguments: argparse.Namespace) -> None:
    """Run ``pyramid-serve delete``."""
    server_of(arguments).delete(arguments.id)
    say(f"{arguments.id}: deleted")


def download(arguments: argparse.Namespace) -> None:
    """Run ``pyramid-serve download``."""
    variant = arguments.variant
    if variant is None:
        variant = "video" if arguments.output is None else variant_of(arguments.output)
    if arguments.at is not None and variant != "frame":
        raise ValueError(f"--at {arguments.at}: only for one frame, as --variant frame or an output that ends in .png")
    output = arguments.output or Path(f"{arguments.id}{ENDINGS[variant]}")
    check_file_output(output, ENDINGS[variant])
    server = server_of(arguments)
    video = server.get(arguments.id)
    if video["status"] != "completed":
        video = _wait(server, video, arguments)
    _write(server, video, output, variant, at=arguments.at)


def _wait(server: "Server", video: "Video", arguments: argparse.Namespace) -> "Video":
    """Wait for a video and show a progress bar; the finished video. ``ValueError`` with its error if it fails."""
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
    try:
        from tqdm import tqdm  # here, so that Ctrl-C during this slow import is handled too

        with tqdm(total=100, bar_format=bar_format, disable=None, leave=False) as bar:

            def show(now: "Video") -> None:
                bar.set_description_str(status_of(now).replace("_", " "), refresh=False)
                bar.set_postfix_str(outlook_of(now), refresh=False)
                bar.n = now["progress"]
                bar.refresh()

            video = server.wait(video["id"], show)
    except KeyboardInterrupt:
        video_id, at = printable(video["id"]), url_option(arguments.url)
        say(
            f"\n{video_id} goes on without you. To fetch it: pyramid-serve download {video_id}{at}\n"
            f"To stop it: pyramid-serve cancel {video_id}{at}",
            file=sys.stderr,
        )
        raise
    if video["status"] != "completed":
        raise ValueError(f"{video['id']}: {state_of(video)}")
    return video


def _write(server: "Server", video: "Video", output: Path, variant: str, *, at: str | None = None) -> None:
    server.download(video["id"], output, variant=variant, at=at)
    what = frames_of(video) if variant in OF_ALL_FRAMES else variant
    say(f"{output}: {what}, seed {video['seed']}")
    _say_truncation(video)


def _say_truncation(video: "Video") -> None:
    """Say on stderr that the text encoder did not read the whole prompt, if so."""
    truncated_at = video.get("prompt_truncated_at")
    if truncated_at is not None:
        from pyramid_serve.truncation import truncation_note

        note = truncation_note(video["prompt"] + video.get("prompt_suffix", ""), truncated_at)
        say(printable(f"note: {note}"), file=sys.stderr)
