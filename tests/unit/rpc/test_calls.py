import asyncio
from typing import Any

import pytest

from deployments.rpc.calls import call

pytestmark = pytest.mark.asyncio


class Response:
    """What ``call`` uses of a ``DeploymentResponse``."""

    def __init__(self) -> None:
        self.result: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.num_cancelled = 0

    def __await__(self) -> Any:
        return self.result.__await__()

    def cancel(self) -> None:
        self.num_cancelled += 1


async def test_a_call_is_cancelled_with_its_caller() -> None:
    response = Response()
    task = asyncio.create_task(call(response))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert response.num_cancelled == 1


async def test_a_call_that_is_answered_is_not_cancelled() -> None:
    response = Response()
    response.result.set_result(7)
    assert await call(response) == 7
    assert response.num_cancelled == 0
