"""A video's folder: everything about it that outlives a process, on any fsspec URL.

::

    ROOT/videos/ID/video.json               the record, the only truth: no record, no video
    ROOT/videos/ID/input.png                the picture it begins with
    ROOT/videos/ID/latents/000.safetensors  each unit's latents (16, 1, h, w), float32
    ROOT/videos/ID/stream/000.m4s           each unit's frames; one after the other they are a fragmented MP4
    ROOT/videos/ID/video.mp4                the whole video, when it is done
    ROOT/videos/ID/thumbnail.webp, spritesheet.webp
    ROOT/unfinished/ID                      empty; its name tells a restarted server which records to look at
    ROOT/keys/HASH                          the id of the video that an idempotency key made
    ROOT/epoch                              which claims deployment writes the records
    ROOT/aside/HASH                         a file that is being written (local storage only)
    ROOT/probe/HASH                         written and deleted to see whether the storage takes anything

No reader ever sees half a file (see ``stored_files``). A file is only added to a folder whose record is there, so that
nothing brings a deleted video back.

The methods block; callers with an event loop use threads. Ids are checked here again (``api.is_video_id``), since they
become paths. Every method raises ``StorageError`` when the storage cannot be read or written.
"""

import hashlib
import json
import logging
import time
from collections.abc import Container, Iterable, Iterator
from contextlib import suppress
from enum import StrEnum
from pathlib import Path

import numpy
import safetensors.numpy
from numpy.typing import NDArray

from pyramid_serve.api import VideoRecord, created_at_of, is_video_id
from pyramid_serve.errors import VideoNotFoundError
from pyramid_serve.families import record_fields
from pyramid_serve.stored_files import StorageError, StoredFiles, check_root, mask_credentials, shown_root

__all__ = [
    "StorageError",
    "VideoExistsError",
    "VideoFile",
    "VideoNotFoundError",
    "VideoStore",
    "check_root",
    "mask_credentials",
    "shown_root",
]

logger = logging.getLogger(__name__)

_MAX_KEY_CHARACTERS = 1000
_LATENTS = "latents"
_EPOCH = "epoch"


class VideoExistsError(ValueError):
    """There is a record of this id already."""


class VideoFile(StrEnum):
    """The files of a video that clients may fetch."""

    VIDEO = "video.mp4"
    THUMBNAIL = "thumbnail.webp"
    SPRITESHEET = "spritesheet.webp"
    PICTURE = "input.png"


class VideoStore:
    """The folders of all videos under one root."""

    def __init__(self, root: str) -> None:
        """``root``: a local path, or an fsspec URL such as ``s3://bucket/folder``.

        Raises ``ValueError`` for a URL that no installed filesystem serves.
        """
        self.root = root
        self._files = StoredFiles(root)

    def check(self) -> None:
        """Write a small file, read it back and delete it. Raises ``StorageError`` where any of that fails."""
        self._files.check()

    # --- records ----------------------------------------------------------------------------------------------------

    def create(self, record: VideoRecord, *, picture: bytes | None = None) -> None:
        """Accept a video: when this returns, it outlives the process and a crash. ``picture``: its ``input.png``.

        Raises ``VideoExistsError`` where its id is taken.
        """
        folder = self._folder(record.id)
        if self.exists(record.id):
            raise VideoExistsError(f"{record.id}: there already")
        try:
            if picture is not None:
                self._files.put(f"{folder}/{VideoFile.PICTURE}", picture)
            self._files.put(self._unfinished(record.id), b"")
            self._files.put(f"{folder}/video.json", _to_json(record))
        except OSError:
            self._withdraw(record.id)
            raise

    def _withdraw(self, video_id: str) -> None:
        """Remove the files of a video that was not accepted, the record first. What cannot be removed is logged."""
        folder = self._folder(video_id)
        removals = (
            (self._files.remove, f"{folder}/video.json"),
            (self._files.remove, self._unfinished(video_id)),
            (self._files.remove_folder, folder),
        )
        for remove, path in removals:
            try:
                if self._files.exists(path):
                    remove(path)
            except StorageError as error:
                logger.warning("not accepted, and not all of it is removed: %s", error, extra={"video_id": video_id})

    def update(self, record: VideoRecord) -> None:
        """Replace the record of a video. Raises ``VideoNotFoundError`` for one that was deleted."""
        self._add(record.id, "video.json", _to_json(record))
        if record.is_over:
            self._files.remove(self._unfinished(record.id))

    def read(self, video_id: str) -> VideoRecord:
        """The record as last written. Raises ``VideoNotFoundError``."""
        try:
            stored = self._files.cat(f"{self._folder(video_id)}/video.json")
        except FileNotFoundError:
            raise VideoNotFoundError(f"{video_id}: no such video") from None
        return _from_json(stored)

    def exists(self, video_id: str) -> bool:
        return self._files.exists(f"{self._folder(video_id)}/video.json")

    def ids(self, *, newest_first: bool = True) -> list[str]:
        """Every id in the order of creation. Reads no records, so some videos may have been deleted meanwhile."""
        return sorted(filter(is_video_id, self._files.names("videos")), reverse=newest_first)

    def page(
        self, *, limit: int = 20, after: str | None = None, newest_first: bool = True
    ) -> tuple[list[VideoRecord], bool]:
        """At most ``limit`` records following ``after`` in the order of creation, and whether there are more.

        The video ``after`` may have been deleted meanwhile.
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
        ids = sorted(filter(is_video_id, self._files.names("unfinished")))
        return [record for record in self._records(name for name in ids if name not in but) if not record.is_over]

    def delete(self, video_id: str) -> None:
        """Remove a video with all its files. Raises ``VideoNotFoundError`` where there is none.

        Where the storage refuses, ``StorageError`` is raised and the record is kept.
        """
        self._delete(video_id, self._key_of(video_id))

    def _delete(self, video_id: str, key: str | None) -> None:
        folder = self._folder(video_id)
        try:
            record = self._files.cat(f"{folder}/video.json")
            # The record first: whoever adds a file now sees that the record is gone, and removes the file again.
            self._files.remove_existing(f"{folder}/video.json")
        except FileNotFoundError:
            raise VideoNotFoundError(f"{video_id}: no such video") from None
        try:
            self._files.remove_folder(folder)
        except OSError:
            # Nobody would find files without a record. With it, the video can be deleted later.
            self._files.put(f"{folder}/video.json", record)
            raise
        try:
            self._files.remove(self._unfinished(video_id))
            if key is not None:
                self.release_key(key, video_id)
        except StorageError as error:
            # Neither stands for a video any more. The sweep removes the marker; the key is taken as unused.
            logger.warning("deleted, but not its marker or key: %s", error, extra={"video_id": video_id})

    def sweep(self, *, retention_s: float, now: float | None = None) -> list[str]:
        """Delete every video that has expired, and what was left by deletions and writers that were interrupted.

        Returns the ids of the videos. ``retention_s``: no video expires earlier than this after its creation, so
        younger ones are not looked at.
        """
        self._files.sweep_aside()
        now = time.time() if now is None else now
        for name in self._files.names("unfinished"):
            if is_video_id(name) and created_at_of(name) <= now - retention_s and not self.exists(name):
                self._files.remove(self._unfinished(name))
        swept = []
        for video_id in self.ids(newest_first=False):
            if created_at_of(video_id) > now - retention_s:
                break
            try:
                record = self.read(video_id)
            except VideoNotFoundError:
                self._files.remove_folder(self._folder(video_id))
                continue
            except ValueError:
                logger.exception("%s: its record cannot be read", video_id)
                continue
            if record.expires_at is not None and record.expires_at <= now:
                with suppress(VideoNotFoundError):  # someone else was faster
                    self._delete(video_id, record.idempotency_key)
                    swept.append(video_id)
        return swept

    # --- idempotency keys -------------------------------------------------------------------------------------------

    def id_of_key(self, key: str) -> str | None:
        """The id of the video that an idempotency key stands for; None where it stands for none."""
        try:
            video_id = self._files.cat(self._key(key)).decode(errors="replace")
        except FileNotFoundError:
            return None
        return video_id if is_video_id(video_id) else None

    def bind_key(self, key: str, video_id: str) -> None:
        """Let a key stand for this id from now on. Only claims may call this, one call at a time."""
        self._files.put(self._key(key), video_id.encode())

    def release_key(self, key: str, video_id: str) -> None:
        """Let a key stand for nothing, unless it stands for another video by now."""
        if self.id_of_key(key) == video_id:
            self._files.remove(self._key(key))

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
            stored = self._files.cat(f"{self._folder(video_id)}/{_LATENTS}/{unit:03d}.safetensors")
        except FileNotFoundError:
            raise VideoNotFoundError(f"{video_id}: no latents of unit {unit}") from None
        latents: NDArray[numpy.float32] = safetensors.numpy.load(stored)[_LATENTS]
        return latents

    def save_fragment(self, video_id: str, unit: int, fragment: bytes) -> None:
        """Keep a unit's part of the stream. Raises ``VideoNotFoundError`` for a deleted video."""
        self._add(video_id, f"stream/{unit:03d}.m4s", fragment)

    def num_fragments(self, video_id: str) -> int:
        """How many units in a row, from unit 0 on, have their part of the stream saved."""
        return len(self._units(video_id, "stream", ".m4s"))

    def fragment_sizes(self, video_id: str) -> list[int]:
        """The sizes in bytes of the saved parts of the stream, of units 0, 1, ... up to the first that is missing."""
        sizes = self._files.sizes(f"{self._folder(video_id)}/stream")
        in_a_row: list[int] = []
        while (name := f"{len(in_a_row):03d}.m4s") in sizes:
            in_a_row.append(sizes[name])
        return in_a_row

    def load_fragment(self, video_id: str, unit: int) -> bytes:
        """A unit's part of the stream. Raises ``VideoNotFoundError`` where it is not (yet) there."""
        try:
            fragment = self._files.cat(f"{self._folder(video_id)}/stream/{unit:03d}.m4s")
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
            content = self._files.cat(f"{self._folder(video_id)}/{file}")
        except FileNotFoundError:
            raise VideoNotFoundError(f"{video_id}: no {file}") from None
        return content

    def size_of(self, video_id: str, file: VideoFile) -> int:
        """Bytes of one of the video's files. Raises ``VideoNotFoundError`` where it is not (yet) there."""
        try:
            return self._files.size(f"{self._folder(video_id)}/{file}")
        except FileNotFoundError:
            raise VideoNotFoundError(f"{video_id}: no {file}") from None

    def read_range(self, video_id: str, file: VideoFile, start: int, end: int) -> bytes:
        """Bytes ``start`` up to ``end`` of one of the video's files. Raises ``VideoNotFoundError`` as ``fetch``."""
        try:
            content = self._files.cat(f"{self._folder(video_id)}/{file}", start=start, end=end)
        except FileNotFoundError:
            raise VideoNotFoundError(f"{video_id}: no {file}") from None
        return content

    # --- which claims writes -------------------------------------------------------------------------------------

    def read_epoch(self) -> str | None:
        """The name under which a claims deployment last took over all writing of records."""
        try:
            epoch = self._files.cat(_EPOCH)
        except FileNotFoundError:
            return None
        return epoch.decode()

    def write_epoch(self, epoch: str) -> None:
        """Take over all writing of records, under a name that no other has."""
        self._files.put(_EPOCH, epoch.encode())

    # --- files -------------------------------------------------------------------------------------------------------

    def _folder(self, video_id: str) -> str:
        if not is_video_id(video_id):
            raise ValueError(f"id={video_id[:60]!r}: must be video_ and 32 hexadecimal digits")
        return f"videos/{video_id}"

    def _unfinished(self, video_id: str) -> str:
        return f"unfinished/{video_id}"

    def _key(self, key: str) -> str:
        if not 0 < len(key) <= _MAX_KEY_CHARACTERS:
            raise ValueError(f"idempotency_key: {len(key)} characters, must be 1 to {_MAX_KEY_CHARACTERS}")
        return f"keys/{hashlib.sha256(key.encode(errors='surrogatepass')).hexdigest()}"

    def _key_of(self, video_id: str) -> str | None:
        """The idempotency key that made a video, where its record can be read."""
        try:
            return self.read(video_id).idempotency_key
        except (VideoNotFoundError, ValueError):
            return None

    def _records(self, ids: Iterable[str]) -> Iterator[VideoRecord]:
        for video_id in ids:
            try:
                yield self.read(video_id)
            except VideoNotFoundError:
                continue  # deleted since it was listed, or never accepted
            except ValueError:
                logger.exception("%s: its record cannot be read", video_id)  # the others can

    def _units(self, video_id: str, subfolder: str, suffix: str) -> list[str]:
        names = set(self._files.names(f"{self._folder(video_id)}/{subfolder}"))
        units: list[str] = []
        while (name := f"{len(units):03d}{suffix}") in names:
            units.append(name)
        return units

    def _add(self, video_id: str, name: str, content: bytes) -> None:
        """Write a file of a video that exists, and make sure that the video was not deleted meanwhile."""
        path = f"{self._folder(video_id)}/{name}"
        if not self.exists(video_id):
            raise VideoNotFoundError(f"{video_id}: no such video")
        self._files.put(path, content)
        if name != "video.json" and not self.exists(video_id):
            self._files.remove(path)
            self._files.remove_folder(self._folder(video_id))
            raise VideoNotFoundError(f"{video_id}: deleted meanwhile")


def _from_json(stored: bytes) -> VideoRecord:
    """A record of any layout. Raises ``ValueError`` for what is none."""
    fields = json.loads(stored)
    if not isinstance(fields, dict):
        raise ValueError(f"a record must be a JSON object, not {type(fields).__name__}")
    try:
        return VideoRecord.model_validate(record_fields(fields))
    except (KeyError, TypeError) as error:
        raise ValueError(f"a record of version 1: {type(error).__name__}: {error}") from error


def _to_json(record: VideoRecord) -> bytes:
    return record.model_dump_json(indent=1).encode()
