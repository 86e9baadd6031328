"""Ctrl-C while a command line is still being imported."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

_INTERRUPTED = 130
_SERVING = ("up", "demo", "bench")
"""Commands that SIGINT ends even where a shell script has started them in the background, see ``StopSignals``."""


@contextmanager
def leaving_at_interrupt(arguments: Sequence[str] | None) -> Iterator[None]:
    """End the process with status 130 at SIGINT within the block.

    There is nothing to clean up yet, and an exception during an import could be lost or end in a traceback.
    """
    before = signal.getsignal(signal.SIGINT)
    given = sys.argv[1:] if arguments is None else arguments
    is_ignored = before is signal.SIG_IGN and not (given and given[0] in _SERVING)
    if is_ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    name = " ".join(["pyramid-serve", *(word for word in given[:1] if word.isalpha())])

    def leave(number: int, frame: FrameType | None) -> None:
        os.write(2, f"{name}: interrupted\n".encode())
        os._exit(_INTERRUPTED)

    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
