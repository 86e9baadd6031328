"""A video's folder: everything of it that outlives a process, on any fsspec URL.

::

    ROOT/videos/ID/video.json               the record, the only truth: no record, no video
    ROOT/videos/ID/input.png                the picture it begins with
    ROOT/videos/ID/latents/000.safetensors  each unit's latents (16, 1, h, w), float32
    ROOT/videos/ID/stream/000.m4s           each unit's frames, one after the other a fragmented MP4
    ROOT/videos/ID/video.mp4                the whole, when it is done
    ROOT/videos/ID/thumbnail.webp, spritesheet.webp
    ROOT/unfinished/ID                      empty; which records a restarted server has to look at
    ROOT/keys/HASH                          the id of the video that an idempotency key made
    ROOT/probe/HASH                         written and deleted to see whether the storage takes anything

No reader ever sees half a file: it is written aside and moved (local), or put whole (object stores, memory). A file is
only added to a folder whose record is there, so that nothing brings a deleted video back.

The methods block; callers with an event loop use threads. Ids must have been checked (``api.is_video_id``), and are
again. Every method raises ``StorageError`` when the storage cannot be read or written.
"""

import errno
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import numpy
import safetensors.numpy
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from pydantic import ValidationError

from pyramid_serve.api import VideoRecord, created_at_of, is_video_id

logger = logging.getLogger(__name__)

_MAX_KEY_CHARACTERS = 1000
_MAX_REMOVALS = 5
_MAX_ASIDE_S = 3600.0
_LATENTS = "latents"
_PROBE_BYTES = 4096
"""About the size of a record: fewer bytes may still fit on a disk that takes no record any more."""
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*:\S*@")
_EXTRAS = {
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("abfs", "abfss", "adl", "az"), "azure"),
}
"""The extra of this package that installs the filesystem of a protocol."""


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


class VideoNotFoundError(LookupError):
    """No such video, or not any more."""


class VideoExistsError(ValueError):
    """A record of this id is there already."""


class VideoFile(StrEnum):
    """The files of a video that clients may fetch."""

    VIDEO = "video.mp4"
    THUMBNAIL = "thumbnail.webp"
    SPRITESHEET = "spritesheet.webp"
    PICTURE = "input.png"


def check_root(root: str, *, timeout_s: float = 30.0) -> None:
    """``ValueError`` for a storage that cannot be written, read and deleted from, or does not answer in time."""
    problems: list[str] = []

    def check() -> None:
        try:
            VideoStore(root).check()
        except (ValueError, StorageError) as error:
            problems.append(str(error))
        except Exception as error:  # of a filesystem that is set up wrongly; each raises classes of its own
            problems.append(f"storage {shown_root(root)}: {type(error).__name__}: {_first_line(error)}")

    thread = threading.Thread(target=check, daemon=True)  # an object store that is away can hang for minutes
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise ValueError(f"storage {shown_root(root)}: no answer within {timeout_s:.0f} s")
    if problems:
        raise ValueError(problems[0])


class VideoStore:
    """The folders of all videos under one root."""

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
        self._path = str(path).rstrip("/")
        self._probe = f"{self._path}/probe/{uuid4().hex}"

    def check(self) -> None:
        """Write a small object, read it back and delete it. Raises ``StorageError`` where any of that fails."""
        if isinstance(self._fs, LocalFileSystem) and os.path.lexists(self._path) and not os.path.isdir(self._path):
            kind = "a symbolic link to nothing" if os.path.islink(self._path) else "not a folder"
            raise StorageError(errno.ENOTDIR, f"storage {shown_root(self.root)}: is {kind}")
        content = os.urandom(_PROBE_BYTES)
        self._put(self._probe, content)
        try:
            is_same = self._cat(self._probe) == content
        except FileNotFoundError:
            is_same = False
        self._remove(self._probe)
        if not is_same:
            raise StorageError(errno.EIO, f"storage {shown_root(self.root)}: does not give back what was written")

    # --- records ----------------------------------------------------------------------------------------------------

    def create(self, record: VideoRecord, *, picture: bytes | None = None) -> None:
        """Accept a video: from here on it outlives this process. ``picture``: its ``input.png``.

        Raises ``VideoExistsError`` where its id is taken.
        """
        folder = self._folder(record.id)
        if self.exists(record.id):
            raise VideoExistsError(f"{record.id}: there already")
        try:
            if picture is not None:
                self._put(f"{folder}/{VideoFile.PICTURE}", picture)
            self._put(self._unfinished(record.id), b"")
            self._put(f"{folder}/video.json", _to_json(record))
        except OSError:
            self._withdraw(record.id)
            raise

    def _withdraw(self, video_id: str) -> None:
        """Remove what there is of a video that was not accepted, the record first. What cannot be removed is logged."""
        folder = self._folder(video_id)
        removals = (
            (self._remove, f"{folder}/video.json"),
            (self._remove, self._unfinished(video_id)),
            (self._remove_folder, folder),
        )
        for remove, path in removals:
            try:
                if self._is_there(path):
                    remove(path)
            except StorageError as error:
                logger.warning("not accepted, and not all of it is removed: %s", error, extra={"video_id": video_id})

    def update(self, record: VideoRecord) -> None:
        """Replace the record of a video. Raises ``VideoNotFoundError`` for one that was deleted."""
        self._add(record.id, "video.json", _to_json(record))
        if record.is_over:
            self._remove(self._unfinished(record.id))

    def read(self, video_id: str) -> VideoRecord:
        """The record as last written. Raises ``VideoNotFoundError``."""
        try:
            stored = self._cat(f"{self._folder(video_id)}/video.json")
        except FileNotFoundError:
            raise VideoNotFoundError(f"{video_id}: no such video") from None
        return VideoRecord.model_validate_json(stored)

    def exists(self, video_id: str) -> bool:
        return self._is_there(f"{self._folder(video_id)}/video.json")

    def ids(self, *, newest_first: bool = True) -> list[str]:
        """Every id in the order of creation. Reads no record; some may have been deleted meanwhile."""
        return sorted(filter(is_video_id, self._names(f"{self._path}/videos")), reverse=newest_first)

    def page(
        self, *, limit: int = 20, after: str | None = None, newest_first: bool = True
    ) -> tuple[list[VideoRecord], bool]:
        """At most ``limit`` records following ``after`` in the order of creation, and whether there are more.

        ``after`` need not be there any more.
        """
        ids: Iterable[str] = self.ids(newest_first=newest_first)
        if after is not None:
            ids = [name for name in ids if (name < after if newest_first else name > after)]
        records: list[VideoRecord] = []
        for record in self._records(ids):
            if len(records) == limit:
                return records, True
            records.append(record)
        return records, False

    def unfinished(self, *, but: Container[str] = ()) -> list[VideoRecord]:
        """The records that are queued or in progress, oldest first, without those whose ids are in ``but``."""
        ids = sorted(filter(is_video_id, self._names(f"{self._path}/unfinished")))
        return [record for record in self._records(name for name in ids if name not in but) if not record.is_over]

    def delete(self, video_id: str) -> None:
        """Remove a video with all its files. Raises ``VideoNotFoundError`` where there is none.

        Where the storage refuses, ``StorageError`` is raised and the record is there as before.
        """
        self._delete(video_id, self._key_of(video_id))

    def _delete(self, video_id: str, key: str | None) -> None:
        folder = self._folder(video_id)
        try:
            record = self._cat(f"{folder}/video.json")
            with self._accessing("cannot be written"):
                # The record first: who adds a file now sees that it is gone and takes the file away again.
                self._fs.rm_file(f"{folder}/video.json")
        except FileNotFoundError:
            raise VideoNotFoundError(f"{video_id}: no such video") from None
        try:
            self._remove_folder(folder)
        except OSError:
            # Files without a record would be found by nobody. With it, the video can be deleted once more.
            self._put(f"{folder}/video.json", record)
            raise
        try:
            self._remove(self._unfinished(video_id))
            if key is not None:
                self.release_key(key, video_id)
        except StorageError as error:
            # Neither stands for a video any more; the sweep comes across them.
            logger.warning("deleted, but not its marker or key: %s", error, extra={"video_id": video_id})

    def sweep(self, *, retention_s: float, now: float | None = None) -> list[str]:
        """Delete every video whose time is over, what is left of folders without a record, and of writers that were
        killed; return the ids of the videos.

        ``retention_s``: no video expires earlier than that after its creation, so younger ones are not looked at.
        """
        self._sweep_aside()
        now = time.time() if now is None else now
        for name in self._names(f"{self._path}/unfinished"):
            if is_video_id(name) and created_at_of(name) <= now - retention_s and not self.exists(name):
                self._remove(self._unfinished(name))
        swept = []
        for video_id in self.ids(newest_first=False):
            if created_at_of(video_id) > now - retention_s:
                break
            try:
                record = self.read(video_id)
            except VideoNotFoundError:
                self._remove_folder(self._folder(video_id))
                continue
            except ValidationError:
                logger.exception("%s: its record cannot be read", video_id)
                continue
            if record.expires_at is not None and record.expires_at <= now:
                with suppress(VideoNotFoundError):  # someone else was faster
                    self._delete(video_id, record.idempotency_key)
                    swept.append(video_id)
        return swept

    # --- idempotency keys -------------------------------------------------------------------------------------------

    def id_of_key(self, key: str) -> str | None:
        """The id that was bound to an idempotency key."""
        try:
            video_id = self._cat(self._key(key)).decode(errors="replace")
        except FileNotFoundError:
            return None
        return video_id if is_video_id(video_id) else None

    def bind_key(self, key: str, video_id: str) -> None:
        """Let a key stand for an id from now on. One writer at a time: claims sees to that."""
        self._put(self._key(key), video_id.encode())

    def release_key(self, key: str, video_id: str) -> None:
        """Let a key stand for nothing, unless it stands for another video by now."""
        if self.id_of_key(key) == video_id:
            self._remove(self._key(key))

    # --- what the units leave ---------------------------------------------------------------------------------------

    def save_latents(self, video_id: str, unit: int, latents: NDArray[numpy.float32]) -> None:
        """Keep a unit's latents (16, 1, h, w). Raises ``VideoNotFoundError`` for a deleted video."""
        self._add(video_id, f"{_LATENTS}/{unit:03d}.safetensors", safetensors.numpy.save({_LATENTS: latents}))

    def load_latents(self, video_id: str) -> list[NDArray[numpy.float32]]:
        """The latents of units 0, 1, ... up to the first that is missing."""
        num_units = len(self._units(video_id, _LATENTS, ".safetensors"))
        return [self.load_unit_latents(video_id, unit) for unit in range(num_units)]

    def load_unit_latents(self, video_id: str, unit: int) -> NDArray[numpy.float32]:
        """The latents of one unit (16, 1, h, w). Raises ``VideoNotFoundError`` where they are not (yet) there."""
        try:
            stored = self._cat(f"{self._folder(video_id)}/{_LATENTS}/{unit:03d}.safetensors")
        except FileNotFoundError:
            raise VideoNotFoundError(f"{video_id}: no latents of unit {unit}") from None
        latents: NDArray[numpy.float32] = safetensors.numpy.load(stored)[_LATENTS]
        return latents

    def save_fragment(self, video_id: str, unit: int, fragment: bytes) -> None:
        """Keep a unit's part of the stream. Raises ``VideoNotFoundError`` for a deleted video."""
        self._add(video_id, f"stream/{unit:03d}.m4s", fragment)

    def num_fragments(self, video_id: str) -> int:
        """How many units in a row, from 0 on, have their part of the stream saved."""
        return len(self._units(video_id, "stream", ".m4s"))

    def fragment_sizes(self, video_id: str) -> list[int]:
        """Bytes of the parts of the stream that are saved, of units 0, 1, ... up to the first that is missing."""
        try:
            with self._accessing("cannot be read"):
                entries: list[dict[str, Any]] = self._fs.ls(f"{self._folder(video_id)}/stream", detail=True)
        except FileNotFoundError:
            return []
        sizes = {str(entry["name"]).rpartition("/")[2]: int(entry["size"]) for entry in entries}
        in_a_row: list[int] = []
        while (name := f"{len(in_a_row):03d}.m4s") in sizes:
            in_a_row.append(sizes[name])
        return in_a_row

    def load_fragment(self, video_id: str, unit: int) -> bytes:
        """A unit's part of the stream. Raises ``VideoNotFoundError`` where it is not (yet) there."""
        try:
            fragment = self._cat(f"{self._folder(video_id)}/stream/{unit:03d}.m4s")
        except FileNotFoundError:
            raise VideoNotFoundError(f"{video_id}: no unit {unit}") from None
        return fragment

    # --- whole files ------------------------------------------------------------------------------------------------

    def attach(self, video_id: str, file: VideoFile, content: bytes | Path) -> None:
        """Add or replace one of the video's files, from memory or from a local file.

        Raises ``VideoNotFoundError`` for a deleted video.
        """
        self._add(video_id, file, content.read_bytes() if isinstance(content, Path) else content)

    def fetch(self, video_id: str, file: VideoFile) -> bytes:
        """One of the video's files. Raises ``VideoNotFoundError`` where it is not (yet) there."""
        try:
            content = self._cat(f"{self._folder(video_id)}/{file}")
        except FileNotFoundError:
            raise VideoNotFoundError(f"{video_id}: no {file}") from None
        return content

    def size_of(self, video_id: str, file: VideoFile) -> int:
        """Bytes of one of the video's files. Raises ``VideoNotFoundError`` where it is not (yet) there."""
        try:
            return self._size(f"{self._folder(video_id)}/{file}")
        except FileNotFoundError:
            raise VideoNotFoundError(f"{video_id}: no {file}") from None

    def read_range(self, video_id: str, file: VideoFile, start: int, end: int) -> bytes:
        """Bytes ``start`` up to ``end`` of one of the video's files. Raises ``VideoNotFoundError`` as ``fetch``."""
        try:
            content = self._cat(f"{self._folder(video_id)}/{file}", start=start, end=end)
        except FileNotFoundError:
            raise VideoNotFoundError(f"{video_id}: no {file}") from None
        return content

    # --- which claims is the one -------------------------------------------------------------------------------------

    def read_epoch(self) -> str | None:
        """Who last said that all writing of records is theirs."""
        try:
            epoch = self._cat(f"{self._path}/epoch")
        except FileNotFoundError:
            return None
        return epoch.decode()

    def write_epoch(self, epoch: str) -> None:
        self._put(f"{self._path}/epoch", epoch.encode())

    # --- files -------------------------------------------------------------------------------------------------------

    def _folder(self, video_id: str) -> str:
        if not is_video_id(video_id):
            raise ValueError(f"id={video_id[:60]!r}: must be video_ and 32 hexadecimal digits")
        return f"{self._path}/videos/{video_id}"

    def _unfinished(self, video_id: str) -> str:
        return f"{self._path}/unfinished/{video_id}"

    def _key(self, key: str) -> str:
        if not 0 < len(key) <= _MAX_KEY_CHARACTERS:
            raise ValueError(f"idempotency_key: {len(key)} characters, must be 1 to {_MAX_KEY_CHARACTERS}")
        return f"{self._path}/keys/{hashlib.sha256(key.encode(errors='surrogatepass')).hexdigest()}"

    def _key_of(self, video_id: str) -> str | None:
        """The idempotency key that made a video, where its record can be read."""
        try:
            return self.read(video_id).idempotency_key
        except (VideoNotFoundError, ValidationError):
            return None

    def _records(self, ids: Iterable[str]) -> Iterator[VideoRecord]:
        for video_id in ids:
            try:
                yield self.read(video_id)
            except VideoNotFoundError:
                continue  # deleted since it was listed, or never accepted
            except ValidationError:
                logger.exception("%s: its record cannot be read", video_id)  # the others can

    def _units(self, video_id: str, subfolder: str, suffix: str) -> list[str]:
        names = set(self._names(f"{self._folder(video_id)}/{subfolder}"))
        units: list[str] = []
        while (name := f"{len(units):03d}{suffix}") in names:
            units.append(name)
        return units

    def _names(self, folder: str) -> list[str]:
        try:
            with self._accessing("cannot be read"):
                entries: list[Any] = self._fs.ls(folder, detail=False)
        except FileNotFoundError:
            return []
        return [str(entry).rstrip("/").rpartition("/")[2] for entry in entries]

    def _add(self, video_id: str, name: str, content: bytes) -> None:
        """Write a file of a video that is there, and see that it still is."""
        path = f"{self._folder(video_id)}/{name}"
        if not self.exists(video_id):
            raise VideoNotFoundError(f"{video_id}: no such video")
        self._put(path, content)
        if name != "video.json" and not self.exists(video_id):
            self._remove(path)
            self._remove_folder(self._folder(video_id))
            raise VideoNotFoundError(f"{video_id}: deleted meanwhile")

    @contextmanager
    def _accessing(self, problem: str) -> Iterator[None]:
        """Let the block's errors of the filesystem be ``StorageError``, but for a file that is not there."""
        try:
            yield
        except (FileNotFoundError, StorageError):
            raise
        except Exception as error:  # each object store raises classes of its own
            number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
            reason = os.strerror(number) if isinstance(error, OSError) and error.errno else _first_line(error)
            raise StorageError(number, f"storage {shown_root(self.root)}: {problem}: {reason}") from error

    def _cat(self, path: str, *, start: int | None = None, end: int | None = None) -> bytes:
        """Raises ``FileNotFoundError``."""
        with self._accessing("cannot be read"):
            content: bytes = self._fs.cat_file(path, start=start, end=end)
        return content

    def _size(self, path: str) -> int:
        """Bytes of a file. Raises ``FileNotFoundError``."""
        with self._accessing("cannot be read"):
            return int(self._fs.info(path)["size"])

    def _is_there(self, path: str) -> bool:
        # Not the filesystem's own `exists`, which takes a file that it cannot look at for one that is not there.
        try:
            with self._accessing("cannot be read"):
                self._fs.info(path)
        except FileNotFoundError:
            return False
        return True

    def _put(self, path: str, content: bytes) -> None:
        try:
            with self._accessing("cannot be written"):
                if isinstance(self._fs, LocalFileSystem):
                    self._put_locally(path, content)
                else:
                    self._fs.pipe_file(path, content)
        except FileNotFoundError as error:
            raise StorageError(
                errno.ENOENT, f"storage {shown_root(self.root)}: cannot be written: {_first_line(error)}"
            ) from error

    def _put_locally(self, path: str, content: bytes) -> None:
        aside = Path(f"{self._path}/aside/{uuid4().hex}")
        for parent in (aside.parent, Path(path).parent):
            parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("wb") as opened:
                opened.write(content)
                opened.flush()
                os.fsync(opened.fileno())
            os.replace(aside, path)
        finally:
            with suppress(OSError):  # what went wrong before is what matters; the sweep takes what is left
                aside.unlink(missing_ok=True)

    def _sweep_aside(self) -> None:
        """Remove what writers left that were killed before they could move it in place."""
        if not isinstance(self._fs, LocalFileSystem):
            return
        for path in Path(f"{self._path}/aside").glob("*"):
            with suppress(FileNotFoundError), self._accessing("cannot be written"):
                if path.stat().st_mtime < time.time() - _MAX_ASIDE_S:
                    path.unlink()

    def _remove(self, path: str) -> None:
        try:
            with self._accessing("cannot be written"):
                self._fs.rm_file(path)
        except FileNotFoundError:
            return  # someone else was faster

    def _remove_folder(self, folder: str) -> None:
        for attempt in range(_MAX_REMOVALS):
            try:
                with self._accessing("cannot be written"):
                    self._fs.rm(folder, recursive=True)
            except FileNotFoundError:
                return  # gone with its last file, or someone else was faster
            except StorageError as error:
                # A late writer has put one more file in between; see `delete`.
                if error.errno != errno.ENOTEMPTY or attempt == _MAX_REMOVALS - 1:
                    raise
            else:
                return


def _to_json(record: VideoRecord) -> bytes:
    return record.model_dump_json(indent=1).encode()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
