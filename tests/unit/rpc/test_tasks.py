import asyncio

import pytest

from deployments.rpc.tasks import apart

pytestmark = pytest.mark.asyncio


async def test_an_error_after_the_caller_has_left_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    may_fail = asyncio.Event()

    async def fail() -> None:
        await may_fail.wait()
        raise ValueError("nobody hears this")

    waiting = asyncio.create_task(apart(fail()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    may_fail.set()
    for _ in range(5):
        await asyncio.sleep(0)
    (record,) = caplog.records
    assert record.exc_info is not None and "nobody hears this" in str(record.exc_info[1])
