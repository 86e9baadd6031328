"""Local files that are never seen half written: they are written aside, then moved to their place.

What was written survives a crash of the machine: the file is on the disk before it is moved, and its new name is there
when the call returns. The same is true of folders that are created here.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

_ASIDE = ".pyramid-serve-"
ASIDE_PATTERN = f"{_ASIDE}*"
"""The names of what processes that were killed have left beside the files that they wrote."""
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP)
"""The errors of filesystems that have no such operation for a folder; they keep its entries in some other way."""
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
"""The errors of filesystems that have no hard links."""


def aside_of(path: Path) -> Path:
    """An unused path in the same folder, with a name of a length that any filesystem takes."""
    return path.absolute().parent / f"{_ASIDE}{uuid4().hex}"


@contextmanager
def written_whole(path: Path, *, aside: Path | None = None) -> Iterator[BinaryIO]:
    """A new file, open for writing and reading, that takes the place of ``path`` as in ``replaced_whole``."""
    with replaced_whole(path, aside=aside) as beside, beside.open("x+b") as opened:
        yield opened


def create_whole(path: Path, content: bytes, *, aside: Path | None = None) -> None:
    """Write a file that is not there yet; of several who try at once, one succeeds.

    aside: as in ``replaced_whole``. Raises ``FileExistsError`` where it is there, and ``OSError``.
    """
    aside = aside_of(path) if aside is None else aside
    try:
        with aside.open("xb") as opened:
            opened.write(content)
        _sync(aside)
        try:
            os.link(aside, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with path.open("xb") as opened:  # a reader may see it half written, but only one writer succeeds
                opened.write(content)
            _sync(path)
        _sync(path.absolute().parent)
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


@contextmanager
def replaced_whole(path: Path, *, aside: Path | None = None) -> Iterator[Path]:
    """A path at which to write the file that takes the place of ``path`` when the block ends well.

    Nothing is left of it where the block does not. aside: that path, on the same filesystem; in the same folder unless
    given. Raises ``OSError``.
    """
    aside = aside_of(path) if aside is None else aside
    try:
        yield aside
        move_whole(aside, path)
    finally:
        with suppress(OSError):  # what went wrong before is what matters
            aside.unlink(missing_ok=True)


def move_whole(aside: Path, path: Path) -> None:
    """Move a file that is completely written to its place, once it is on the disk. Raises ``OSError``."""
    _sync(aside)
    os.replace(aside, path)
    _sync(path.absolute().parent)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents where they are missing, so that they survive a crash. Raises ``OSError``."""
    try:
        folder.mkdir()
    except FileNotFoundError:
        if folder.parent == folder:
            raise
        make_folder(folder.parent)
        make_folder(folder)
    except OSError:
        if not folder.is_dir():
            raise
    else:
        _sync(folder.parent)


def _sync(path: Path) -> None:
    """Wait until the content of a file, or the entries of a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(opened)
