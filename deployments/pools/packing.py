"""Which slots of an engine share its next forward. Without torch: plans are made by the same rules."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, TypeVar

PATIENCE = 4
"""Turns that a slot may be passed over before it goes first."""


class Waiting(Protocol):
    """A slot that waits for its next forward."""

    @property
    def submitted_at(self) -> float: ...

    @property
    def requests(self) -> Sequence[Any]:
        """Of its next step."""
        ...

    @property
    def num_tokens(self) -> int:
        """Of all its requests."""
        ...

    @property
    def missed_turns(self) -> int:
        """Turns since it was last in a forward."""
        ...


WaitingT = TypeVar("WaitingT", bound=Waiting)


def choose_pack(
    slots: Sequence[WaitingT],
    *,
    token_budget: int | None,
    max_slots: int | None,
    packs_with: Callable[[Any], Hashable] | None = None,
) -> list[WaitingT]:
    """The slots of the next forward.

    First the oldest by ``submitted_at``; but one passed over for more than ``PATIENCE`` turns goes before all, the
    longest waiting first, so none starves. It may be larger than the whole budget, then it runs alone. After it, in the
    same order, every slot that still fits in, and whose requests can share a forward with the first one's.
    """

    def order(slot: WaitingT) -> tuple[int, float]:
        return -slot.missed_turns if slot.missed_turns > PATIENCE else 0, slot.submitted_at

    def key(slot: WaitingT) -> Hashable:
        return packs_with(slot.requests[0]) if packs_with is not None and slot.requests else None

    pack: list[WaitingT] = []
    num_tokens = 0
    for slot in sorted(slots, key=order):
        if max_slots is not None and len(pack) >= max_slots:
            break
        fits = token_budget is None or num_tokens + slot.num_tokens <= token_budget
        if not pack or (fits and key(slot) == key(pack[0])):
            pack.append(slot)
            num_tokens += slot.num_tokens
    return pack
