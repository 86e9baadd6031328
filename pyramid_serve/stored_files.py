"""Files under one storage root, on any fsspec URL, and every error of a filesystem as one class.

No reader ever sees half a file: it is written aside and moved (local), or put whole (object stores, memory). Errors of
an object store that may pass are waited out for a while (see ``patience``); those of a local disk are raised at once.

Paths are relative to the root, with ``/`` between their parts. The methods block.
"""

import errno
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from fsspec.implementations.local import LocalFileSystem

from pyramid_serve.filesystems import EXTRAS, filesystem_of, shown_root
from pyramid_serve.patience import Patience
from pyramid_serve.reasons import first_line
from pyramid_serve.whole_files import create_whole, make_folder, written_whole

Result = TypeVar("Result")

PATIENCE_S = 10.0
"""For how long the errors of an object store that may pass are waited out, unless another time is given."""
_MAX_REMOVALS = 5
_MAX_ASIDE_S = 3600.0
_MAX_PUT_FROM_MEMORY_BYTES = 32 * 1024**2
"""A local file up to this size is read before it is put elsewhere: filesystems put bytes whole, files in parts."""
_PROBE_BYTES = 4096
"""About the size of a record: fewer bytes may still fit on a disk that takes no record any more."""
_EXCLUSIVE = frozenset(("file", "local", "memory", *EXTRAS))
"""The protocols whose filesystems create a file only if it is absent, however many try at once."""


class StorageError(OSError):
    """The storage cannot be read or written now. ``errno`` is the system's, or ``EIO`` where it gave none."""

    def __str__(self) -> str:
        return str(self.strerror)


class StoredFiles:
    """The files under one root. Every method raises ``StorageError`` when the storage cannot be read or written."""

    def __init__(self, root: str, *, patience_s: float = PATIENCE_S) -> None:
        """``root``: a local path, or an fsspec URL such as ``s3://bucket/folder``; ``patience_s``: for how long errors
        that may pass are waited out, which is never done where the root is on a local disk.

        Raises ``ValueError`` for a URL that no installed filesystem serves.
        """
        self.root = root
        self._fs, self._root = filesystem_of(root)
        self.is_local = isinstance(self._fs, LocalFileSystem)
        """Whether the files are on a disk of this machine, or look so."""
        self._patience = Patience(0.0 if self.is_local else patience_s)
        self._probe = f"probe/{uuid4().hex}"

    def check(self) -> None:
        """Write a small file, read it back and delete it. Raises ``StorageError`` where any of that fails."""
        if self.is_local and os.path.lexists(self._root) and not os.path.isdir(self._root):
            kind = "a symbolic link to nothing" if os.path.islink(self._root) else "not a folder"
            raise self._error(errno.ENOTDIR, f"is {kind}")
        content = os.urandom(_PROBE_BYTES)
        self.put(self._probe, content)
        try:
            is_same = self.cat(self._probe) == content
        except FileNotFoundError:
            is_same = False
        self.remove(self._probe)
        if not is_same:
            raise self._error(errno.EIO, "does not give back what was written")

    # --- reading ----------------------------------------------------------------------------------------------------

    def cat(self, path: str, *, start: int | None = None, end: int | None = None) -> bytes:
        """The bytes of a file from ``start`` up to ``end``. Raises ``FileNotFoundError``."""
        if start is not None and end is not None and 0 <= end <= start:
            self.size(path)
            return b""  # HTTP has no empty ranges: object stores would send the whole file

        def cat() -> bytes:
            self._check_regular(path)
            content: bytes = self._fs.cat_file(self._at(path), start=start, end=end)
            return content

        return self._do("cannot be read", cat)

    def size(self, path: str) -> int:
        """Bytes of a file. Raises ``FileNotFoundError``."""

        def size() -> int:
            self._check_regular(path)
            return int(self._fs.info(self._at(path))["size"])

        return self._do("cannot be read", size)

    def exists(self, path: str) -> bool:
        """Whether a file or folder is there."""
        # Not the filesystem's own `exists`, which takes a file that it cannot look at for one that is not there.
        try:
            self._do("cannot be read", lambda: self._fs.info(self._at(path)))
        except FileNotFoundError:
            return False
        return True

    def names(self, folder: str) -> list[str]:
        """The names of what is in a folder, in no order; none where the folder is not there."""
        at = self._at(folder)
        try:
            paths: list[Any] = self._do("cannot be read", lambda: self._fs.ls(at, detail=False))
        except FileNotFoundError:
            return []
        return [_name_of(str(path)) for path in paths if _is_in(at, str(path))]

    def sizes(self, folder: str) -> dict[str, int]:
        """The bytes of each file in a folder by its name; none where the folder is not there."""
        at = self._at(folder)
        try:
            entries: list[dict[str, Any]] = self._do("cannot be read", lambda: self._fs.ls(at, detail=True))
        except FileNotFoundError:
            return {}
        sizes = {str(entry["name"]): int(entry["size"]) for entry in entries}
        return {_name_of(path): size for path, size in sizes.items() if _is_in(at, path)}

    # --- writing ----------------------------------------------------------------------------------------------------

    def put(self, path: str, content: bytes | Path) -> None:
        """Write a file, in place of one that is there; on a local disk it survives a crash when this returns.

        content: its bytes, or a local file with them, which may be larger than memory.
        """
        at = self._at(path)
        try:
            if self.is_local:
                self._do("cannot be written", lambda: self._put_locally(Path(at), content))
            elif isinstance(content, Path) and content.stat().st_size > _MAX_PUT_FROM_MEMORY_BYTES:
                self._do("cannot be written", lambda: self._fs.put_file(str(content), at))
            else:
                whole = content.read_bytes() if isinstance(content, Path) else content
                self._do("cannot be written", lambda: self._fs.pipe_file(at, whole))
        except FileNotFoundError as error:
            raise self._error(errno.ENOENT, f"cannot be written: {first_line(error)}") from error

    def create(self, path: str, content: bytes) -> None:
        """Write a file that is not there yet. Of several who try at once, one succeeds, if ``creates_exclusively``.

        Raises ``FileExistsError`` where there is a file with another content; one with this content is the caller's
        own, from a try whose answer was lost.
        """
        at = self._at(path)
        try:
            if self.is_local:
                self._do("cannot be written", lambda: self._create_locally(Path(at), content))
            else:
                self._do("cannot be written", lambda: self._fs.pipe_file(at, content, mode="create"))
        except FileNotFoundError as error:
            raise self._error(errno.ENOENT, f"cannot be written: {first_line(error)}") from error
        except StorageError:  # filesystems do not agree on the error for a file that is there
            try:
                found = self.cat(path)
            except FileNotFoundError:
                found = None
            if found is None:
                raise
            if found != content:
                raise FileExistsError(errno.EEXIST, f"storage {shown_root(self.root)}: {path}: there already") from None

    def creates_exclusively(self) -> bool:
        """Whether ``create`` lets one of several succeed, as far as that is known of the filesystem.

        Creates and removes a small file. Raises ``StorageError``.
        """
        protocols = self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,)
        if not _EXCLUSIVE.intersection(protocols):
            return False
        probe = f"probe/{uuid4().hex}"
        self.create(probe, b"first")
        try:
            self.create(probe, b"second")
        except FileExistsError:
            return True
        finally:
            self.remove(probe)
        return False

    def remove(self, path: str) -> None:
        """Remove a file; one that is gone already is no error."""
        with suppress(FileNotFoundError):  # someone else was faster
            self._do("cannot be written", lambda: self._fs.rm_file(self._at(path)))

    def remove_existing(self, path: str) -> None:
        """Remove a file. Raises ``FileNotFoundError`` where someone else was faster."""
        at = self._at(path)
        was_there = False

        def remove() -> None:
            nonlocal was_there
            try:
                self._fs.info(at)  # S3 says nothing of a file that is not there
                was_there = True
                self._fs.rm_file(at)
            except FileNotFoundError:
                if not was_there:
                    raise  # else a try whose answer was lost has removed it

        self._do("cannot be written", (lambda: self._fs.rm_file(at)) if self.is_local else remove)

    def is_odd(self, path: str) -> bool:
        """Whether something that is no file is in its place: a folder, a pipe, a link. Only of a local storage."""
        at = self._at(path)
        return self.is_local and os.path.lexists(at) and (os.path.islink(at) or not os.path.isfile(at))

    def remove_odd(self, path: str) -> None:
        """Remove what is in the place of a file but is none; of a link only the link. Raises ``StorageError``."""
        at = self._at(path)
        is_folder = os.path.isdir(at) and not os.path.islink(at)
        self._do("cannot be written", lambda: shutil.rmtree(at) if is_folder else os.unlink(at))

    def remove_folder(self, folder: str) -> None:
        """Remove a folder with all that is in it; one that is gone already is no error."""
        for attempt in range(_MAX_REMOVALS):
            try:
                self._do("cannot be written", lambda: self._remove_tree(self._at(folder)))
            except FileNotFoundError:
                return  # gone with its last file, or someone else was faster
            except StorageError as error:
                # A late writer has put one more file in between; see `VideoStore.delete`.
                if error.errno != errno.ENOTEMPTY or attempt == _MAX_REMOVALS - 1:
                    raise
            else:
                return

    def sweep_aside(self) -> None:
        """Remove what was left by writers that were killed before they could move it to its place."""
        if not self.is_local:
            return
        for path in Path(self._at("aside")).glob("*"):
            with suppress(FileNotFoundError):
                self._do("cannot be written", partial(_unlink_old, path))

    def _remove_tree(self, at: str) -> None:
        self._fs.rm(at, recursive=True)
        if not self.is_local and self._fs.find(at):  # s3fs is silent about files that S3 did not remove
            raise OSError(errno.EBUSY, "not all files are removed")

    def _put_locally(self, path: Path, content: bytes | Path) -> None:
        with written_whole(path, aside=self._aside_for(path)) as opened:
            if isinstance(content, Path):
                with content.open("rb") as source:
                    shutil.copyfileobj(source, opened)
            else:
                opened.write(content)

    def _create_locally(self, path: Path, content: bytes) -> None:
        create_whole(path, content, aside=self._aside_for(path))

    def _aside_for(self, path: Path) -> Path:
        """Where to write a file before it is moved to its path. The folders of both are made."""
        aside = Path(self._at(f"aside/{uuid4().hex}"))
        for folder in (aside.parent, path.parent):
            make_folder(folder)
        return aside

    def _check_regular(self, path: str) -> None:
        """Raise ``StorageError`` for a local path that is no regular file in its own folder; a pipe would never end.

        The folders at the root may be links, so that an administrator can spread them over disks.
        """
        if not self.is_local:
            return
        at = self._at(path)
        if not stat.S_ISREG(os.stat(at).st_mode):
            raise self._error(errno.EINVAL, "cannot be read: not a regular file")
        top, _, rest = path.partition("/")
        if os.path.realpath(at) != os.path.join(os.path.realpath(self._at(top)), rest).rstrip("/"):
            raise self._error(errno.EINVAL, "cannot be read: a link to another place")

    # --- paths and errors -------------------------------------------------------------------------------------------

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _do(self, problem: str, work: Callable[[], Result]) -> Result:
        """What some work with the filesystem returns; it is done again where its errors may pass.

        Errors are raised as ``StorageError``, except for a file that is not there.
        """
        try:
            return self._patience.wait_out(work)
        except (FileNotFoundError, StorageError):
            raise
        except Exception as error:  # each object store raises classes of its own
            number = error.errno if isinstance(error, OSError) else None
            # S3's own words for errors that have the number of another; without the path, which local ones would name.
            reason = error.strerror if isinstance(error, OSError) and isinstance(error.strerror, str) else None
            raise self._error(number or errno.EIO, f"{problem}: {reason or first_line(error)}") from error

    def _error(self, number: int, problem: str) -> StorageError:
        return StorageError(number, f"storage {shown_root(self.root)}: {problem}")


def check_root(root: str, *, timeout_s: float = 30.0) -> None:
    """Raises ``ValueError`` for a storage that cannot be written, read and deleted from, or does not answer in time."""
    problems: list[str] = []

    def check() -> None:
        try:
            StoredFiles(root).check()
        except (ValueError, StorageError) as error:
            problems.append(str(error))
        except Exception as error:  # of a filesystem that is set up wrongly; each raises classes of its own
            problems.append(f"storage {shown_root(root)}: {type(error).__name__}: {first_line(error)}")

    thread = threading.Thread(target=check, daemon=True)  # an object store that is away can hang for minutes
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise ValueError(f"storage {shown_root(root)}: no answer within {timeout_s:.0f} s")
    if problems:
        raise ValueError(problems[0])


def _name_of(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _is_in(folder: str, path: str) -> bool:
    """False for the empty object by which consoles of object stores stand for a folder: ``FOLDER/``."""
    return path.rstrip("/") != folder


def _unlink_old(path: Path) -> None:
    if path.stat().st_mtime < time.time() - _MAX_ASIDE_S:
        path.unlink()
