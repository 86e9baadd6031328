"""What is measured about the storage, for alerts."""

from ray.serve import metrics


class StorageMetrics:
    """Counts how often the storage refused something that a replica needed; the labels say in which deployment."""

    def __init__(self) -> None:
        self._failures = metrics.Counter(
            "pyramid_serve_storage_failures",
            description="Times that the storage could not be read or written, and work had to be put off or refused.",
        )

    def refused(self) -> None:
        """The storage could not be read or written."""
        self._failures.inc()
