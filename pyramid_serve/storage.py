"""A video's folder: everything about it that outlives a process, on any fsspec URL.

::

    ROOT/videos/ID/video.json               the record, the only truth: no record, no video
    ROOT/videos/ID/over.json                the record as the video ended; it is written once, and outlasts late writers
    ROOT/videos/ID/input.png                the picture it is made from
    ROOT/videos/ID/latents/000.safetensors  each unit's latents, float32
    ROOT/videos/ID/states/000-1             where attempt 1 at unit 0 stands, as long as the unit is not made
    ROOT/videos/ID/stream/000.m4s           each unit's frames; one after the other they are a fragmented MP4
    ROOT/videos/ID/video.mp4                the whole video, when it is done
    ROOT/videos/ID/thumbnail.webp, spritesheet.webp, video.gif, video.webp, frames.zip, frames/00000.png
                                            what was made of it when it was first asked for
    ROOT/unfinished/, ROOT/holders/         which claims deployment looks after which video; see ``video_holds``
    ROOT/keys/HASH                          the id of the video that an idempotency key made
    ROOT/epoch                              the claims deployment that started last
    ROOT/aside/HASH                         a file that is being written (local storage only)
    ROOT/probe/HASH                         written and deleted to see whether the storage takes anything

No reader ever sees half a file (see ``stored_files``). A file is only added to a folder whose record is there, so that
nothing brings a deleted video back; only the picture comes before the record.

The methods block; callers with an event loop use threads. Ids are checked here again (``api.is_video_id``), since they
become paths. Every method raises ``StorageError`` when the storage cannot be read or written.
"""

import json
import logging
import math
import time
from collections.abc import Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

from cachetools import TTLCache

from pyramid_serve.api import Status, VideoRecord, created_at_of, is_video_id
from pyramid_serve.errors import VideoNotFoundError
from pyramid_serve.families import record_fields
from pyramid_serve.filesystems import mask_credentials, shown_root
from pyramid_serve.reasons import first_line
from pyramid_serve.stored_files import PATIENCE_S, StorageError, StoredFiles, check_root
from pyramid_serve.video_files import RECORD, FrameFile, VideoFile, VideoFiles, folder_of
from pyramid_serve.video_holds import HOLDERS, VideoHolds, marker_of
from pyramid_serve.video_keys import VideoKeys

__all__ = [
    "FrameFile",
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

_EPOCH = "epoch"
_OVER = "over.json"
_ABANDONED_S = 3600.0
"""A folder or marker without a record is removed when it is this old: whoever was to write the record is gone."""
_MAX_SEEN = 1_000_000
_READ_AT_ONCE = 16


class VideoExistsError(ValueError):
    """There is a record of this id already."""


class VideoStore:
    """The records of all videos under one root.

    ``files`` are the other files of the videos, ``holds`` says who looks after the unfinished ones, and ``keys`` are
    the idempotency keys that made them.
    """

    def __init__(self, root: str, *, patience_s: float = PATIENCE_S) -> None:
        """``root``: a local path, or an fsspec URL such as ``s3://bucket/folder``; ``patience_s``: for how long errors
        of an object store that may pass are waited out.

        Raises ``ValueError`` for a URL that no installed filesystem serves.
        """
        self.root = root
        self._stored = StoredFiles(root, patience_s=patience_s)
        self.files = VideoFiles(self._stored)
        self.holds = VideoHolds(self._stored)
        self.keys = VideoKeys(self._stored)
        self._unreadable: dict[str, str] = {}
        self._seen: TTLCache[str, bool] = TTLCache(_MAX_SEEN, _ABANDONED_S)
        """Videos that had a record at a sweep of the last hour, so that it is not looked for again."""

    def check(self) -> None:
        """Write a small file, read it back and delete it. Raises ``StorageError`` where any of that fails."""
        self._stored.check()

    # --- records ----------------------------------------------------------------------------------------------------

    def create(self, record: VideoRecord, *, holder: str = "") -> None:
        """Accept a video: when this returns, it outlives the process and a crash. ``holder``: who looks after it.

        Raises ``VideoExistsError`` where its id is taken.
        """
        if self.exists(record.id):
            raise VideoExistsError(f"{record.id}: there already")
        try:
            self.holds.accept(record.id, holder)
            self._stored.put(f"{folder_of(record.id)}/{RECORD}", _to_json(record))
        except OSError:
            self.withdraw(record.id)
            raise

    def withdraw(self, video_id: str) -> None:
        """Remove the files of a video that was not accepted, the record first. What cannot be removed is logged."""
        folder = folder_of(video_id)
        removals = (
            (self._stored.remove, f"{folder}/{RECORD}"),
            (self._stored.remove, marker_of(video_id, 0)),
            (self._stored.remove_folder, folder),
        )
        for remove, path in removals:
            try:
                if self._stored.exists(path):
                    remove(path)
            except StorageError as error:
                logger.warning("not accepted, and not all of it is removed: %s", error, extra={"video_id": video_id})

    def update(self, record: VideoRecord) -> None:
        """Replace the record of an unfinished video. Raises ``VideoNotFoundError`` for one that was deleted."""
        if not self.exists(record.id):
            raise VideoNotFoundError(f"{record.id}: no such video")
        self._stored.put(f"{folder_of(record.id)}/{RECORD}", _to_json(record))

    def end(self, record: VideoRecord, *, term: int = 0) -> VideoRecord:
        """Write the last record of a video, and return it; or that with which another ended the video before.

        term: the highest one of the video, whose markers are removed. Raises ``VideoNotFoundError`` for a video that
        was deleted. After a ``StorageError`` the video may be over all the same; ``settle`` does what is left.
        """
        if not self.exists(record.id):
            raise VideoNotFoundError(f"{record.id}: no such video")
        try:
            self._stored.create(f"{folder_of(record.id)}/{_OVER}", _to_json(record))
        except FileExistsError:
            record = self._read_over(record.id) or record
        self.settle(record, term=term)
        return record

    def settle(self, record: VideoRecord, *, term: int = 0) -> None:
        """Do what is left where an end was interrupted. ``record``: the last of the video; ``term``: as in ``end``."""
        if self.exists(record.id):
            self._stored.put(f"{folder_of(record.id)}/{RECORD}", _to_json(record))
        else:  # deleted meanwhile, so that the last record came to a folder that was gone
            self._stored.remove_folder(folder_of(record.id))
        self.holds.remove(record.id, term=term)

    def read(self, video_id: str) -> VideoRecord:
        """The record as last written. Raises ``VideoNotFoundError``, and ``ValueError`` for what is no record."""
        record = self._read(video_id, RECORD)
        if record is None:
            raise VideoNotFoundError(f"{video_id}: no such video")
        # One who did not know of the end may have written after it.
        return record if record.is_over else self._read_over(video_id) or record

    def _read_over(self, video_id: str) -> VideoRecord | None:
        return self._read(video_id, _OVER)

    def _read(self, video_id: str, name: str) -> VideoRecord | None:
        try:
            stored = self._stored.cat(f"{folder_of(video_id)}/{name}")
        except FileNotFoundError:
            return None
        record = _from_json(stored)
        if record.id != video_id:
            raise ValueError(f"{video_id}: the record in its folder is of {record.id[:60]!r}")
        return record

    def exists(self, video_id: str) -> bool:
        return self.files.has_record(video_id)

    def ids(self, *, newest_first: bool = True) -> list[str]:
        """Every id in the order of creation. Reads no records, so some videos may have been deleted meanwhile."""
        return sorted(filter(is_video_id, self._stored.names("videos")), reverse=newest_first)

    def page(
        self, *, limit: int = 20, after: str | None = None, newest_first: bool = True, status: Status | None = None
    ) -> tuple[list[VideoRecord], bool]:
        """At most ``limit`` records following ``after`` in the order of creation, and whether there are more.

        The video ``after`` may have been deleted meanwhile. status: only records with this status, for which all others
        in between are read too.
        """
        ids: Iterable[str]
        if status in (Status.QUEUED, Status.IN_PROGRESS):
            ids = sorted(self.holds.terms(), reverse=newest_first)  # few, where there may be very many that are over
        else:
            ids = self.ids(newest_first=newest_first)
        if after is not None:
            ids = [name for name in ids if (name < after if newest_first else name > after)]
        records: list[VideoRecord] = []
        for record in self._records(ids):
            if status is not None and record.status is not status:
                continue
            if len(records) == limit:
                return records, True
            records.append(record)
        return records, False

    def unfinished(self, *, but: Container[str] = ()) -> list[VideoRecord]:
        """The records that are queued or in progress, oldest first, without those whose ids are in ``but``."""
        ids = sorted(self.holds.terms())
        return [record for record in self._records(name for name in ids if name not in but) if not record.is_over]

    @property
    def num_unreadable(self) -> int:
        """How many of the videos that were looked at last have a record that cannot be read."""
        return len(self._unreadable)

    def delete(self, video_id: str) -> None:
        """Remove a video with all its files, also one whose record cannot be read.

        Raises ``VideoNotFoundError`` where there is none. Where the storage refuses, ``StorageError`` is raised and the
        record is kept.
        """
        key = self._key_of(video_id)
        folder = folder_of(video_id)
        try:
            # The record first: whoever adds a file now sees that the record is gone, and removes the file again.
            kept = self._take_out(f"{folder}/{RECORD}")
        except FileNotFoundError:
            raise VideoNotFoundError(f"{video_id}: no such video") from None
        try:
            self._stored.remove_folder(folder)
        except OSError:
            # Nobody would find files without a record. With it, the video can be deleted later.
            if kept is not None:
                self._stored.put(f"{folder}/{RECORD}", kept)
            raise
        self._unreadable.pop(video_id, None)
        try:
            self.holds.remove(video_id, term=self.holds.terms().get(video_id, 0))
            if key is not None:
                self.keys.release(key, video_id)
        except StorageError as error:
            # Neither stands for a video any more. The sweep removes the marker; the key is taken as unused.
            logger.warning("deleted, but not its marker or key: %s", error, extra={"video_id": video_id})

    def _take_out(self, path: str) -> bytes | None:
        """Remove a file, and return its content; None where that cannot be read. Raises ``FileNotFoundError``."""
        try:
            content = self._stored.cat(path)
        except StorageError:
            if not self._stored.is_odd(path):
                raise  # then it could not be put back either
            self._stored.remove_odd(path)
            return None
        self._stored.remove_existing(path)
        return content

    def sweep(self, *, retention_s: float, now: float | None = None) -> list[str]:
        """Delete every video that has expired, and what was left by deletions and writers that were interrupted.

        Returns the ids of the videos. ``retention_s``: no video expires earlier than this after its creation, so
        the records of younger ones are not read. What cannot be removed is logged, and tried again the next time.
        """
        self._stored.sweep_aside()
        problems: list[StorageError] = []
        now = time.time() if now is None else now
        for video_id, term in self.holds.terms().items():
            if created_at_of(video_id) <= now - _ABANDONED_S and self._is_gone(video_id):
                with _noting(problems):
                    self.holds.remove(video_id, term=term)
        swept = []
        for video_id in self.ids(newest_first=False):
            if created_at_of(video_id) > now - min(retention_s, _ABANDONED_S):
                break
            is_young = created_at_of(video_id) > now - retention_s
            if is_young and video_id in self._seen:
                continue
            if self._is_gone(video_id):
                with _noting(problems):
                    self._stored.remove_folder(folder_of(video_id))
            elif is_young:
                self._seen[video_id] = True
            else:
                for record in self._records([video_id]):
                    if record.expires_at is not None and record.expires_at <= now:
                        with _noting(problems), suppress(VideoNotFoundError):  # if someone else was faster
                            self.delete(video_id)
                            swept.append(video_id)
        with _noting(problems):
            self.keys.sweep(lambda video_id: not self._is_gone(video_id), now=now)
        if problems:
            logger.warning("%d entries of the storage could not be removed, the first: %s", len(problems), problems[0])
        return swept

    def _is_gone(self, video_id: str) -> bool:
        """Whether there is surely no record."""
        try:
            return not self.exists(video_id)
        except StorageError as error:
            self._set_aside(video_id, error)
            return False

    # --- the claims deployment that started last ---------------------------------------------------------------------

    def read_epoch(self) -> str | None:
        """The name of the claims deployment that started last."""
        try:
            epoch = self._stored.cat(_EPOCH)
        except FileNotFoundError:
            return None
        return epoch.decode()

    def write_epoch(self, epoch: str) -> None:
        """Tell which claims deployment started last. One of an earlier release writes no records after that."""
        self._stored.put(_EPOCH, epoch.encode())

    def _key_of(self, video_id: str) -> str | None:
        """The idempotency key that made a video, where its record can be read."""
        try:
            return self.read(video_id).idempotency_key
        except (ValueError, OSError):
            return None

    def _records(self, ids: Iterable[str]) -> Iterator[VideoRecord]:
        """The records that can be read. Raises ``StorageError`` where not one record but the storage cannot be."""
        for video_id, found in self._read_each(iter(ids)):
            if isinstance(found, VideoRecord):
                self._unreadable.pop(video_id, None)
                yield found
            elif not isinstance(found, VideoNotFoundError):  # deleted since it was listed, or never accepted
                self._set_aside(video_id, found)

    def _read_each(self, ids: Iterator[str]) -> Iterator[tuple[str, VideoRecord | Exception]]:
        """Each id with its record or why there is none; of an object store some are read at once."""
        if self._stored.is_local:
            yield from ((video_id, self._try_read(video_id)) for video_id in ids)
            return
        with ThreadPoolExecutor(_READ_AT_ONCE) as readers:
            while batch := list(islice(ids, _READ_AT_ONCE)):
                yield from zip(batch, readers.map(self._try_read, batch), strict=True)

    def _try_read(self, video_id: str) -> VideoRecord | Exception:
        try:
            return self.read(video_id)
        except (ValueError, StorageError, VideoNotFoundError) as error:
            return error

    def _set_aside(self, video_id: str, error: Exception) -> None:
        """Count a record that cannot be read, and log it once. The others can be, unless the storage is away."""
        if isinstance(error, StorageError):
            self._stored.names(HOLDERS)  # raises where it is
        reason = f"{type(error).__name__}: {first_line(error)}"
        if self._unreadable.get(video_id) != reason:
            self._unreadable[video_id] = reason
            logger.error("its record cannot be read: %s", reason, extra={"video_id": video_id})


@contextmanager
def _noting(problems: list[StorageError]) -> Iterator[None]:
    """Note an error of one entry, so that it does not keep the others from being looked at."""
    try:
        yield
    except StorageError as error:
        problems.append(error)


def _from_json(stored: bytes) -> VideoRecord:
    """A record of any layout. Raises ``ValueError`` for anything else."""
    try:
        fields = json.loads(stored, parse_constant=_refuse_constant, parse_float=_finite)
        if not isinstance(fields, dict):
            raise ValueError(f"a record must be a JSON object, not {type(fields).__name__}")
        return VideoRecord.model_validate(record_fields(fields))
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a record: {type(error).__name__}: {first_line(error)}") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is no number")
    return number


def _to_json(record: VideoRecord) -> bytes:
    return record.model_dump_json(indent=1).encode()
