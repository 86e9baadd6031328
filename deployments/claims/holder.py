"""The standing of a claims deployment among others on the same storage: which of them are there, and who is the newest.

Each one is a *holder* of videos (see ``pyramid_serve.video_holds``). It says every few seconds that it is there. Others
take what it holds when it has said nothing new for a lease, by their own clock; it stops writing before that, by its
own. So clocks need not agree.
"""

import asyncio
import errno
import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from deployments.errors import SupersededError
from pyramid_serve.storage import StorageError, VideoStore

logger = logging.getLogger(__name__)

_CHECKED_S = 1.0


class _Said(NamedTuple):
    """What a holder says of itself."""

    is_ready: bool = False
    is_yielding: bool = False
    is_leaving: bool = False
    where: str = ""
    """The machine and the space of process ids, ``pid`` being that of its process."""
    pid: int = 0


class _Sight(NamedTuple):
    """What another holder last said, and when that was seen first, on this machine's monotonic clock."""

    content: bytes
    said: _Said
    since: float


class Holder:
    """One claims deployment among those on its storage. For one event loop."""

    def __init__(self, store: VideoStore, *, app: str, lease_s: float) -> None:
        """app: the same for all replicas of one app in one cluster, of which the last one counts."""
        self.name = _new_name(app, started_ms=time.time_ns() // 1_000_000)
        """In the order of starting. It tells the app too."""
        self.lease_s = lease_s
        self.is_ready = False
        """Whether the app can make videos. Older holders begin nothing new once a newer one is ready."""
        self.is_superseded = False
        """Another replica of the same app has started since."""
        self.is_exclusive = True
        """Whether the storage lets only one of several holders take a video."""
        self._holds = store.holds
        self._store = store
        self._app = app
        self._num_beats = 0
        self._is_yielding = False
        self._is_leaving = False
        self._where = _where()
        self._valid_until = 0.0
        self._refusal = StorageError(errno.ETIMEDOUT, "the storage does not answer")
        self._checked_at = 0.0
        self._others: dict[str, _Sight] = {}

    # --- what it is and may do ----------------------------------------------------------------------------------------

    @property
    def is_yielding(self) -> bool:
        """Whether a newer holder is ready: this one begins nothing new and gives up what it does not work on.

        Never where the storage cannot tell who took a video, for there the newer one stands by.
        """
        return self._is_yielding

    @property
    def stands_by(self) -> bool:
        """Whether this one leaves all videos to an older holder, because the storage cannot tell who took a video."""
        return not self.is_exclusive and any(self._is_live(name) for name in self._others if name < self.name)

    @property
    def has_others(self) -> bool:
        """Whether other holders were there lately."""
        return bool(self._others)

    @property
    def is_believed(self) -> bool:
        """Whether others believe that this one is there, so that it may write."""
        return time.monotonic() <= self._valid_until

    def is_of_this_app(self, name: str) -> bool:
        """Whether a holder of this name is, or was, a replica of the same app."""
        return _app_of(name) == _app_of(self.name)

    def has_left(self, name: str) -> bool:
        """Whether a holder of this name is gone, so that what it holds may be taken."""
        return name != self.name and not self._is_live(name)

    def yields(self, name: str) -> bool:
        """Whether another holder has said that it leaves to this one what it does not work on."""
        sight = self._others.get(name)
        return sight is not None and (sight.said.is_leaving or (sight.said.is_yielding and name < self.name))

    async def check(self, *, closely: bool = False) -> None:
        """Raise ``SupersededError`` or ``StorageError`` where this one must write nothing.

        Whether another replica of the app has started is looked up in the storage each time if ``closely``, else at
        most once a second.
        """
        self.check_superseded()
        if not self.is_believed:
            refusal = self._refusal
            raise StorageError(refusal.errno, refusal.strerror)  # a new one, as raising one again extends its traceback
        if closely or time.monotonic() > self._checked_at + _CHECKED_S:
            if await asyncio.to_thread(self._holds.read_holder, self.name) is None:
                self.is_superseded = True
            self._checked_at = time.monotonic()
        self.check_superseded()

    def check_superseded(self) -> None:
        """Raise ``SupersededError`` where another replica of the app is known to have started."""
        if self.is_superseded:
            raise SupersededError("another replica of the claims deployment has taken over")

    # --- telling and looking ------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Be there, in the place of any earlier replica of the same app."""
        await self._look()
        if any(name > self.name for name in self._others):  # a clock was set back since
            latest_ms = max(_started_ms(name) for name in self._others)
            self.name = _new_name(self._app, started_ms=latest_ms + 1)
        await asyncio.to_thread(self._store.write_epoch, self.name)
        self.is_exclusive = await asyncio.to_thread(self._holds.create_exclusively)
        self._valid_until = await self._tell()
        for name in [name for name in self._others if self.is_of_this_app(name)]:
            await asyncio.to_thread(self._holds.remove_holder, name)
            del self._others[name]
        await self._look()
        if self.stands_by:
            logger.warning(
                "claims: this storage cannot tell which of two apps took a video first, so this app makes none while "
                "another one is there"
            )

    async def beat(self) -> bool:
        """Say that this one is there, and look at the others.

        False: it was silent for so long that others may have taken what it held. It must find out what they took, and
        then call ``stand_again``.
        """
        self.check_superseded()
        if await asyncio.to_thread(self._holds.read_holder, self.name) is None:
            self.is_superseded = True
        self.check_superseded()
        valid_until = await self._tell()
        await self._look()
        self.is_superseded |= any(self.is_of_this_app(name) and name > self.name for name in self._others)
        self.check_superseded()
        was_yielding, self._is_yielding = self._is_yielding, self.is_exclusive and self._newer_is_ready()
        if self._is_yielding != was_yielding:
            logger.info("claims: %s", "a newer app is ready" if self._is_yielding else "the newer app is gone")
        if not self.is_believed:
            return False
        self._valid_until = valid_until
        return True

    async def stand_again(self) -> None:
        """Be one who may write, after all that was lost meanwhile is known."""
        self._valid_until = await self._tell()

    def leave(self) -> None:
        """Say that this one goes, so that others need not wait for its lease to end with what nobody works on. Blocks.

        What is worked on may go on: where only this replica is replaced, the next one of the same app hears of it.
        """
        self._valid_until = 0.0
        self._is_leaving = True
        if self._holds.read_holder(self.name) is not None:
            self._holds.write_holder(self.name, self._said())

    async def _tell(self) -> float:
        """Say that this one is there; return until when others believe it at least."""
        told_at = time.monotonic()
        try:
            await asyncio.to_thread(self._holds.write_holder, self.name, self._said())
        except StorageError as error:
            self._refusal = error
            raise
        return told_at + self.lease_s

    def _said(self) -> bytes:
        self._num_beats += 1
        said = _Said(self.is_ready, self._is_yielding, self._is_leaving, self._where, os.getpid())
        return json.dumps({**said._asdict(), "num_beats": self._num_beats}).encode()

    async def _look(self) -> None:
        found = await asyncio.to_thread(self._holds.holders)
        now = time.monotonic()
        for name in [name for name in self._others if name not in found]:
            del self._others[name]
        for name, content in found.items():
            sight = self._others.get(name)
            if name != self.name and (sight is None or sight.content != content):
                self._others[name] = _Sight(content, _parsed(content), now)
        for name in self._others:
            if not self._is_live(name) and time.monotonic() > self._others[name].since + 10 * self.lease_s:
                try:
                    await asyncio.to_thread(self._holds.remove_holder, name)
                except StorageError as error:  # it is in nobody's way
                    logger.info("claims: what is left of the holder %s cannot be removed: %s", name, error)

    def _newer_is_ready(self) -> bool:
        return any(
            name > self.name and self._is_live(name) and self._others[name].said.is_ready for name in self._others
        )

    def _is_live(self, name: str) -> bool:
        sight = self._others.get(name)
        if sight is None or time.monotonic() > sight.since + self.lease_s:
            return False
        is_here = bool(self._where) and sight.said.where == self._where
        return not is_here or os.path.exists(f"/proc/{sight.said.pid}")


def _parsed(content: bytes) -> _Said:
    try:
        fields = json.loads(content)
        return _Said(**{name: kind(fields[name]) for name, kind in _Said.__annotations__.items()})
    except (ValueError, TypeError, KeyError):  # of a later release, or half written
        return _Said()


def _where() -> str:
    """What two processes have in common that see each other's ids in ``/proc``; empty on other systems than Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _new_name(app: str, *, started_ms: int) -> str:
    return f"{started_ms:015d}-{hashlib.sha256(app.encode()).hexdigest()[:12]}-{uuid4().hex[:12]}"


def _app_of(name: str) -> str:
    return name.split("-")[1] if name.count("-") == 2 else ""


def _started_ms(name: str) -> int:
    started = name.partition("-")[0]
    return int(started) if started.isdecimal() else 0
