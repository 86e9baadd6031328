"""What callers of the handles see while the storage cannot be written."""

from pathlib import Path

import pytest

from pyramid_serve.storage import StorageError
from tests.serve.orchestrator.conftest import Handle, request_of

pytestmark = pytest.mark.asyncio


async def test_errors_of_the_storage_cross_ray_and_videos_are_taken_once_it_recovers(
    handle: Handle, storage: Path
) -> None:
    request = request_of(31, seconds=0.4, steps=1, size="64x64")
    record = await handle.generate.remote(request)
    assert record.status == "completed"
    # Where files are written before they are moved in place there is a file now: nothing can be written.
    aside = storage / "aside"
    aside.rmdir()
    aside.write_text("in the way")
    try:
        for key in (None, "a key"):
            with pytest.raises(StorageError, match="cannot be written") as raised:
                await handle.submit.remote(request, key)
            assert "Traceback" not in str(raised.value.cause)  # type: ignore[attr-defined]
        views, _ = await handle.list.remote()
        assert views[0].record.id == record.id
        assert (await handle.get.remote(record.id)).record.status == "completed"
    finally:
        aside.unlink()
    assert (await handle.generate.remote(request, "a key")).status == "completed"
