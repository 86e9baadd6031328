"""Limits that requests share: how many of a kind are open at once, and how many bytes of bodies are held."""

from collections.abc import Iterator
from contextlib import contextmanager

from deployments.http.errors import ApiError

_RETRY_AFTER_S = 2


class Places:
    """A number of places, each for one request of a kind. All calls must come from one event loop."""

    def __init__(self, num_places: int, *, kind: str) -> None:
        """kind: what has a place, in the plural, as messages and the code of the error name it."""
        self._num_places = num_places
        self._num_taken = 0
        self._kind = kind

    @contextmanager
    def take(self) -> Iterator[None]:
        """Have a place for the duration of the block. Raises ``ApiError`` 429 if there is none left."""
        if self._num_taken >= self._num_places:
            raise too_many(self._kind, f"{self._num_places} {self._kind} are open, which is all there may be")
        self._num_taken += 1
        try:
            yield
        finally:
            self._num_taken -= 1


class Uploads:
    """The bodies that are read and used at the moment. All calls must come from one event loop."""

    def __init__(self, *, max_uploads: int, max_bytes: int) -> None:
        self._places = Places(max_uploads, kind="uploads")
        self._max_bytes = max_bytes
        self._num_bytes = 0

    @contextmanager
    def begin(self) -> Iterator["Upload"]:
        """An upload for the duration of the block. Raises ``ApiError`` 429 if there are too many."""
        upload = Upload(self)
        with self._places.take():
            try:
                yield upload
            finally:
                self._num_bytes -= upload.num_bytes

    def has_room(self, num_bytes: int) -> bool:
        """Whether so many more bytes may be held."""
        return self._num_bytes + num_bytes <= self._max_bytes

    def hold(self, num_bytes: int) -> None:
        """Count more bytes. Raises ``ApiError`` 429 if all uploads together would then hold too many."""
        if not self.has_room(num_bytes):
            raise too_many("uploads", f"all uploads together may hold {self._max_bytes} bytes")
        self._num_bytes += num_bytes


class Upload:
    """One body, whose bytes count until its upload ends."""

    def __init__(self, uploads: Uploads) -> None:
        self._uploads = uploads
        self.num_bytes = 0

    def has_room(self, num_bytes: int) -> bool:
        """Whether so many more bytes may be held."""
        return self._uploads.has_room(num_bytes)

    def hold(self, num_bytes: int) -> None:
        """Count more bytes of this body. Raises ``ApiError`` 429 if all uploads together would hold too many."""
        self._uploads.hold(num_bytes)
        self.num_bytes += num_bytes


def too_many(kind: str, message: str) -> ApiError:
    """429 where a limit of this server is reached. The connection is closed, as a body may be unread."""
    headers = {"Retry-After": str(_RETRY_AFTER_S), "Connection": "close"}
    return ApiError(429, f"{message}; try again in {_RETRY_AFTER_S} s", code=f"too_many_{kind}", headers=headers)
