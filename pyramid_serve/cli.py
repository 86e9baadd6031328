"""``pyramid-serve generate``: a video in this process, with no server.

The commands that need a server are added by ``deployments.cli``, whose ``main`` is what ``pyramid-serve`` runs.
What takes time to import is imported when a command runs.
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, get_args

from pyramid_serve.api.errors import RequestError
from pyramid_serve.api.limits import MAX_STEPS, RequestLimits
from pyramid_serve.cli_options import add_pipeline_options, add_request_options, pipeline_options_from, request_from
from pyramid_serve.dtypes import DTypeName
from pyramid_serve.families import Family, family_of, imported, known_families
from pyramid_serve.outputs import check_output
from pyramid_serve.served_model import ServedModel
from pyramid_serve.terminal import printable

Command = Callable[[argparse.Namespace], int | None]

INTERRUPTED = 130
READER_LEFT = 141
USER_ERROR = 2
OUR_ERROR = 1


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", families: Sequence[Family]) -> None:
    """Add ``generate`` to a command line; its namespace has the function to call as ``run``.

    families: those whose options it takes.
    """
    parser = commands.add_parser(
        "generate",
        help="make a video in this process",
        description="Make a video from a prompt, in this process. What is left out is the model's own choice.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("prompt")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("video.mp4"),
        help="by its ending: .mp4, .gif, .webp (animated), .png for a single picture, .zip of PNG files, "
        "none for a folder of PNG files",
    )
    parser.add_argument(
        "--model", default="shapes", help="a folder, an fsspec URL, a Hub id, or the model in the package"
    )
    parser.add_argument("--variant", help="which transformer of the model, such as 384p")
    parser.add_argument(
        "--family",
        metavar="MODULE:NAME",
        help="the import path of the model's family, where it does not come with this package",
    )
    add_request_options(parser, families)
    parser.add_argument("--dtype", choices=get_args(DTypeName), help="what suits the device unless given")
    parser.add_argument("--device", default="cpu", help="any torch device, such as cuda")
    add_pipeline_options(parser, families)
    parser.set_defaults(run=generate)


def generate(arguments: argparse.Namespace) -> None:
    """Run ``pyramid-serve generate``. Raises ``ValueError`` for what the user got wrong, before any work."""
    with _terminable():
        _generate(arguments)


def _generate(arguments: argparse.Namespace) -> None:
    # Everything cheap is checked before torch and the model are loaded.
    check_output(arguments.output)
    options = vars(arguments)
    families = families_of(options.get("family"))
    request = request_from(arguments, families)

    from tqdm import tqdm
    from transformers.utils import logging as transformers_logging

    from pyramid_serve.media.ffmpeg import EncodeError
    from pyramid_serve.media.pictures import read_picture
    from pyramid_serve.media.writers import check_video_path, write_video
    from pyramid_serve.precision import available_device

    output = check_video_path(arguments.output)
    image = None
    if request.input_reference is not None:
        image = read_picture(request.input_reference, name=f"--image {arguments.image}")
    device = available_device(arguments.device)
    family = family_of(arguments.model, options.get("family"))
    pipeline_options = pipeline_options_from(arguments, family, families)
    capabilities = family.capabilities(arguments.model, options.get("variant"))
    is_picture = output.suffix.lower() == ".png" and request.seconds is None and request.num_frames is None
    if is_picture:
        request = request.model_copy(update={"num_frames": 1})
    try:
        plan = ServedModel(arguments.model, family, capabilities, _no_limits()).plan(request)
    except RequestError as error:
        if is_picture and error.param == "num_frames":
            others = "name a .mp4, .gif, .webp or .zip, or a folder"
            raise ValueError(
                f"{output}: a .png holds one frame, and this model makes no single frame; {others}"
            ) from None
        raise
    if output.suffix.lower() == ".png" and plan.num_frames > 1:
        raise ValueError(f"{output}: a .png holds one frame, and this video has {plan.num_frames}; leave --seconds out")

    transformers_logging.disable_progress_bar()  # it would come between the user and our own
    pipeline = family.load_pipeline(
        arguments.model,
        variant=options.get("variant"),
        dtype=options.get("dtype"),
        device=device,
        options=pipeline_options,
    )
    print(f"{arguments.model} in {pipeline.description}", flush=True)
    with tqdm(total=plan.num_steps, unit="step", disable=None) as bar:

        def show(unit: int) -> None:
            bar.set_description(f"unit {unit + 1}/{plan.num_units}")
            bar.update()

        units = pipeline.stream(plan, picture=image, progress=show)
        try:
            write_video(units, output, fps=plan.fps)
        except (EncodeError, OSError) as error:
            reason = str(error).strip().rpartition("\n")[2]
            raise OSError(f"{output}: cannot be written: {reason}") from None
    print(f"{output}: {plan.num_frames} frames of {plan.size}, seed {plan.seed}")


def families_of(path: str | None) -> list[Family]:
    """The families that options are read for: the one at an import path, and those that come with the package."""
    return [*([] if path is None else [imported(path)]), *known_families()]


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, so that no half-written file is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _no_limits() -> RequestLimits:
    return RequestLimits(
        max_prompt_characters=10**9,
        max_pixels=10**12,
        max_num_units=10**9,
        max_num_inference_steps=MAX_STEPS,
        max_picture_bytes=10**12,
        max_picture_pixels=10**12,
    )


def run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> int:
    """Parse and run a command: 0, or the status that it returns; 2 with one line for what the user got wrong, or 130
    after Ctrl-C.

    141, without a message, if the reader of the output has gone, as `head` does.
    """
    parsed = parser.parse_args(arguments)
    command: Command = parsed.run
    try:
        status = command(parsed)
    except ValueError as error:
        print(f"pyramid-serve {parsed.command}: {printable(str(error))}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"pyramid-serve {parsed.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when Python ends
        return READER_LEFT
    except OSError as error:
        print(f"pyramid-serve {parsed.command}: {printable(str(error))}", file=sys.stderr)
        return OUR_ERROR
    return status or 0


class OneLineParser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: {message}\n")


def new_parser() -> tuple[argparse.ArgumentParser, "argparse._SubParsersAction[argparse.ArgumentParser]"]:
    """The parser of ``pyramid-serve``, and where commands are added."""
    said = "Text and pictures in, video out."
    parser: argparse.ArgumentParser = OneLineParser(prog="pyramid-serve", description=said)
    return parser, parser.add_subparsers(dest="command", required=True, metavar="command")


def main(arguments: Sequence[str] | None = None) -> int:
    """``pyramid-serve`` with the library's commands only."""
    parser, commands = new_parser()
    add_commands(commands, asked_families(arguments))
    return run(parser, arguments)


def asked_families(arguments: Sequence[str] | None) -> list[Family]:
    """The families that a command line asks for with ``--family``, and those that come with the package.

    They are needed before it is parsed, since the options depend on them. A path that leads to none is left for the
    command to refuse.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--family")
    try:
        return families_of(parser.parse_known_args(arguments)[0].family)
    except (ValueError, argparse.ArgumentError):
        return known_families()


if __name__ == "__main__":
    sys.exit(main())
