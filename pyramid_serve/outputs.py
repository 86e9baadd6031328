"""Files that a command writes: checked before the work, and complete when they appear."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pyramid_serve.whole_files import written_whole


def check_output(output: Path) -> None:
    """Raise ``ValueError`` if no file or folder can be written at a path.

    To find out, it creates a file beside it, without a name where the filesystem can do that.
    """
    parent = output.absolute().parent
    if not parent.is_dir():
        raise ValueError(f"{output}: no folder {output.parent}")
    try:
        os.lstat(output)
    except FileNotFoundError:
        pass  # as it should be
    except OSError as error:
        raise ValueError(f"{output}: cannot be written: {error.strerror}") from None
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise ValueError(f"{output}: {output.parent} cannot be written to: {error.strerror}") from None


def check_file_output(output: Path, suffix: str) -> None:
    """Raise ``ValueError`` if a file with this ending cannot be written there."""
    if output.suffix.lower() != suffix:
        raise ValueError(f"{output}: must end in {suffix}")
    check_output(output)
    if output.is_dir():
        raise ValueError(f"{output}: is a folder")


@contextmanager
def written_aside(output: Path) -> Iterator[BinaryIO]:
    """A file that replaces ``output`` at the end of the block. If the block raises, nothing is left of it.

    Raises ``ValueError`` if the file cannot be written.
    """
    try:
        with written_whole(output) as opened:
            yield opened
    except OSError as error:
        raise ValueError(f"{output}: cannot be written: {error.strerror or error}") from None
