"""Files that a command writes: it finds out before the work whether they can be written, and they appear whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pyramid_serve.whole_files import aside_of, written_whole


def check_output(output: Path) -> None:
    """Raises ``ValueError`` where a path cannot be written. Tries it with a file beside it, which is removed."""
    parent = output.absolute().parent
    if not parent.is_dir():
        raise ValueError(f"{output}: no folder {output.parent}")
    try:
        os.lstat(output)
    except FileNotFoundError:
        pass  # as it should be
    except OSError as error:
        raise ValueError(f"{output}: cannot be written: {error.strerror}") from None
    aside = aside_of(output)
    try:
        aside.open("xb").close()
        aside.unlink()
    except OSError as error:
        raise ValueError(f"{output}: {output.parent} cannot be written to: {error.strerror}") from None


@contextmanager
def written_aside(output: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``output`` when the block ends well. Nothing is left where it does not.

    Raises ``ValueError`` where the file cannot be written.
    """
    try:
        with written_whole(output) as opened:
            yield opened
    except OSError as error:
        raise ValueError(f"{output}: cannot be written: {error.strerror or error}") from None
