"""How a command that runs Ray ends on a signal: with nothing left behind, and a word on stderr."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from deployments.cli.printing import say
from deployments.local.signals import StopSignals
from pyramid_serve.cli import INTERRUPTED


@contextmanager
def ending(command: str, *, terminated: int = INTERRUPTED) -> Iterator[StopSignals]:
    """End the block at SIGTERM, SIGINT or SIGHUP; see ``StopSignals``.

    command: its name, for the message. terminated: the exit status after SIGTERM; 0 means that SIGTERM is the usual way
    to end this command.
    """

    def leave(number: int) -> int:
        is_stopped = number == signal.SIGTERM and terminated == 0
        with suppress(OSError):  # the terminal may have been closed
            say(f"pyramid-serve {command}: {'stopped' if is_stopped else 'interrupted'}", file=sys.stderr)
        return terminated if number == signal.SIGTERM else INTERRUPTED

    with StopSignals(leave=leave) as signals:
        try:
            yield signals
        except KeyboardInterrupt:
            signals.end()
            if signals.received != signal.SIGTERM or terminated:
                raise
            say(f"pyramid-serve {command}: stopped", file=sys.stderr)
