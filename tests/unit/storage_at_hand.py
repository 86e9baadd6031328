"""Storages of each kind, and videos of a storage: accepted now, or at some time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest

from pyramid_serve.api import VideoRecord, new_record, new_video_id
from pyramid_serve.storage import VideoStore
from tests.unit.api.plans_at_hand import record_of

PLAN = record_of(seed=1).plan
ROOTS = ("local", "file", "memory", "s3")


@contextmanager
def root_at(kind: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """The root of an empty storage of this kind, one of ``ROOTS``, for the test that asks for it."""
    if kind == "s3":
        yield f"{request.getfixturevalue('bucket')}/a b"
    elif kind == "memory":
        yield "memory://videos/of/a/test"
        fsspec.filesystem("memory").store.clear()
    else:
        folder: Path = request.getfixturevalue("tmp_path") / "a b"
        yield str(folder) if kind == "local" else f"file://{folder}"


def record_at(created_at: float) -> VideoRecord:
    return new_record(PLAN).model_copy(update={"id": new_video_id(created_at), "created_at": created_at})


def accepted(store: VideoStore) -> VideoRecord:
    record = new_record(PLAN)
    store.create(record)
    return record
