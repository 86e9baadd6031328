"""Files that a command writes: whether they can be written is found before the work, and they appear whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4


def check_output(output: Path) -> None:
    """``ValueError`` where no file or folder can be put at a path. Tries it with a file beside it, which is removed."""
    parent = output.absolute().parent
    if not parent.is_dir():
        raise ValueError(f"{output}: no folder {output.parent}")
    try:
        os.lstat(output)
    except FileNotFoundError:
        pass  # as it should be
    except OSError as error:
        raise ValueError(f"{output}: cannot be written: {error.strerror}") from None
    aside = _aside(output)
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
    aside = _aside(output)
    try:
        with aside.open("x+b") as opened:
            yield opened
        os.replace(aside, output)
    except OSError as error:
        raise ValueError(f"{output}: cannot be written: {error.strerror or error}") from None
    finally:
        aside.unlink(missing_ok=True)


def _aside(output: Path) -> Path:
    """A name of its own in the same folder, of a length that any filesystem takes."""
    return output.absolute().parent / f".pyramid-serve-{uuid4().hex}"
