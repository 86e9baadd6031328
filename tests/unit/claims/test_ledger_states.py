"""Claims under any order of calls, deaths and takeovers: what must hold whatever happens.

Accepted is never lost, over is never undone, a video has one owner at a time, and everyone who waits hears the end.
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any
from uuid import uuid4

import fsspec
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from deployments.claims.deployment import Claims
from deployments.claims.messages import RunUpdate
from deployments.errors import SupersededError
from pyramid_serve.api import Status, VideoRecord
from pyramid_serve.storage import StorageError, VideoNotFoundError, VideoStore
from tests.unit.claims.claims_at_hand import BROKEN, PLAN, FakeOrchestrators, claims_of, end_lease, kill, submitted

APPS = ("one", "other")
NEVER = {
    "lease_s": 1e6,
    "app_lease_s": 1e6,
    "sweep_interval_s": 1e6,
    "rescan_interval_s": 1e6,
    "max_attempts": 3,
    "max_losses": 3,
    "backoff_s": 1e-6,
}
"""Nothing happens by itself."""


class ClaimsStates(RuleBasedStateMachine):
    """Two apps on one storage. Each rule is a call, or what may befall a process."""

    videos: Bundle[str] = Bundle("videos")
    grants: Bundle[tuple[str, str, int]] = Bundle("grants")
    """The app that granted, the video, and the attempt."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.root = f"memory://{uuid4().hex}"
        self.store = VideoStore(self.root)
        self.apps: dict[str, Claims] = {}
        self.kept: set[str] = set()
        self.ends: dict[str, VideoRecord] = {}
        self.watches: dict[str, list[asyncio.Task[VideoRecord | None]]] = {}
        self.num_grants = 0

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, 20))

    async def _open(self, app: str) -> Claims:
        return await claims_of(self.root, FakeOrchestrators(), app=app, **NEVER).__aenter__()

    @initialize()
    def begin(self) -> None:
        for app in APPS:
            self.apps[app] = self.do(self._open(app))

    # --- what happens to processes ------------------------------------------------------------------------------------

    @rule(app=st.sampled_from(APPS))
    def restart(self, app: str) -> None:
        kill(self.apps[app])
        self.apps[app] = self.do(self._open(app))

    @rule(
        app=st.sampled_from(APPS), video=videos, call=st.sampled_from(["update", "complete", "fail", "cancel", "claim"])
    )
    def supersede(self, app: str, video: str, call: str) -> None:
        """Another replica starts while the one before still runs, which then tries to write."""
        before = self.apps[app]
        record = before._ledger.records.get(video)
        self.apps[app] = self.do(self._open(app))
        attempt = 0 if record is None else record.attempts
        calls: dict[str, Callable[[], Any]] = {
            "update": lambda: before.update(video, attempt, RunUpdate(num_units_done=1)),
            "complete": lambda: before.complete(video, attempt, RunUpdate()),
            "fail": lambda: before.fail(video, attempt, BROKEN, is_final=True),
            "cancel": lambda: before.cancel(video),
            "claim": lambda: before.claim(video, "late", "late"),
        }
        before._holder._checked_at = 0.0
        with contextlib.suppress(SupersededError, StorageError, VideoNotFoundError):
            assert not self.do(calls[call]()) or video in self.ends
        kill(before)

    @rule(app=st.sampled_from(APPS))
    def look(self, app: str) -> None:
        self.do(self.apps[app]._sweep._takeover.scan())

    @rule(app=st.sampled_from(APPS))
    def die_for_a_lease(self, app: str) -> None:
        """One app is gone for so long that the other takes its videos; then it is back."""
        (other,) = (self.apps[name] for name in APPS if name != app)
        gone = self.apps[app]
        kill(gone)
        for name, sight in other._holder._others.items():
            other._holder._others[name] = sight._replace(since=-1e9)
        self.do(other._sweep._takeover.scan())
        self.apps[app] = self.do(self._open(app))

    @rule(app=st.sampled_from(APPS), video=videos)
    def lose(self, app: str, video: str) -> None:
        """An owner is silent for too long."""
        claims = self.apps[app]
        record = claims._ledger.records.get(video)
        if record is not None and record.owner is not None:
            end_lease(claims, video)
            self.do(claims._sweep._lose_quietly(video, record.attempts, "silent"))

    # --- calls --------------------------------------------------------------------------------------------------------

    @rule(target=videos, app=st.sampled_from(APPS), key=st.sampled_from([None, "a", "b"]))
    def accept(self, app: str, key: str | None) -> str:
        record = self.do(submitted(self.apps[app], idempotency_key=key))
        self.kept.add(record.id)
        self.watches.setdefault(record.id, []).append(self.loop.create_task(_to_the_end(self, app, record.id)))
        return str(record.id)

    @rule(target=grants, app=st.sampled_from(APPS), video=videos)
    def claim(self, app: str, video: str) -> Any:
        self.num_grants += 1
        record = self.do(self.apps[app].claim(video, f"owner {self.num_grants}", f"token {self.num_grants}"))
        return multiple() if record is None else (app, video, record.attempts)

    @rule(grant=grants, num_units=st.integers(0, PLAN.num_units))
    def update(self, grant: tuple[str, str, int], num_units: int) -> None:
        app, video, attempt = grant
        was_over = video in self.ends
        is_ours = self.do(self.apps[app].update(video, attempt, RunUpdate(has_started=True, num_units_done=num_units)))
        assert not (is_ours and was_over)

    @rule(grant=consumes(grants))
    def complete(self, grant: tuple[str, str, int]) -> None:
        app, video, attempt = grant
        self.do(self.apps[app].complete(video, attempt, RunUpdate()))

    @rule(grant=consumes(grants), is_final=st.booleans())
    def fail(self, grant: tuple[str, str, int], is_final: bool) -> None:
        app, video, attempt = grant
        self.do(self.apps[app].fail(video, attempt, BROKEN, is_final=is_final))

    @rule(grant=consumes(grants))
    def release(self, grant: tuple[str, str, int]) -> None:
        app, video, attempt = grant
        self.do(self.apps[app].release(video, attempt))

    @rule(app=st.sampled_from(APPS), video=videos)
    def cancel(self, app: str, video: str) -> None:
        if video in self.kept:
            assert self.do(self.apps[app].cancel(video)).is_over

    @rule(app=st.sampled_from(APPS), video=consumes(videos))
    def delete(self, app: str, video: str) -> None:
        with contextlib.suppress(VideoNotFoundError):  # two keys may name one video
            self.do(self.apps[app].delete(video, "token"))
        self.kept.discard(video)
        self.ends.pop(video, None)

    # --- what must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def those_that_wait_are_counted(self) -> None:
        for claims in self.apps.values():
            records = claims._ledger.records.values()
            num_queued = sum(record.status is Status.QUEUED for record in records)
            assert claims._ledger.state == (num_queued, len(records) - num_queued)

    @invariant()
    def what_was_accepted_is_kept_by_one_app_at_most_until_it_is_over_for_good(self) -> None:
        for video in self.kept:
            record = self.store.read(video)
            if video in self.ends:
                assert record == self.ends[video]
            elif record.is_over:
                self.ends[video] = record
        terms = self.store.holds.terms()
        for video in self.kept - set(self.ends):
            assert video in terms
            holder = self.store.holds.holder_of(video, terms[video])
            holding = [
                name
                for name, app in self.apps.items()
                if video in app._ledger.records and app._ledger.terms[video] == terms[video]
            ]
            assert len(holding) <= 1
            assert all(self.apps[name]._holder.name == holder for name in holding)

    def teardown(self) -> None:
        if self.apps:
            for video in self.kept:
                self.do(self.apps["one"].cancel(video))
            for app in self.apps.values():
                self.do(app._sweep._takeover.scan())
            for watching in (task for tasks in self.watches.values() for task in tasks):
                self.do(watching)  # it heard of the end, or that the video is gone
            assert not any(app._ledger.records for app in self.apps.values())
            assert self.store.holds.terms() == {}
            for app in self.apps.values():
                kill(app)
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()
        fsspec.filesystem("memory").store.clear()


async def _to_the_end(states: ClaimsStates, app: str, video_id: str) -> None:
    """Wait for the end of a video as clients do, who ask again when claims is replaced."""
    revision = -1
    while True:
        try:
            record = await states.apps[app].watch(video_id, revision, 0.2)
        except VideoNotFoundError:
            return
        if record is not None:
            if record.is_over:
                return
            revision = record.revision


TestClaimsStates = ClaimsStates.TestCase
TestClaimsStates.settings = settings(
    max_examples=30,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # to find a shorter example takes minutes
    database=None,
)
