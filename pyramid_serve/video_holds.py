"""Which claims deployment looks after which unfinished video, where several share one storage.

A claims deployment that runs is a *holder*. It has a name that nobody else has, and a file that it writes anew all the
time; one whose file no longer changes is gone. Each unfinished video is held by one holder: the one that accepted it,
or the one that took it over last. A video is taken over by creating the marker of its next *term*, which only one of
several can do.

::

    ROOT/unfinished/ID      the name of the holder that accepted the video; empty if that was an earlier release
    ROOT/unfinished/ID.1    the name of the first one that took it over, and so on: the highest term counts
    ROOT/holders/NAME       what a holder says of itself

The markers of a video stay until it is over or deleted, so that no term is given twice. The methods block, and raise
``StorageError`` when the storage cannot be read or written.
"""

from pyramid_serve.api import is_video_id
from pyramid_serve.stored_files import StorageError, StoredFiles

_MARKERS = "unfinished"
HOLDERS = "holders"


class VideoHolds:
    """The markers of all unfinished videos under one root, and the files of the holders."""

    def __init__(self, stored: StoredFiles) -> None:
        self._stored = stored

    def create_exclusively(self) -> bool:
        """Whether the storage lets only one of several take a video, as far as that is known of its filesystem."""
        return self._stored.creates_exclusively()

    # --- videos -----------------------------------------------------------------------------------------------------

    def terms(self) -> dict[str, int]:
        """The highest term of each unfinished video by id; 0 for a video that nobody took over yet."""
        terms: dict[str, int] = {}
        for name in self._stored.names(_MARKERS):
            video_id, _, term = name.partition(".")
            if is_video_id(video_id) and (not term or term.isdecimal()):
                terms[video_id] = max(terms.get(video_id, 0), int(term or 0))
        return terms

    def holder_of(self, video_id: str, term: int) -> str | None:
        """The name of the holder of a term; None where that term was not given or the video is over."""
        try:
            return self._stored.cat(marker_of(video_id, term)).decode(errors="replace")
        except FileNotFoundError:
            return None

    def accept(self, video_id: str, holder: str) -> None:
        """Begin the first term of a new video."""
        self._stored.put(marker_of(video_id, 0), holder.encode())

    def take(self, video_id: str, term: int, holder: str) -> bool:
        """Begin a term of a video, the next one after the highest. False: another holder was faster."""
        try:
            self._stored.create(marker_of(video_id, term), holder.encode())
        except FileExistsError:
            return False
        return True

    def remove(self, video_id: str, *, term: int) -> None:
        """Remove the markers of a video that is over, up to this term. The first one goes last, as it is looked for."""
        for one in range(term, -1, -1):
            self._stored.remove(marker_of(video_id, one))

    # --- holders ----------------------------------------------------------------------------------------------------

    def write_holder(self, name: str, said: bytes) -> None:
        """Show that a holder is there. ``said`` must differ from what it said before."""
        self._stored.put(f"{HOLDERS}/{name}", said)

    def holders(self) -> dict[str, bytes]:
        """What each holder last said, by name; nothing for one whose file cannot be read."""
        said: dict[str, bytes] = {}
        for name in self._stored.names(HOLDERS):
            try:
                found = self.read_holder(name)
            except StorageError:  # of one entry: the others count all the same
                found = b""
            if found is not None:
                said[name] = found
        return said

    def read_holder(self, name: str) -> bytes | None:
        """What a holder last said; None for one that has left or was replaced."""
        try:
            return self._stored.cat(f"{HOLDERS}/{name}")
        except FileNotFoundError:
            return None

    def remove_holder(self, name: str) -> None:
        """Show that a holder is gone: what it held is free at once."""
        self._stored.remove(f"{HOLDERS}/{name}")


def marker_of(video_id: str, term: int) -> str:
    """The path of the marker of a term. Raises ``ValueError`` for what is no id."""
    if not is_video_id(video_id):
        raise ValueError(f"id={video_id[:60]!r}: must be video_ and 32 hexadecimal digits")
    return f"{_MARKERS}/{video_id}.{term}" if term else f"{_MARKERS}/{video_id}"
