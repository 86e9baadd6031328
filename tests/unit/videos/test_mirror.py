import asyncio
from pathlib import Path
from typing import Any

import pytest

from deployments.claims.deployment import Claims
from deployments.claims.messages import RunUpdate
from deployments.claims.watchers import Changes
from deployments.videos.mirror import Mirror
from deployments.videos.videos import Videos
from pyramid_serve.api import Status
from pyramid_serve.served_model import ServedModels
from pyramid_serve.storage import VideoStore
from tests.serve.local_server import MODEL, LocalHandle
from tests.unit.claims.claims_at_hand import FakeOrchestrators, claimed, claims_of, eventually, submitted

pytestmark = pytest.mark.asyncio


class Replaceable:
    """A handle whose deployment can be replaced; nobody answers while it is None."""

    claims: Claims | None = None

    async def news(self, *arguments: Any) -> Any:
        if self.claims is None:
            raise TimeoutError
        return await self.claims.news(*arguments)


def mirror_of(deployment: Any) -> Mirror:
    return Mirror(LocalHandle(deployment))  # type: ignore[arg-type]


async def test_it_shows_each_unfinished_video_with_its_place_and_no_other(tmp_path: Path) -> None:
    async with claims_of(tmp_path, FakeOrchestrators(), max_running=1) as claims:
        first = await claimed(claims, (await submitted(claims)).id)
        mirror = mirror_of(claims)
        assert mirror.get(first.id) is None  # it begins to follow
        await eventually(lambda: mirror.get(first.id) is not None)
        second = await submitted(claims)
        await eventually(lambda: mirror.get(second.id) is not None)
        await claims.update(first.id, first.attempts, RunUpdate(has_started=True, num_steps_done=3))

        def steps_of_first() -> int:
            view = mirror.get(first.id)
            return 0 if view is None else view.record.num_steps_done

        await eventually(lambda: steps_of_first() == 3)

        def position_of_second() -> int | None:
            view = mirror.get(second.id)
            return None if view is None else view.place.position

        await eventually(lambda: position_of_second() == 0)
        await claims.complete(first.id, first.attempts, RunUpdate())
        await claims.delete(second.id, "token")
        await eventually(lambda: mirror.get(first.id) is None and mirror.get(second.id) is None)


async def test_it_shows_nothing_while_claims_is_away_and_all_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.videos.mirror._CURRENT_S", 0.2)
    monkeypatch.setattr("deployments.videos.mirror._ASK_S", 0.1)
    handle = Replaceable()
    mirror = mirror_of(handle)
    async with claims_of(tmp_path, FakeOrchestrators()) as before:
        handle.claims = before
        record, other = await submitted(before), await submitted(before)
        mirror.get(record.id)
        await eventually(lambda: mirror.get(record.id) is not None)
        handle.claims = None
        await eventually(lambda: mirror.get(record.id) is None)
    async with claims_of(tmp_path, FakeOrchestrators()) as after:
        await after.cancel(other.id)
        handle.claims = after
        await eventually(lambda: mirror.get(record.id) is not None)
        view = mirror.get(record.id)
        assert view is not None and view.record.status is Status.QUEUED
        assert mirror.get(other.id) is None


async def test_what_was_forgotten_is_shown_again_after_its_next_change(tmp_path: Path) -> None:
    async with claims_of(tmp_path, FakeOrchestrators()) as claims:
        record = await claimed(claims, (await submitted(claims)).id)
        mirror = mirror_of(claims)
        mirror.get(record.id)
        await eventually(lambda: mirror.get(record.id) is not None)
        mirror.forget(record.id)
        assert mirror.get(record.id) is None
        await claims.update(record.id, record.attempts, RunUpdate(num_steps_done=1))
        await eventually(lambda: mirror.get(record.id) is not None)


async def test_who_missed_too_much_is_told_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.claims.watchers._MAX_GONE", 2)
    changes = Changes()
    for name in "abcd":
        changes.change(name)
    seen = changes.number
    changes.go("a")
    assert changes.is_known(seen) and changes.gone_since(seen) == ["a"] and changes.changed_since(2) == ["d", "c"]
    for name in "bcd":
        changes.go(name)
    assert not changes.is_known(seen)
    assert changes.is_known(changes.number) and not changes.is_known(changes.number + 1)
    waiting = asyncio.create_task(changes.wait())
    await asyncio.sleep(0)
    changes.change("a")
    await waiting


async def test_who_has_heard_of_the_end_is_shown_nothing_earlier(tmp_path: Path) -> None:
    async with claims_of(tmp_path, FakeOrchestrators()) as claims:
        record = await submitted(claims)
        videos = Videos(VideoStore(str(tmp_path)), LocalHandle(claims), ServedModels((MODEL,)))  # type: ignore[arg-type]
        videos.mirror.get(record.id)
        await eventually(lambda: videos.mirror.get(record.id) is not None)
        waiting = asyncio.create_task(videos.wait(record.id))
        await asyncio.sleep(0.1)
        late = await claims.news("", 0, 0.1)
        await claims.cancel(record.id)
        await waiting
        assert videos.mirror.get(record.id) is None
        videos.mirror._take(late)
        assert videos.mirror.get(record.id) is None


async def test_a_deleted_video_is_not_shown_by_an_answer_that_was_on_its_way(tmp_path: Path) -> None:
    async with claims_of(tmp_path, FakeOrchestrators()) as claims:
        record = await submitted(claims)
        videos = Videos(VideoStore(str(tmp_path)), LocalHandle(claims), ServedModels((MODEL,)))  # type: ignore[arg-type]
        videos.mirror.get(record.id)
        await eventually(lambda: videos.mirror.get(record.id) is not None)
        late = await claims.news("", 0, 0.1)
        await videos.delete(record.id)
        videos.mirror._take(late)
        assert videos.mirror.get(record.id) is None


async def test_what_is_shown_does_not_go_back_to_what_was_saved_earlier(tmp_path: Path) -> None:
    async with claims_of(tmp_path, FakeOrchestrators()) as claims:
        saved = await claimed(claims, (await submitted(claims)).id)
        await claims.update(saved.id, saved.attempts, RunUpdate(num_steps_done=2))
        mirror = mirror_of(claims)
        mirror.get(saved.id)
        await eventually(lambda: mirror.get(saved.id) is not None)
        mirror.hear(saved)
        view = mirror.get(saved.id)
        assert view is not None and view.record.num_steps_done == 2
