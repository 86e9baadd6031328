"""New videos on their way to claims: those that come at the same time go in one call."""

import asyncio
from collections.abc import Awaitable
from functools import partial
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.claims.asking import ask_claims
from deployments.claims.messages import Admitted
from deployments.rpc.tasks import begin_apart
from pyramid_serve.api import VideoRecord

_MAX_CALLS = 4
"""A video that takes claims long, as others with its key are still being accepted, holds up only those of its call."""
_MAX_IN_A_CALL = 64


class Submissions:
    """Sends records to claims. Most of a call's cost does not depend on how many it carries."""

    def __init__(self, claims: DeploymentHandle[Any]) -> None:
        self._claims = claims
        self._waiting: list[tuple[VideoRecord, asyncio.Future[Admitted]]] = []
        self._num_calls = 0

    async def submit(self, record: VideoRecord) -> Admitted:
        """What claims makes of a record, see ``Claims.submit``; what that returns as an error is raised here."""
        answer: asyncio.Future[Admitted] = asyncio.get_running_loop().create_future()
        self._waiting.append((record, answer))
        if self._num_calls < _MAX_CALLS:
            self._num_calls += 1
            begin_apart(self._send())
        return await answer

    async def _send(self) -> None:
        try:
            while self._waiting:
                sent, self._waiting = self._waiting[:_MAX_IN_A_CALL], self._waiting[_MAX_IN_A_CALL:]
                records = [record for record, _ in sent]
                try:
                    results: list[Admitted | Exception] = await ask_claims(partial(self._ask, records))
                except Exception as error:
                    results = [error] * len(sent)
                for (_, answer), result in zip(sent, results, strict=True):
                    if answer.done():  # nobody waits for it any more
                        continue
                    if isinstance(result, Exception):
                        answer.set_exception(result)
                    else:
                        answer.set_result(result)
        finally:
            self._num_calls -= 1

    def _ask(self, records: list[VideoRecord]) -> Awaitable[list[Admitted | Exception]]:
        return self._claims.submit.remote(records)
