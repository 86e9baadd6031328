"""How a replica ends whose device has failed."""

import logging
import os
import threading

logger = logging.getLogger(__name__)

_ANSWER_S = 3.0
"""Long enough for everybody who waits here to be told: they look once a second whether the device hangs."""


def end_process_soon() -> None:
    """End this process in a few seconds, in which calls at work are answered with the error and new ones refused.

    Only a new process can use the device again, and Serve starts one at once when this one is gone. If it were left to
    the health checks, a replica that refuses every call would look idle until the third bad answer and attract calls,
    and the end could wait for a thread that never returns.
    """
    timer = threading.Timer(_ANSWER_S, _end)
    timer.daemon = True
    timer.start()


def _end() -> None:
    logger.error("this process ends, for its device has failed")
    os._exit(1)  # any other way waits for the thread that hangs
