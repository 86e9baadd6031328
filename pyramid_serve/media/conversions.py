"""A finished MP4 in other forms: GIF, animated WebP, one frame as PNG, all frames as PNG in a ZIP.

The same video always gives the same bytes. Memory holds the MP4 and what ffmpeg needs; the results are files.
"""

import math
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import IO

from pyramid_serve.media.ffmpeg import EncodeError, run_ffmpeg

CONVERT_TIMEOUT_S = 900.0
"""Ten seconds of 1280x768 take minutes as GIF on one core; the rest is for a machine under load."""

WEBP_QUALITY = 85
"""Of 100, lossy."""

# A palette for each frame: the colours are good, and encoding need not wait for the last frame.
_PALETTES = "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1"
# WebP's own conversion from RGB, since players expect its matrix and not the MP4's.
_WEBP = ("-c:v", "libwebp_anim", "-pix_fmt", "bgra", "-quality", str(WEBP_QUALITY), "-loop", "0", "-f", "webp")
_STORED_AT = (1980, 1, 1, 0, 0, 0)
"""The time of files in a ZIP, the first that it can say: bytes must not depend on the clock."""


def gif_options(fps: float) -> tuple[str, ...]:
    """ffmpeg's output options for a GIF that loops for ever.

    Delays count in 10 ms, so at 8 frames per second they alternate between 130 and 120 ms. ffmpeg rounds the time of
    each frame; how long the last one is shown is given here, so that a turn takes as long as the video within 10 ms.
    """
    return ("-lavfi", _PALETTES, "-loop", "0", "-final_delay", str(math.ceil(100 / fps - 0.5)), "-f", "gif")


def webp_options() -> tuple[str, ...]:
    """ffmpeg's output options for an animated WebP that loops for ever, lossy with ``WEBP_QUALITY``."""
    return _WEBP


def write_gif(video: bytes, path: Path, *, fps: float) -> None:
    """Write an MP4 as a GIF. Raises ``EncodeError``, also for a path that cannot be written."""
    _convert(video, *gif_options(fps), f"file:{path}")


def write_webp(video: bytes, path: Path) -> None:
    """Write an MP4 as an animated WebP. Raises ``EncodeError``, also for a path that cannot be written."""
    _convert(video, *webp_options(), f"file:{path}")


def write_frame(video: bytes, path: Path, index: int) -> None:
    """Write frame ``index`` of an MP4, from 0 on, as PNG. Raises ``EncodeError``, also where there is no such frame."""
    one = ("-vf", f"select='eq(n,{index})'", "-frames:v", "1", "-c:v", "png", "-f", "image2pipe")
    _convert(video, *one, f"file:{path}")
    if not path.stat().st_size:
        raise EncodeError(f"ffmpeg found no frame {index} in the video")


def write_frames(video: bytes, path: Path) -> None:
    """Write all frames of an MP4 as PNG to a ZIP: ``00000.png`` and so on. Raises ``EncodeError`` and ``OSError``."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        names = f"{folder.replace('%', '%%')}/%05d.png"
        _convert(video, "-start_number", "0", "-c:v", "png", "-f", "image2", f"file:{names}")
        with zipfile.ZipFile(path, "w") as packed:
            for file in sorted(Path(folder).iterdir()):
                with file.open("rb") as frame, new_entry(packed, file.name) as entry:
                    shutil.copyfileobj(frame, entry)


def new_entry(packed: zipfile.ZipFile, name: str) -> IO[bytes]:
    """A file in a ZIP to be written, not compressed: it holds PNG, which is already."""
    return packed.open(zipfile.ZipInfo(name, _STORED_AT), "w")


def _convert(video: bytes, *output: str) -> None:
    run_ffmpeg(["-i", "pipe:0", *output], stdin=video, timeout_s=CONVERT_TIMEOUT_S)
