"""Units and forwards for tests of the engine: a unit is a generator, a forward a function."""

import asyncio
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

Steps = Generator[Sequence["Work"], Sequence[str], list[str]]


@dataclass(frozen=True)
class Work:
    """A request: step ``step`` of the unit ``name``."""

    name: str
    step: int
    num_tokens: int = 1
    shape: int = 0


def unit(name: str, num_steps: int, *, num_tokens: int = 1, shape: int = 0) -> Steps:
    """Asks for ``num_steps`` steps of one request each; returns the responses."""
    responses: list[str] = []
    for step in range(num_steps):
        responses.extend((yield (Work(name, step, num_tokens, shape),)))
    return responses


def answer(requests: Sequence[Work]) -> list[str]:
    return [f"{request.name}{request.step}" for request in requests]


class Gate:
    """A forward that tells what it was given and waits to be let through, a forward at a time."""

    def __init__(self, answer: Callable[[Sequence[Work]], list[str]] = answer) -> None:
        self.packs: list[str] = []
        self._answer = answer
        self._begun = threading.Semaphore(0)
        self._allowed = threading.Semaphore(0)

    def __call__(self, requests: Sequence[Work]) -> list[str]:
        self.packs.append("".join(request.name for request in requests))
        self._begun.release()
        assert self._allowed.acquire(timeout=10)
        return self._answer(requests)

    async def wait(self) -> str:
        """Until the next forward has begun: its slots' names."""
        assert await asyncio.to_thread(self._begun.acquire, timeout=10)
        return self.packs[-1]

    def let(self, num_forwards: int = 1) -> None:
        self._allowed.release(num_forwards)
