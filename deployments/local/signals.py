"""Signals that end a command which runs Ray: each is handled, at any moment, exactly once.

Ray replaces the handler of SIGTERM when it starts: its C++ part prints a backtrace and ends the process, which leaves
Ray's other processes behind. After Ray has stopped, SIGTERM ends the process at once. Therefore SIGTERM is blocked in
every thread, so that no handler gets it, and a thread of this module waits for it.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, Self

_LOOK_S = 0.2
_INSIST_S = 3.0

_active: "StopSignals | None" = None


class StopSignals:
    """Lets SIGTERM, SIGINT and SIGHUP end the block as Ctrl-C does: with ``KeyboardInterrupt`` in the main thread.

    Only the first signal counts; repeating it has no effect. SIGINT is handled even if a shell script started the
    process in the background, where SIGINT is ignored. SIGHUP stays ignored if ``nohup`` has set it so. The block must
    be entered in the main thread before Ray is imported, because threads that already exist do not block SIGTERM.
    """

    def __init__(self, *, leave: Callable[[int], int] | None = None) -> None:
        """leave: until ``begin`` is called, a signal ends the process at once with the exit status that this function
        returns for it, because an exception during an import could be lost. None: ``begin`` need not be called.
        """
        self.received: int | None = None
        """The first signal that was received."""
        self._leave = leave
        self._received_at = 0.0
        self._is_raised = False
        self._is_heeded = False
        self._is_over = threading.Event()
        self._main = threading.main_thread()

    def begin(self) -> None:
        """From now on there is something to clean up, so a signal raises ``KeyboardInterrupt``."""
        self._leave = None

    def __enter__(self) -> Self:
        global _active
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        self._waiter = threading.Thread(target=self._wait, name="sigterm", daemon=True)
        self._waiter.start()
        threading.Thread(target=self._insist, name="signals", daemon=True).start()
        self._before = {number: signal.signal(number, self._on_signal) for number in numbers}
        _active = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _active
        self._is_over.set()
        if self._waiter.ident is not None:
            signal.pthread_kill(self._waiter.ident, signal.SIGTERM)
        self._waiter.join()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        _active = None

    def heed(self) -> None:
        """Do not raise the signal again: the main thread is cleaning up."""
        self._is_heeded = True

    def end(self) -> None:
        """Ignore all further signals: the process prints its last words and ends."""
        self.heed()
        for number in self._before:
            self._before[number] = signal.SIG_IGN
            signal.signal(number, signal.SIG_IGN)
        if self.received == signal.SIGHUP:
            _forget_terminal()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Runs in the main thread."""
        if self.received is None:
            self._note(number)
        is_lost = time.monotonic() - self._received_at > _INSIST_S and not self._is_heeded
        if not self._is_raised or is_lost:
            self._is_raised = True
            raise KeyboardInterrupt

    def _note(self, number: int) -> None:
        self.received = number
        self._received_at = time.monotonic()
        if self._leave is not None:
            status = self._leave(number)
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(status)

    def _wait(self) -> None:
        """Receive SIGTERM, which is blocked in all threads."""
        while True:
            signal.sigwait({signal.SIGTERM})
            if self._is_over.is_set():
                return
            if self.received is None:
                self._note(signal.SIGTERM)
                self._interrupt()

    def _insist(self) -> None:
        """Raise the signal again if it was lost, for example in a callback whose exceptions are discarded."""
        while not self._is_over.wait(_LOOK_S):
            is_due = self.received is not None and time.monotonic() - self._received_at > _INSIST_S
            if is_due and not self._is_heeded:
                self._interrupt()
                self._is_over.wait(_INSIST_S)

    def _interrupt(self) -> None:
        if self._main.ident is not None and self._main.is_alive():
            signal.pthread_kill(self._main.ident, signal.SIGINT)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore SIGINT and SIGHUP while the block cleans up: a second Ctrl-C would interrupt the cleanup of the first.

    SIGTERM is not a problem within ``StopSignals``, which handles it only once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _active is not None:
        _active.heed()
    numbers = (signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _in_child() -> None:
    """Let SIGTERM end the processes that Ray starts, and let them survive a closed terminal until Ray is shut down."""
    if _active is not None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


os.register_at_fork(after_in_child=_in_child)


def _forget_terminal() -> None:
    """Redirect stdout and stderr to ``/dev/null`` if they go to a terminal, which has been closed."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        _redirect(stream, null)


def _redirect(stream: Any, null: int) -> None:
    with contextlib.suppress(OSError, ValueError):  # the stream is not a file
        if os.isatty(stream.fileno()):
            os.dup2(null, stream.fileno())
