"""Idempotency keys: which video each of them made. ``ROOT/keys/HASH`` holds the id of the video.

The methods block, and raise ``StorageError`` when the storage cannot be read or written.
"""

import hashlib
import time
from collections.abc import Callable

from pyramid_serve.api import created_at_of, is_video_id
from pyramid_serve.stored_files import StoredFiles

_FOLDER = "keys"
_MAX_CHARACTERS = 1000
_UNUSED_S = 3600.0
"""A key whose video is not there is removed when that video would be this old: nobody is accepting it any more."""
_SWEPT_AT_ONCE = 500


class VideoKeys:
    """The idempotency keys under one root."""

    def __init__(self, stored: StoredFiles) -> None:
        self._stored = stored
        self._swept_up_to = ""

    def id_of(self, key: str) -> str | None:
        """The id of the video that a key stands for; None where it stands for none."""
        return self._read(_path(key))

    def bind(self, key: str, video_id: str) -> str:
        """Let a key that stands for nothing stand for this id; return the id that it stands for now.

        Where two try at once, both get the same answer, if the storage creates exclusively.
        """
        try:
            self._stored.create(_path(key), video_id.encode())
        except FileExistsError:
            return self.id_of(key) or video_id
        return video_id

    def release(self, key: str, video_id: str) -> None:
        """Let a key stand for nothing, unless it stands for another video by now."""
        if self.id_of(key) == video_id:
            self._stored.remove(_path(key))

    def sweep(self, exists: Callable[[str], bool], *, now: float | None = None) -> None:
        """Remove keys whose videos do not exist. Some hundred are looked at each time, the next ones the next time."""
        now = time.time() if now is None else now
        names = sorted(self._stored.names(_FOLDER))
        later = [name for name in names if name > self._swept_up_to] or names
        for name in later[:_SWEPT_AT_ONCE]:
            self._swept_up_to = name  # first, so that the next sweep goes on after one that cannot be read
            video_id = self._read(f"{_FOLDER}/{name}")
            if video_id is not None and created_at_of(video_id) <= now - _UNUSED_S and not exists(video_id):
                self._stored.remove(f"{_FOLDER}/{name}")

    def _read(self, path: str) -> str | None:
        try:
            video_id = self._stored.cat(path).decode(errors="replace")
        except FileNotFoundError:
            return None
        return video_id if is_video_id(video_id) else None


def _path(key: str) -> str:
    if not 0 < len(key) <= _MAX_CHARACTERS:
        raise ValueError(f"idempotency_key: {len(key)} characters, must be 1 to {_MAX_CHARACTERS}")
    return f"{_FOLDER}/{hashlib.sha256(key.encode(errors='surrogatepass')).hexdigest()}"
