"""What the commands print: durations, sizes, times and states in words, with control characters made harmless."""

import sys
from datetime import datetime
from typing import TYPE_CHECKING, TextIO

from pyramid_serve.terminal import printable, printable_lines

if TYPE_CHECKING:
    from deployments.cli.answers import Video

DEFAULT_URL = "http://127.0.0.1:8000"


def say(text: str, *, file: TextIO | None = None) -> None:
    """Print a text of one or more lines, on stdout unless ``file`` is given."""
    print(printable_lines(text), file=file or sys.stdout, flush=True)


def url_option(url: str) -> str:
    """The option that a suggested command needs in order to reach the same server, with a space before it."""
    return "" if url == DEFAULT_URL else f" --url {url}"


def duration(seconds: float, *, num_decimals: int = 0) -> str:
    """``12 s``."""
    return f"{seconds:.{num_decimals}f} s"


def status_of(video: "Video") -> str:
    """The status of a video; a cancelled one, whose status is ``failed``, is ``cancelled``."""
    is_cancelled = video["error"] is not None and video["error"]["code"] == "cancelled"
    return "cancelled" if is_cancelled else str(video["status"])


def frames_of(video: "Video") -> str:
    """``49 frames of 128x64``."""
    return f"{video['num_frames']} frames of {printable(video['size'])}"


def state_of(video: "Video") -> str:
    """The status in words, with the progress, the outlook or the error."""
    if video["status"] == "failed" and status_of(video) != "cancelled":
        return f"failed: {reason_of(video)}"
    if video["status"] in ("completed", "failed"):
        return status_of(video)
    outlook = outlook_of(video)
    return f"{video['status'].replace('_', ' ')}, {video['progress']}% done" + (f", {outlook}" if outlook else "")


def reason_of(video: "Video") -> str:
    """The reason why a video failed."""
    return "no reason given" if video["error"] is None else printable(video["error"]["message"])


def outlook_of(video: "Video") -> str:
    """The place in the queue and the time left, as far as they are known; otherwise empty."""
    parts = []
    if video["queue_position"] is not None:
        ahead = video["queue_position"]
        parts.append("next in the queue" if ahead == 0 else f"{ahead} ahead in the queue")
    if video["eta_seconds"] is not None:
        parts.append(f"about {duration(max(video['eta_seconds'], 1))} left")
    return ", ".join(parts)


def time_of(seconds: float) -> str:
    """A time in seconds since 1970 as local time, ``2025-11-28 16:05``."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
