"""The whole cluster goes, by power cut or by plan, and what it had accepted is finished by the next."""

import asyncio
from pathlib import Path

import pytest

from pyramid_serve.api import Status
from pyramid_serve.storage import VideoStore
from tests.cluster.conftest import (
    Undisturbed,
    check,
    cluster_of,
    config_of,
    deploy,
    kill,
    replicas,
    request_of,
    until_units_done,
)

pytestmark = [pytest.mark.asyncio, pytest.mark.slow]  # tests/serve/cli/test_up.py ends and restarts a server in CI


async def test_a_cluster_taken_down_whole_finishes_what_it_had_accepted(
    miniflux: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    config = config_of(miniflux, tmp_path, claims={"settings": {"lease_s": 5.0, "max_running": 2}})
    store = VideoStore(str(tmp_path))
    with cluster_of("denoiser", "decoder"):
        client = deploy(config)
        records = [await client.submit(request_of(seed, seconds=2, steps=20)) for seed in (21, 22, 23)]
        await until_units_done(client, records[0].id, 2)
        for replica in replicas():
            kill(replica)
    before = store.read(records[0].id)
    assert before.status is Status.IN_PROGRESS
    assert store.read(records[2].id).status is Status.QUEUED
    with cluster_of("denoiser", "decoder"):
        client = deploy(config)
        for record in records:
            async with asyncio.timeout(120):
                check(await client.wait(record.id), store, undisturbed)
        first = store.read(records[0].id)
        assert first.attempts == 2
        # Nothing that was saved is made again.
        saved = {entry for entry in before.timeline if entry.unit is not None}
        again = [
            entry
            for entry in first.timeline
            if entry not in saved
            and (entry.stage, entry.unit)
            in {(entry.stage, entry.unit) for entry in saved if (entry.unit or 0) < before.num_units_done}
        ]
        assert again == []
