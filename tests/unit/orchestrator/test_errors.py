"""What a failed video tells its client."""

import errno

from deployments.orchestrator.deployment import _describe
from pyramid_serve.storage import StorageError


def test_an_error_of_the_storage_names_no_path() -> None:
    error = StorageError(errno.ENOSPC, "storage /srv/videos: cannot be written: No space left on device")
    assert "/srv" not in _describe(error)
    assert "storage" in _describe(error)


def test_other_errors_are_told_by_their_first_line() -> None:
    assert _describe(ValueError("it does not fit\nmore")) == "ValueError: it does not fit"
