"""What a server gives of a finished video, and the endings of the files that it is written to."""

from pathlib import Path

from pyramid_serve.outputs import check_file_output

ENDINGS = {
    "video": ".mp4",
    "gif": ".gif",
    "webp": ".webp",
    "frame": ".png",
    "frames": ".zip",
    "thumbnail": ".webp",
    "spritesheet": ".webp",
}
"""By the name of the variant."""
LONG = ("gif", "webp", "frames")
"""Those that a server takes long to make when they are first asked for."""
OF_ALL_FRAMES = ("video", *LONG)
TOLD = ".mp4, .gif, .webp (animated), .png (the first frame) or .zip (all frames as PNG)"

_BY_ENDING = {".mp4": "video", ".gif": "gif", ".webp": "webp", ".png": "frame", ".zip": "frames"}


def variant_of(output: Path) -> str:
    """What to write to a path, by its ending. Raises ``ValueError`` for another one, or if no file can be written."""
    ending = output.suffix.lower()
    if ending not in _BY_ENDING:
        raise ValueError(f"{output}: must end in {TOLD}")
    check_file_output(output, ending)
    return _BY_ENDING[ending]
