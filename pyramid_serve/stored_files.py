"""Files under one storage root, on any fsspec URL, and every error of a filesystem as one class.

No reader ever sees half a file: it is written aside and moved (local), or put whole (object stores, memory).

Paths are relative to the root, with ``/`` between their parts. The methods block.
"""

import errno
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pyramid_serve.reasons import first_line
from pyramid_serve.whole_files import create_whole, make_folder, written_whole

_MAX_REMOVALS = 5
_MAX_ASIDE_S = 3600.0
_PROBE_BYTES = 4096
"""About the size of a record: fewer bytes may still fit on a disk that takes no record any more."""
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*:\S*@")
_EXTRAS = {
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("abfs", "abfss", "adl", "az"), "azure"),
}
"""The extra of this package that installs the filesystem of a protocol."""
_EXCLUSIVE = frozenset(("file", "local", "memory", *_EXTRAS))
"""The protocols whose filesystems create a file only if it is absent, however many try at once."""


def mask_credentials(text: str) -> str:
    """A text in which the credentials of URLs, such as ``s3://key:secret@bucket``, are ``***``."""
    return _CREDENTIALS.sub("***@", text)


def shown_root(root: str) -> str:
    """A storage root for people to read: credentials and query parameters of a URL are masked."""
    return root if "://" not in root else re.sub(r"\?.*", "?***", mask_credentials(root))


class StorageError(OSError):
    """The storage cannot be read or written now. ``errno`` is the system's, or ``EIO`` where it gave none."""

    def __str__(self) -> str:
        return str(self.strerror)


class StoredFiles:
    """The files under one root. Every method raises ``StorageError`` when the storage cannot be read or written."""

    def __init__(self, root: str) -> None:
        """``root``: a local path, or an fsspec URL such as ``s3://bucket/folder``.

        Raises ``ValueError`` for a URL that no installed filesystem serves.
        """
        self.root = root
        url = os.path.abspath(root) if "://" not in root else root
        try:
            self._fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)  # others write here too
        except ImportError as error:
            extra = _EXTRAS.get(root.partition("://")[0].lower())
            remedy = str(error) if extra is None else f'pip install "pyramid-serve[{extra}]"'
            raise ValueError(f"storage {shown_root(root)}: its filesystem is not installed: {remedy}") from None
        except ValueError as error:
            raise ValueError(f"storage {shown_root(root)}: {error}") from None
        self._root = str(path).rstrip("/")
        self._is_local = isinstance(self._fs, LocalFileSystem)
        self._probe = f"probe/{uuid4().hex}"

    def check(self) -> None:
        """Write a small file, read it back and delete it. Raises ``StorageError`` where any of that fails."""
        if self._is_local and os.path.lexists(self._root) and not os.path.isdir(self._root):
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
        with self._accessing("cannot be read"):
            self._check_regular(path)
            content: bytes = self._fs.cat_file(self._at(path), start=start, end=end)
        return content

    def size(self, path: str) -> int:
        """Bytes of a file. Raises ``FileNotFoundError``."""
        with self._accessing("cannot be read"):
            self._check_regular(path)
            return int(self._fs.info(self._at(path))["size"])

    def exists(self, path: str) -> bool:
        """Whether a file or folder is there."""
        # Not the filesystem's own `exists`, which takes a file that it cannot look at for one that is not there.
        try:
            with self._accessing("cannot be read"):
                self._fs.info(self._at(path))
        except FileNotFoundError:
            return False
        return True

    def names(self, folder: str) -> list[str]:
        """The names of what is in a folder, in no order; none where the folder is not there."""
        try:
            with self._accessing("cannot be read"):
                entries: list[Any] = self._fs.ls(self._at(folder), detail=False)
        except FileNotFoundError:
            return []
        return [_name_of(str(entry)) for entry in entries]

    def sizes(self, folder: str) -> dict[str, int]:
        """The bytes of each file in a folder by its name; none where the folder is not there."""
        try:
            with self._accessing("cannot be read"):
                entries: list[dict[str, Any]] = self._fs.ls(self._at(folder), detail=True)
        except FileNotFoundError:
            return {}
        return {_name_of(str(entry["name"])): int(entry["size"]) for entry in entries}

    # --- writing ----------------------------------------------------------------------------------------------------

    def put(self, path: str, content: bytes) -> None:
        """Write a file, in place of one that is there; on a local disk it survives a crash when this returns."""
        try:
            with self._accessing("cannot be written"):
                if self._is_local:
                    self._put_locally(Path(self._at(path)), content)
                else:
                    self._fs.pipe_file(self._at(path), content)
        except FileNotFoundError as error:
            raise self._error(errno.ENOENT, f"cannot be written: {first_line(error)}") from error

    def create(self, path: str, content: bytes) -> None:
        """Write a file that is not there yet. Of several who try at once, one succeeds, if ``creates_exclusively``.

        Raises ``FileExistsError`` where there is a file with another content; one with this content is the caller's
        own, from a try whose answer was lost.
        """
        try:
            with self._accessing("cannot be written"):
                if self._is_local:
                    self._create_locally(Path(self._at(path)), content)
                else:
                    self._fs.pipe_file(self._at(path), content, mode="create")
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
            self.remove_existing(path)

    def remove_existing(self, path: str) -> None:
        """Remove a file. Raises ``FileNotFoundError`` where someone else was faster."""
        with self._accessing("cannot be written"):
            self._fs.rm_file(self._at(path))

    def is_odd(self, path: str) -> bool:
        """Whether something that is no file is in its place: a folder, a pipe, a link. Only of a local storage."""
        at = self._at(path)
        return self._is_local and os.path.lexists(at) and (os.path.islink(at) or not os.path.isfile(at))

    def remove_odd(self, path: str) -> None:
        """Remove what is in the place of a file but is none; of a link only the link. Raises ``StorageError``."""
        at = self._at(path)
        with self._accessing("cannot be written"):
            if os.path.isdir(at) and not os.path.islink(at):
                shutil.rmtree(at)
            else:
                os.unlink(at)

    def remove_folder(self, folder: str) -> None:
        """Remove a folder with all that is in it; one that is gone already is no error."""
        for attempt in range(_MAX_REMOVALS):
            try:
                with self._accessing("cannot be written"):
                    self._fs.rm(self._at(folder), recursive=True)
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
        if not self._is_local:
            return
        for path in Path(self._at("aside")).glob("*"):
            with suppress(FileNotFoundError), self._accessing("cannot be written"):
                if path.stat().st_mtime < time.time() - _MAX_ASIDE_S:
                    path.unlink()

    def _put_locally(self, path: Path, content: bytes) -> None:
        with written_whole(path, aside=self._aside_for(path)) as opened:
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
        if not self._is_local:
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

    @contextmanager
    def _accessing(self, problem: str) -> Iterator[None]:
        """Raise the block's errors of the filesystem as ``StorageError``, except for a file that is not there."""
        try:
            yield
        except (FileNotFoundError, StorageError):
            raise
        except Exception as error:  # each object store raises classes of its own
            number = error.errno if isinstance(error, OSError) else None
            reason = os.strerror(number) if number else first_line(error)
            raise self._error(number or errno.EIO, f"{problem}: {reason}") from error

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
