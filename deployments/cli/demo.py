"""``pyramid-serve demo``: make one video with the whole pipeline on this machine, and show the pipeline at work."""

import io
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from PIL import Image

from deployments.cli.answers import Video
from deployments.cli.printing import duration, frames_of, reason_of
from deployments.cli.server import Server
from deployments.cli.variants import variant_of
from deployments.local.chart import timeline_chart
from deployments.telemetry.timelines import hidden_share
from pyramid_serve.api import Stage, TimelineEntry
from pyramid_serve.outputs import written_aside
from pyramid_serve.terminal import printable

if TYPE_CHECKING:
    from deployments.local.cluster import LocalApp

PROMPT = "a red circle moves right on a black background"

_BAR_CHARACTERS = 24
_INTERVAL_S = 0.2
_ROWS = {
    "text encoder": Stage.ENCODE,
    "denoiser": Stage.DENOISE,
    "decoder": Stage.DECODE,
    "saved": Stage.SAVE,
}


def timeline_of(video: Video) -> list[TimelineEntry]:
    """The timeline of a video object, safe to print. Keys that a later server may add to entries are left out."""
    return [
        TimelineEntry(
            stage=entry["stage"],
            unit=entry["unit"],
            start=entry["start"],
            end=entry["end"],
            replica=printable(entry["replica"]),
        )
        for entry in video["timeline"]
    ]


def make(server: Server, prompt: str, output: Path, *, out: TextIO = sys.stdout) -> None:
    """Make a video over HTTP, show its progress, and write it to ``output``, with a sheet of its frames beside it.

    Raises ``ValueError`` if the video fails.
    """
    started = time.monotonic()
    video = server.submit({"prompt": prompt})
    print(f'POST {server.url}/v1/videos  "{printable(prompt)}"', file=out)
    rows = LiveRows(out)
    video = server.wait(video["id"], lambda now: rows.show(deployment_rows(now)), interval_s=_INTERVAL_S)
    seconds = time.monotonic() - started
    if video["status"] != "completed":
        raise ValueError(f"{video['id']} failed: {reason_of(video)}")
    server.download(video["id"], output, variant=variant_of(output))
    sheet = output.with_suffix(".png")
    picture = Image.open(io.BytesIO(server.content(video["id"], variant="spritesheet")))
    with written_aside(sheet) as opened:
        picture.save(opened, format="PNG")
    took = duration(seconds, num_decimals=1)
    print(f"{output}: {frames_of(video)}, {video['fps']} fps, in {took}", file=out)
    print(f"{sheet}: its frames side by side\n", file=out)
    print(summary(video), file=out)


def summary(video: Video) -> str:
    """The chart of a video's timeline, and how much of the decoding ran while later units were denoised."""
    timeline = timeline_of(video)
    width = min(shutil.get_terminal_size((100, 24)).columns - 1, 160)
    chart = timeline_chart(timeline, width=width)
    share = hidden_share(timeline)
    if share is None:
        return f"Which unit was where, when:\n{chart}"
    hidden = f"{share:.0%} of the decoding, the last unit's aside, ran while later units were denoised."
    return f"Which unit was where, when:\n{chart}\n\n{hidden}"


def deployment_rows(video: Video) -> list[str]:
    """A line for each deployment, with its progress on the video."""
    num_units = int(video["num_units"])
    done = {stage: len({entry["unit"] for entry in video["timeline"] if entry["stage"] == stage}) for stage in Stage}
    is_over = video["status"] == "completed"
    lines = []
    for name, stage in _ROWS.items():
        total = 1 if stage is Stage.ENCODE else num_units
        number = total if is_over else min(done[stage], total)
        part = number / total
        if stage is Stage.DENOISE and not is_over:
            part = max(part, int(video["progress"]) / 100)
        noun = "prompts" if stage is Stage.ENCODE else "units"
        lines.append(f"  {name:13} {bar(part)} {number}/{total} {noun}")
    return lines


def bar(part: float) -> str:
    filled = round(part * _BAR_CHARACTERS)
    return "[" + "#" * filled + "-" * (_BAR_CHARACTERS - filled) + "]"


class LiveRows:
    """Lines on a terminal that are drawn over in place. Other lines may be printed in between, from any thread."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lines: Sequence[str] = ()
        self._lock = threading.Lock()

    def show(self, lines: Sequence[str]) -> None:
        with self._lock:
            if not self._out.isatty() or lines == self._lines:
                return
            up = f"\x1b[{len(self._lines)}A" if self._lines else ""
            self._out.write(up + "".join(f"\x1b[2K{line}\n" for line in lines))
            self._out.flush()
            self._lines = list(lines)

    def say(self, line: str) -> None:
        """Print a line that stays. The rows are drawn below it from then on."""
        with self._lock:
            self._out.write(f"{line}\n")
            self._out.flush()
            self._lines = ()


def status_rows(statuses: Mapping[str, str]) -> list[str]:
    """A line for each deployment, with its status while the app starts."""
    return [f"  {name:13} {status.lower()}" for name, status in statuses.items()]


@contextmanager
def demo_app() -> Iterator["LocalApp"]:
    """The default app on a free port, with its videos in a temporary folder."""
    from deployments.config import AppConfig
    from deployments.local.cluster import DEFAULT_HOST, LocalApp, free_port

    with tempfile.TemporaryDirectory(prefix="pyramid-serve-demo-", ignore_cleanup_errors=True) as storage:
        yield LocalApp(AppConfig(storage=storage), DEFAULT_HOST, free_port())
