"""The newest state of one unit in work: in memory for the next call, in the storage for the next attempt."""

import asyncio
import logging
from collections.abc import Callable

from pyramid_serve.storage import StorageError
from pyramid_serve.video_files import VideoFiles

logger = logging.getLogger(__name__)


class KeptState:
    """Of one unit at one attempt."""

    def __init__(
        self, files: VideoFiles, video_id: str, unit: int, *, attempt: int, on_saved: Callable[[], None]
    ) -> None:
        """on_saved: called after each time that the storage took a state."""
        self.newest: bytes | None = None
        """From where the next call can go on."""
        self._files = files
        self._video_id = video_id
        self._unit = unit
        self._attempt = attempt
        self._on_saved = on_saved
        self._waiting: bytes | None = None
        self._is_saving = False
        self._may_be_stored = attempt > 1

    async def load(self) -> None:
        """Take up what an earlier attempt saved. Without it the unit would only take longer, so errors are logged."""
        try:
            self.newest = await asyncio.to_thread(self._files.load_state, self._video_id, self._unit)
        except StorageError as error:
            self._log("cannot be loaded", error)

    def keep(self, state: bytes, tasks: asyncio.TaskGroup) -> None:
        """Keep a state, and save it as soon as the one before is saved; of those that come meanwhile only the last."""
        self.newest = self._waiting = state
        self._may_be_stored = True
        if not self._is_saving:
            self._is_saving = True
            tasks.create_task(self._save())

    async def drop(self) -> None:
        """Remove it from the storage. For after the unit's latents are saved, when no state is kept any more."""
        self.newest = self._waiting = None
        if self._may_be_stored:
            try:
                await asyncio.to_thread(self._files.remove_states, self._video_id, [self._unit])
            except StorageError as error:  # the next attempt removes it, or whoever deletes the video
                self._log("cannot be removed", error)

    async def _save(self) -> None:
        """Raises ``VideoNotFoundError`` for a video that was deleted."""
        try:
            while (state := self._waiting) is not None:
                self._waiting = None
                try:
                    is_saved = await asyncio.to_thread(
                        self._files.save_state, self._video_id, self._unit, self._attempt, state
                    )
                except StorageError as error:  # the next one may be taken
                    self._log("cannot be saved", error)
                else:
                    if is_saved:
                        self._on_saved()
        finally:
            self._is_saving = False

    def _log(self, problem: str, error: StorageError) -> None:
        logger.warning("state of unit %d %s: %s", self._unit, problem, error, extra={"video_id": self._video_id})
