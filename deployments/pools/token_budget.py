"""How many tokens a forward may have: fewer after memory has run out, and more again after a while."""

import logging

logger = logging.getLogger(__name__)

REGROW_FORWARDS = 64
"""Forwards that must go well before a token budget that was halved is doubled."""
_MAX_REGROW_FORWARDS = 4096


class TokenBudget:
    """How many tokens a forward may have: fewer once memory has run out, and as many as before after a while.

    After enough forwards that went well it is doubled, until it is what was configured. Each time that memory runs out
    again, twice as many forwards are enough.
    """

    def __init__(self, configured: int | None) -> None:
        """configured: at least 1, or None for no limit."""
        self.current = configured
        self._configured = configured
        self._num_forwards_to_regrow = REGROW_FORWARDS
        self._num_good_forwards = 0
        self._too_many = 0

    def went_well(self) -> None:
        """A forward has ended without running out of memory."""
        self._num_good_forwards += 1
        if self._num_good_forwards < self._num_forwards_to_regrow:
            return
        self._num_good_forwards = 0
        if self.current == self._configured:
            self._num_forwards_to_regrow = REGROW_FORWARDS
            return
        assert self.current is not None
        before, doubled = self.current, 2 * self.current
        if self._configured is None:
            self.current = doubled if doubled < self._too_many else None
        else:
            self.current = min(doubled, self._configured)
        logger.info("token budget from %d to %s", before, self.current)

    def ran_out_of_memory(self, num_tokens: int) -> None:
        """A forward of so many tokens, of several slots, was too large."""
        before = self.current
        self.current = max(1, (num_tokens if before is None else min(before, num_tokens)) // 2)
        if self._too_many:
            self._num_forwards_to_regrow = min(2 * self._num_forwards_to_regrow, _MAX_REGROW_FORWARDS)
        self._too_many = num_tokens
        self._num_good_forwards = 0
        logger.warning("token budget from %s to %d", before, self.current)
