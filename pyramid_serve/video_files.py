"""The files in a video's folder beside its record: what its units leave, and the whole files that clients may fetch.

A file is only added to a folder that has a record, so that nothing brings a deleted video back.
"""

from collections.abc import Container
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy
import safetensors.numpy
from numpy.typing import NDArray

from pyramid_serve.api import is_video_id
from pyramid_serve.errors import VideoNotFoundError
from pyramid_serve.stored_files import StoredFiles

RECORD = "video.json"
_LATENTS = "latents"
_STATES = "states"


class VideoFile(StrEnum):
    """The files of a video that clients may fetch."""

    VIDEO = "video.mp4"
    GIF = "video.gif"
    WEBP = "video.webp"
    FRAMES = "frames.zip"
    THUMBNAIL = "thumbnail.webp"
    SPRITESHEET = "spritesheet.webp"
    PICTURE = "input.png"


@dataclass(frozen=True)
class FrameFile:
    """One frame of a video as PNG, from 0 on. Clients may fetch it too."""

    index: int

    def __str__(self) -> str:
        return f"frames/{self.index:05d}.png"


class VideoFiles:
    """The files of all videos under one root."""

    def __init__(self, stored: StoredFiles) -> None:
        self._stored = stored

    def has_record(self, video_id: str) -> bool:
        """Whether there is such a video."""
        return self._stored.exists(f"{folder_of(video_id)}/{RECORD}")

    # --- what the units leave ---------------------------------------------------------------------------------------

    def save_latents(self, video_id: str, unit: int, latents: NDArray[numpy.float32]) -> None:
        """Keep a unit's latents. Raises ``VideoNotFoundError`` for a deleted video."""
        self._add(video_id, _latents_name(unit), safetensors.numpy.save({_LATENTS: latents}))

    def load_latents(self, video_id: str) -> list[NDArray[numpy.float32]]:
        """The latents of units 0, 1, ... up to the first that is missing."""
        num_units = len(self._units(video_id, _LATENTS, ".safetensors"))
        return [self.load_unit_latents(video_id, unit) for unit in range(num_units)]

    def load_unit_latents(self, video_id: str, unit: int) -> NDArray[numpy.float32]:
        """The latents of one unit. Raises ``VideoNotFoundError`` where they are not (yet) there."""
        try:
            stored = self._stored.cat(f"{folder_of(video_id)}/{_latents_name(unit)}")
        except FileNotFoundError:
            raise VideoNotFoundError(f"{video_id}: no latents of unit {unit}") from None
        latents: NDArray[numpy.float32] = safetensors.numpy.load(stored)[_LATENTS]
        return latents

    def save_state(self, video_id: str, unit: int, attempt: int, state: bytes) -> bool:
        """Keep where an attempt at a unit stands, in place of all earlier states of the unit.

        False: nothing is kept, since a later attempt has saved a state, or the unit's latents are there. Raises
        ``VideoNotFoundError`` for a deleted video.
        """
        others = {
            name: of_attempt for name, of_attempt in self._states(video_id, unit).items() if of_attempt != attempt
        }
        if max(others.values(), default=0) > attempt:
            return False
        name = _state_name(unit, attempt)
        self._add(video_id, name, state)
        for other in others:
            self._stored.remove(f"{folder_of(video_id)}/{other}")
        # Whoever saves the latents removes the states after that, so that one of both sees what the other did.
        if self._stored.exists(f"{folder_of(video_id)}/{_latents_name(unit)}"):
            self._stored.remove(f"{folder_of(video_id)}/{name}")
            return False
        return True

    def load_state(self, video_id: str, unit: int) -> bytes | None:
        """The state of a unit that its latest attempt saved."""
        states = self._states(video_id, unit)
        if not states:
            return None
        try:
            return self._stored.cat(f"{folder_of(video_id)}/{max(states, key=lambda name: states[name])}")
        except FileNotFoundError:  # an attempt that is not the latest any more has removed it
            return None

    def remove_states(self, video_id: str, units: Container[int]) -> None:
        """Remove the states of units, of all attempts."""
        for name in self._stored.names(f"{folder_of(video_id)}/{_STATES}"):
            unit, _ = _unit_and_attempt(name)
            if unit in units:
                self._stored.remove(f"{folder_of(video_id)}/{_STATES}/{name}")

    def save_fragment(self, video_id: str, unit: int, fragment: bytes) -> None:
        """Keep a unit's part of the stream. Raises ``VideoNotFoundError`` for a deleted video."""
        self._add(video_id, f"stream/{unit:03d}.m4s", fragment)

    def num_fragments(self, video_id: str) -> int:
        """How many units in a row, from unit 0 on, have their part of the stream saved."""
        return len(self._units(video_id, "stream", ".m4s"))

    def fragment_sizes(self, video_id: str) -> list[int]:
        """The sizes in bytes of the saved parts of the stream, of units 0, 1, ... up to the first that is missing."""
        sizes = self._stored.sizes(f"{folder_of(video_id)}/stream")
        in_a_row: list[int] = []
        while (name := f"{len(in_a_row):03d}.m4s") in sizes:
            in_a_row.append(sizes[name])
        return in_a_row

    def load_fragment(self, video_id: str, unit: int) -> bytes:
        """A unit's part of the stream. Raises ``VideoNotFoundError`` where it is not (yet) there."""
        try:
            fragment = self._stored.cat(f"{folder_of(video_id)}/stream/{unit:03d}.m4s")
        except FileNotFoundError:
            raise VideoNotFoundError(f"{video_id}: no unit {unit}") from None
        return fragment

    def put_picture(self, video_id: str, picture: bytes) -> None:
        """Write the picture of a video that is to be accepted next. Without a record it is swept away later."""
        self._stored.put(f"{folder_of(video_id)}/{VideoFile.PICTURE}", picture)

    # --- whole files ------------------------------------------------------------------------------------------------

    def attach(self, video_id: str, file: VideoFile | FrameFile, content: bytes | Path) -> None:
        """Add or replace one of the video's files, from memory or from a local file.

        Raises ``VideoNotFoundError`` for a deleted video.
        """
        self._add(video_id, str(file), content)

    def fetch(self, video_id: str, file: VideoFile | FrameFile) -> bytes:
        """One of the video's files. Raises ``VideoNotFoundError`` where it is not (yet) there."""
        try:
            content = self._stored.cat(f"{folder_of(video_id)}/{file}")
        except FileNotFoundError:
            raise VideoNotFoundError(f"{video_id}: no {file}") from None
        return content

    def size_of(self, video_id: str, file: VideoFile | FrameFile) -> int:
        """Bytes of one of the video's files. Raises ``VideoNotFoundError`` where it is not (yet) there."""
        try:
            return self._stored.size(f"{folder_of(video_id)}/{file}")
        except FileNotFoundError:
            raise VideoNotFoundError(f"{video_id}: no {file}") from None

    def read_range(self, video_id: str, file: VideoFile | FrameFile, start: int, end: int) -> bytes:
        """Bytes ``start`` up to ``end`` of one of the video's files. Raises ``VideoNotFoundError`` as ``fetch``."""
        try:
            content = self._stored.cat(f"{folder_of(video_id)}/{file}", start=start, end=end)
        except FileNotFoundError:
            raise VideoNotFoundError(f"{video_id}: no {file}") from None
        return content

    def _units(self, video_id: str, subfolder: str, suffix: str) -> list[str]:
        names = set(self._stored.names(f"{folder_of(video_id)}/{subfolder}"))
        units: list[str] = []
        while (name := f"{len(units):03d}{suffix}") in names:
            units.append(name)
        return units

    def _states(self, video_id: str, unit: int) -> dict[str, int]:
        """The attempt of each state of a unit, by the name of its file."""
        names = self._stored.names(f"{folder_of(video_id)}/{_STATES}")
        found = {name: _unit_and_attempt(name) for name in names}
        return {f"{_STATES}/{name}": attempt for name, (of_unit, attempt) in found.items() if of_unit == unit}

    def _add(self, video_id: str, name: str, content: bytes | Path) -> None:
        """Write a file of a video that exists, and make sure that the video was not deleted meanwhile."""
        path = f"{folder_of(video_id)}/{name}"
        if not self.has_record(video_id):
            raise VideoNotFoundError(f"{video_id}: no such video")
        self._stored.put(path, content)
        if not self.has_record(video_id):
            self._stored.remove(path)
            self._stored.remove_folder(folder_of(video_id))
            raise VideoNotFoundError(f"{video_id}: deleted meanwhile")


def folder_of(video_id: str) -> str:
    """The folder of a video under the root. Raises ``ValueError`` for what is no id."""
    if not is_video_id(video_id):
        raise ValueError(f"id={video_id[:60]!r}: must be video_ and 32 hexadecimal digits")
    return f"videos/{video_id}"


def _latents_name(unit: int) -> str:
    return f"{_LATENTS}/{unit:03d}.safetensors"


def _state_name(unit: int, attempt: int) -> str:
    return f"{_STATES}/{unit:03d}-{attempt}"


def _unit_and_attempt(name: str) -> tuple[int, int]:
    """What the name of a state tells; (-1, -1) for any other file."""
    unit, _, attempt = name.partition("-")
    return (int(unit), int(attempt)) if unit.isdecimal() and attempt.isdecimal() else (-1, -1)
