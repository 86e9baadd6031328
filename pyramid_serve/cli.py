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
from typing import TYPE_CHECKING, NoReturn

from pyramid_serve.outputs import check_output
from pyramid_serve.terminal import printable

if TYPE_CHECKING:
    from pyramid_serve import api

Command = Callable[[argparse.Namespace], None]

INTERRUPTED = 130
READER_LEFT = 141
USER_ERROR = 2
OUR_ERROR = 1


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``generate`` to a command line; its namespace has the function to call as ``run``."""
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
        help="by its ending: .mp4, .gif, .png for a single picture, none for a folder of PNG files",
    )
    parser.add_argument(
        "--model", default="shapes", help="a folder, an fsspec URL, a Hub id, or the model in the package"
    )
    parser.add_argument("--variant", help="which transformer of the model, such as 384p")
    add_request_arguments(parser)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="what suits the device unless given"
    )
    parser.add_argument("--device", default="cpu", help="any torch device, such as cuda")
    parser.add_argument("--attention", choices=("dense", "blocks", "flex"), help="flex on CUDA, else blocks")
    parser.add_argument(
        "--tiling",
        type=int,
        nargs="?",
        const=256,
        metavar="PIXELS",
        help="tile the VAE, slower, in less device memory (256)",
    )
    parser.add_argument(
        "--offload",
        choices=("none", "model", "layers"),
        default="none",
        help="for small GPUs: keep a model, or only a layer, on the device at a time",
    )
    parser.set_defaults(run=generate)


def add_request_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that make a request, the same in this process and for a server. Checked by ``api``."""
    parser.add_argument("--image", type=Path, metavar="FILE", help="a picture that the video begins with")
    parser.add_argument("--seconds", metavar="S", help="brought to the nearest length that can be made")
    parser.add_argument("--size", metavar="WxH", help="in pixels")
    parser.add_argument(
        "--seed", metavar="N", help="the same seed gives the same video; drawn unless given, and for -1"
    )
    parser.add_argument("--negative-prompt", metavar="TEXT")
    parser.add_argument("--prompt-suffix", metavar="TEXT", help="added to the prompt")
    parser.add_argument("--steps", dest="num_inference_steps", metavar="N", help="of the first unit: N, or N,N,N")
    parser.add_argument("--video-steps", dest="video_num_inference_steps", metavar="N", help="of the others")
    parser.add_argument("--guidance-scale", metavar="G", help="of the first unit")
    parser.add_argument("--video-guidance-scale", metavar="G", help="of the others")
    parser.add_argument(
        "--linear-guidance-alpha",
        metavar="A",
        help="instead: guidance falls by A with each unit; 0.5 where only the minimum is given",
    )
    parser.add_argument(
        "--linear-guidance-minimum", metavar="G", help="where it stops falling; 2 where only alpha is given"
    )


def request_from(arguments: argparse.Namespace) -> "api.VideoRequest":
    """The request that the arguments make. ``RequestError`` names what is wrong; ``ValueError`` a missing picture."""
    from pyramid_serve import api

    given = {name: value for name, value in vars(arguments).items() if name in api.VideoRequest.model_fields}
    image: Path | None = getattr(arguments, "image", None)
    if image is not None:
        try:
            given["input_reference"] = image.read_bytes()
        except OSError as error:
            raise ValueError(f"{image}: cannot be read: {error.strerror}") from None
    return api.parse_request({name: value for name, value in given.items() if name != "model"})


def generate(arguments: argparse.Namespace) -> None:
    """Run ``pyramid-serve generate``. Raises ``ValueError`` for what the user got wrong, before any work."""
    # Everything cheap is checked before torch and the model are loaded.
    request = request_from(arguments)
    check_output(arguments.output)

    from tqdm import tqdm
    from transformers.utils import logging as transformers_logging

    from pyramid_serve import api, checkpoints
    from pyramid_serve.media.ffmpeg import EncodeError
    from pyramid_serve.media.pictures import read_picture
    from pyramid_serve.media.writers import check_video_path, write_video
    from pyramid_serve.precision import available_device
    from pyramid_serve.pyramid_flow.autoencoder import Tiling
    from pyramid_serve.pyramid_flow.pipeline import Progress, PyramidFlow, VideoInput
    from pyramid_serve.pyramid_flow.shapes import FRAMES_PER_SECOND

    options = vars(arguments)
    output = check_video_path(arguments.output)
    image = None
    if request.input_reference is not None:
        image = read_picture(request.input_reference, name=f"--image {arguments.image}")
    tiling = Tiling(options["tiling"]) if "tiling" in options else None
    device = available_device(arguments.device)
    capabilities = checkpoints.capabilities(arguments.model, options.get("variant"))
    if output.suffix.lower() == ".png" and request.seconds is None:
        request = request.model_copy(update={"seconds": 1 / 24})
    spec = api.resolve(request, capabilities, model=arguments.model, limits=_no_limits())
    if output.suffix.lower() == ".png" and spec.num_frames > 1:
        raise ValueError(f"{output}: a .png holds one frame, and this video has {spec.num_frames}; leave --seconds out")

    transformers_logging.disable_progress_bar()  # it would come between the user and our own
    pipeline = PyramidFlow.from_pretrained(
        arguments.model,
        variant=options.get("variant"),
        dtype=options.get("dtype"),
        device=device,
        attention=options.get("attention"),
        offload=arguments.offload,
    )
    print(f"{arguments.model} in {pipeline.precision.name} on {device}: {pipeline.precision.reason}", flush=True)
    with tqdm(total=spec.num_steps, unit="step", disable=None) as bar:

        def show(progress: Progress) -> None:
            bar.set_description(f"unit {progress.unit + 1}/{progress.num_units}")
            bar.update()

        video = VideoInput(spec.prompt, seed=spec.seed, image=image)
        units = pipeline.stream([video], spec.settings, tiling=tiling, progress=show)
        try:
            with _terminable():
                write_video((frames[0] for frames in units), output, fps=FRAMES_PER_SECOND)
        except (EncodeError, OSError) as error:
            reason = str(error).strip().rpartition("\n")[2]
            raise OSError(f"{output}: cannot be written: {reason}") from None
    print(f"{output}: {spec.num_frames} frames of {spec.size}, seed {spec.seed}")


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


def _no_limits() -> "api.RequestLimits":
    from pyramid_serve import api

    return api.RequestLimits(
        max_prompt_characters=10**9,
        max_pixels=10**12,
        max_num_latent_frames=10**9,
        max_num_inference_steps=api.MAX_STEPS,
        max_picture_bytes=10**12,
        max_picture_pixels=10**12,
    )


def run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> int:
    """Parse and run a command: 0, or 2 with one line for what the user got wrong, or 130 after Ctrl-C.

    141 without a word where who read the output has left, as `head` does.
    """
    parsed = parser.parse_args(arguments)
    command: Command = parsed.run
    try:
        command(parsed)
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
    return 0


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

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
    add_commands(commands)
    return run(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
