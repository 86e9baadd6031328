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

No reader ever sees half a file: it is written aside and moved (local), or put whole (object stores, memory). A file is
only added to a folder whose record is there, so that nothing brings a deleted video back.

The methods block; callers with an event loop use threads. Ids must have been checked (``api.is_video_id``), and are
again.
"""

import errno
import hashlib
import logging
import os
import time
from collections.abc import Container, Iterable, Iterator
from contextlib import suppress
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


class VideoStore:
    """The folders of all videos under one root."""

    def __init__(self, root: str) -> None:
        """``root``: a local path, or an fsspec URL such as ``s3://bucket/folder``."""
        self.root = root
        self._fs, path = fsspec.core.url_to_fs(
            os.path.abspath(root) if "://" not in root else root,
            use_listings_cache=False,  # others write here too
        )
        self._path = str(path).rstrip("/")

    # --- records ----------------------------------------------------------------------------------------------------

    def create(self, record: VideoRecord, *, picture: bytes | None = None) -> None:
        """Accept a video: from here on it outlives this process. ``picture``: its ``input.png``.

        Raises ``VideoExistsError`` where its id is taken.
        """
        folder = self._folder(record.id)
        if self._fs.exists(f"{folder}/video.json"):
            raise VideoExistsError(f"{record.id}: there already")
        if picture is not None:
            self._put(f"{folder}/{VideoFile.PICTURE}", picture)
        self._put(self._unfinished(record.id), b"")
        self._put(f"{folder}/video.json", _to_json(record))

    def update(self, record: VideoRecord) -> None:
        """Replace the record of a video. Raises ``VideoNotFoundError`` for one that was deleted."""
        self._add(record.id, "video.json", _to_json(record))
        if record.is_over:
            self._remove(self._unfinished(record.id))

    def read(self, video_id: str) -> VideoRecord:
        """The record as last written. Raises ``VideoNotFoundError``."""
        try:
            return VideoRecord.model_validate_json(self._fs.cat_file(f"{self._folder(video_id)}/video.json"))
        except FileNotFoundError:
            raise VideoNotFoundError(f"{video_id}: no such video") from None

    def exists(self, video_id: str) -> bool:
        return bool(self._fs.exists(f"{self._folder(video_id)}/video.json"))

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
        """Remove a video with all its files. Raises ``VideoNotFoundError`` where there is none."""
        self._delete(video_id, self._key_of(video_id))

    def _delete(self, video_id: str, key: str | None) -> None:
        folder = self._folder(video_id)
        try:
            # The record first: who adds a file now sees that it is gone and takes the file away again.
            self._fs.rm_file(f"{folder}/video.json")
        except FileNotFoundError:
            raise VideoNotFoundError(f"{video_id}: no such video") from None
        self._remove(self._unfinished(video_id))
        self._remove_folder(folder)
        if key is not None and self.id_of_key(key) == video_id:
            self._remove(self._key(key))

    def sweep(self, *, retention_s: float, now: float | None = None) -> list[str]:
        """Delete every video whose time is over, what is left of folders without a record, and of writers that were
        killed; return the ids of the videos.

        ``retention_s``: no video expires earlier than that after its creation, so younger ones are not looked at.
        """
        self._sweep_aside()
        now = time.time() if now is None else now
        swept = []
        for video_id in self.ids(newest_first=False):
            if created_at_of(video_id) > now - retention_s:
                break
            try:
                record = self.read(video_id)
            except VideoNotFoundError:
                self._remove(self._unfinished(video_id))
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
            video_id = self._fs.cat_file(self._key(key)).decode()
        except FileNotFoundError:
            return None
        return video_id if is_video_id(video_id) else None

    def bind_key(self, key: str, video_id: str) -> None:
        """Let a key stand for an id from now on. One writer at a time: claims sees to that."""
        self._put(self._key(key), video_id.encode())

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
            stored = self._fs.cat_file(f"{self._folder(video_id)}/{_LATENTS}/{unit:03d}.safetensors")
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
            fragment: bytes = self._fs.cat_file(f"{self._folder(video_id)}/stream/{unit:03d}.m4s")
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
            content: bytes = self._fs.cat_file(f"{self._folder(video_id)}/{file}")
        except FileNotFoundError:
            raise VideoNotFoundError(f"{video_id}: no {file}") from None
        return content

    def size_of(self, video_id: str, file: VideoFile) -> int:
        """Bytes of one of the video's files. Raises ``VideoNotFoundError`` where it is not (yet) there."""
        try:
            return int(self._fs.info(f"{self._folder(video_id)}/{file}")["size"])
        except FileNotFoundError:
            raise VideoNotFoundError(f"{video_id}: no {file}") from None

    def read_range(self, video_id: str, file: VideoFile, start: int, end: int) -> bytes:
        """Bytes ``start`` up to ``end`` of one of the video's files. Raises ``VideoNotFoundError`` as ``fetch``."""
        try:
            content: bytes = self._fs.cat_file(f"{self._folder(video_id)}/{file}", start=start, end=end)
        except FileNotFoundError:
            raise VideoNotFoundError(f"{video_id}: no {file}") from None
        return content

    # --- which claims is the one -------------------------------------------------------------------------------------

    def read_epoch(self) -> str | None:
        """Who last said that all writing of records is theirs."""
        try:
            epoch: bytes = self._fs.cat_file(f"{self._path}/epoch")
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

    def _put(self, path: str, content: bytes) -> None:
        if not isinstance(self._fs, LocalFileSystem):
            self._fs.pipe_file(path, content)
            return
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
            aside.unlink(missing_ok=True)

    def _sweep_aside(self) -> None:
        """Remove what writers left that were killed before they could move it in place."""
        if not isinstance(self._fs, LocalFileSystem):
            return
        for path in Path(f"{self._path}/aside").glob("*"):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - _MAX_ASIDE_S:
                    path.unlink()

    def _remove(self, path: str) -> None:
        try:
            self._fs.rm_file(path)
        except FileNotFoundError:
            return  # someone else was faster

    def _remove_folder(self, folder: str) -> None:
        for attempt in range(_MAX_REMOVALS):
            try:
                self._fs.rm(folder, recursive=True)
            except FileNotFoundError:
                return  # gone with its last file, or someone else was faster
            except OSError as error:
                # A late writer has put one more file in between; see `delete`.
                if error.errno != errno.ENOTEMPTY or attempt == _MAX_REMOVALS - 1:
                    raise
            else:
                return


def _to_json(record: VideoRecord) -> bytes:
    return record.model_dump_json(indent=1).encode()
