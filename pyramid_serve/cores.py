"""How many processor cores there are to compute with."""

import os


def usable_cores() -> int:
    """The cores that this process may run on, as far as the system tells; a container's share of them is not seen."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
