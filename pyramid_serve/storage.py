"""A video's folder: everything about it that outlives a process, on any fsspec URL.

::

    ROOT/videos/ID/video.json               the record, the only truth: no record, no video
    ROOT/videos/ID/input.png                the picture it is made from
    ROOT/videos/ID/latents/000.safetensors  each unit's latents, float32
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

from pyramid_serve.api import VideoRecord, created_at_of, is_video_id
from pyramid_serve.errors import VideoNotFoundError
from pyramid_serve.families import record_fields
from pyramid_serve.reasons import first_line
from pyramid_serve.stored_files import StorageError, StoredFiles, check_root, mask_credentials, shown_root
from pyramid_serve.video_files import RECORD, VideoFile, VideoFiles, folder_of

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
_EPOCH = "epoch"


class VideoExistsError(ValueError):
    """There is a record of this id already."""


class VideoStore:
    """The records of all videos under one root, and their keys. ``files`` are the other files of the videos."""

    def __init__(self, root: str) -> None:
        """``root``: a local path, or an fsspec URL such as ``s3://bucket/folder``.

        Raises ``ValueError`` for a URL that no installed filesystem serves.
        """
        self.root = root
        self._stored = StoredFiles(root)
        self.files = VideoFiles(self._stored)

    def check(self) -> None:
        """Write a small file, read it back and delete it. Raises ``StorageError`` where any of that fails."""
        self._stored.check()

    # --- records ----------------------------------------------------------------------------------------------------

    def create(self, record: VideoRecord, *, picture: bytes | None = None) -> None:
        """Accept a video: when this returns, it outlives the process and a crash. ``picture``: its ``input.png``.

        Raises ``VideoExistsError`` where its id is taken.
        """
        folder = folder_of(record.id)
        if self.exists(record.id):
            raise VideoExistsError(f"{record.id}: there already")
        try:
            if picture is not None:
                self._stored.put(f"{folder}/{VideoFile.PICTURE}", picture)
            self._stored.put(self._unfinished(record.id), b"")
            self._stored.put(f"{folder}/{RECORD}", _to_json(record))
        except OSError:
            self._withdraw(record.id)
            raise

    def _withdraw(self, video_id: str) -> None:
        """Remove the files of a video that was not accepted, the record first. What cannot be removed is logged."""
        folder = folder_of(video_id)
        removals = (
            (self._stored.remove, f"{folder}/{RECORD}"),
            (self._stored.remove, self._unfinished(video_id)),
            (self._stored.remove_folder, folder),
        )
        for remove, path in removals:
            try:
                if self._stored.exists(path):
                    remove(path)
            except StorageError as error:
                logger.warning("not accepted, and not all of it is removed: %s", error, extra={"video_id": video_id})

    def update(self, record: VideoRecord) -> None:
        """Replace the record of a video. Raises ``VideoNotFoundError`` for one that was deleted."""
        if not self.exists(record.id):
            raise VideoNotFoundError(f"{record.id}: no such video")
        self._stored.put(f"{folder_of(record.id)}/{RECORD}", _to_json(record))
        if record.is_over:
            self._stored.remove(self._unfinished(record.id))

    def read(self, video_id: str) -> VideoRecord:
        """The record as last written. Raises ``VideoNotFoundError``."""
        try:
            stored = self._stored.cat(f"{folder_of(video_id)}/{RECORD}")
        except FileNotFoundError:
            raise VideoNotFoundError(f"{video_id}: no such video") from None
        return _from_json(stored)

    def exists(self, video_id: str) -> bool:
        return self.files.has_record(video_id)

    def ids(self, *, newest_first: bool = True) -> list[str]:
        """Every id in the order of creation. Reads no records, so some videos may have been deleted meanwhile."""
        return sorted(filter(is_video_id, self._stored.names("videos")), reverse=newest_first)

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
        ids = sorted(filter(is_video_id, self._stored.names("unfinished")))
        return [record for record in self._records(name for name in ids if name not in but) if not record.is_over]

    def delete(self, video_id: str) -> None:
        """Remove a video with all its files. Raises ``VideoNotFoundError`` where there is none.

        Where the storage refuses, ``StorageError`` is raised and the record is kept.
        """
        self._delete(video_id, self._key_of(video_id))

    def _delete(self, video_id: str, key: str | None) -> None:
        folder = folder_of(video_id)
        try:
            record = self._stored.cat(f"{folder}/{RECORD}")
            # The record first: whoever adds a file now sees that the record is gone, and removes the file again.
            self._stored.remove_existing(f"{folder}/{RECORD}")
        except FileNotFoundError:
            raise VideoNotFoundError(f"{video_id}: no such video") from None
        try:
            self._stored.remove_folder(folder)
        except OSError:
            # Nobody would find files without a record. With it, the video can be deleted later.
            self._stored.put(f"{folder}/{RECORD}", record)
            raise
        try:
            self._stored.remove(self._unfinished(video_id))
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
        self._stored.sweep_aside()
        now = time.time() if now is None else now
        for name in self._stored.names("unfinished"):
            if is_video_id(name) and created_at_of(name) <= now - retention_s and not self.exists(name):
                self._stored.remove(self._unfinished(name))
        swept = []
        for video_id in self.ids(newest_first=False):
            if created_at_of(video_id) > now - retention_s:
                break
            try:
                record = self.read(video_id)
            except VideoNotFoundError:
                self._stored.remove_folder(folder_of(video_id))
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
            video_id = self._stored.cat(self._key(key)).decode(errors="replace")
        except FileNotFoundError:
            return None
        return video_id if is_video_id(video_id) else None

    def bind_key(self, key: str, video_id: str) -> None:
        """Let a key stand for this id from now on. Only claims may call this, one call at a time."""
        self._stored.put(self._key(key), video_id.encode())

    def release_key(self, key: str, video_id: str) -> None:
        """Let a key stand for nothing, unless it stands for another video by now."""
        if self.id_of_key(key) == video_id:
            self._stored.remove(self._key(key))

    # --- which claims writes -------------------------------------------------------------------------------------

    def read_epoch(self) -> str | None:
        """The name under which a claims deployment last took over all writing of records."""
        try:
            epoch = self._stored.cat(_EPOCH)
        except FileNotFoundError:
            return None
        return epoch.decode()

    def write_epoch(self, epoch: str) -> None:
        """Take over all writing of records, under a name that no other has."""
        self._stored.put(_EPOCH, epoch.encode())

    # --- files -------------------------------------------------------------------------------------------------------

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


def _from_json(stored: bytes) -> VideoRecord:
    """A record of any layout. Raises ``ValueError`` for anything else."""
    try:
        fields = json.loads(stored)
        if not isinstance(fields, dict):
            raise ValueError(f"a record must be a JSON object, not {type(fields).__name__}")
        return VideoRecord.model_validate(record_fields(fields))
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a record: {type(error).__name__}: {first_line(error)}") from error


def _to_json(record: VideoRecord) -> bytes:
    return record.model_dump_json(indent=1).encode()
