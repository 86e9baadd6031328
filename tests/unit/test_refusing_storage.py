"""A storage that refuses: what was not accepted leaves nothing, and what was is still whole."""

import errno
import os
from pathlib import Path

import pytest

from pyramid_serve.api import Status, new_record, new_video_id
from pyramid_serve.storage import StorageError, VideoFile, VideoStore
from pyramid_serve.stored_files import StoredFiles
from tests.switched_storage import FULL, READ_ONLY, READS, refusing
from tests.unit.storage_at_hand import PLAN, accepted, record_at


@pytest.fixture
def switched(tmp_path: Path) -> VideoStore:
    """A storage that can be made to refuse."""
    return VideoStore(f"switched://{tmp_path}/storage", patience_s=0.0)


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("number", FULL + READ_ONLY)
@pytest.mark.parametrize("what", ["video.json", "unfinished"])
def test_of_a_video_that_is_not_accepted_nothing_is_left(
    switched: VideoStore, tmp_path: Path, what: str, number: int
) -> None:
    kept = accepted(switched)
    before = files_of(tmp_path)
    with refusing(number, operations=("pipe_file",), containing=what), pytest.raises(StorageError) as raised:
        switched.create(new_record(PLAN))
    assert raised.value.errno == number
    assert f"cannot be written: {os.strerror(number)}" in str(raised.value)
    assert files_of(tmp_path) == before
    assert [record.id for record in switched.unfinished()] == [kept.id]


def test_where_nothing_was_written_nothing_is_said_to_be_left(
    switched: VideoStore, caplog: pytest.LogCaptureFixture
) -> None:
    with refusing(errno.EROFS), pytest.raises(StorageError):
        switched.create(new_record(PLAN))
    assert caplog.messages == []


def test_a_full_local_disk_leaves_nothing_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = VideoStore(str(tmp_path))
    monkeypatch.setattr(os, "fsync", full)
    for write in (
        lambda: store.create(new_record(PLAN)),
        lambda: store.keys.bind("key", new_video_id()),
        lambda: store.write_epoch("epoch"),
        store.check,
    ):
        with pytest.raises(StorageError, match="No space left on device"):
            write()
    assert files_of(tmp_path) == [] and store.ids() == []


class BackendError(Exception):
    """As object stores raise them: no OSError."""


def test_an_error_of_an_object_store_is_one_of_the_storage(switched: VideoStore) -> None:
    record = accepted(switched)
    with refusing(BackendError("403 Forbidden\n<Error>"), operations=READS):
        for read in (
            lambda: switched.read(record.id),
            lambda: switched.exists(record.id),
            lambda: switched.files.fetch(record.id, VideoFile.VIDEO),
            lambda: switched.files.size_of(record.id, VideoFile.VIDEO),
            lambda: switched.page(),
            lambda: switched.read_epoch(),
            lambda: switched.keys.id_of("key"),
            lambda: switched.files.num_fragments(record.id),
        ):
            with pytest.raises(StorageError, match=r"cannot be read: 403 Forbidden$"):
                read()
    assert switched.exists(record.id)


@pytest.mark.parametrize("number", READ_ONLY)
@pytest.mark.parametrize("operation", ["rm_file", "rm"])
def test_a_video_that_cannot_be_deleted_is_still_whole(
    switched: VideoStore, tmp_path: Path, number: int, operation: str
) -> None:
    record = accepted(switched)
    switched.files.attach(record.id, VideoFile.VIDEO, b"video")
    before = files_of(tmp_path)
    with refusing(number, operations=(operation,)), pytest.raises(StorageError):
        switched.delete(record.id)
    assert files_of(tmp_path) == before
    assert switched.read(record.id) == record and switched.files.fetch(record.id, VideoFile.VIDEO) == b"video"
    switched.delete(record.id)
    assert files_of(tmp_path) == []


def test_a_video_is_deleted_from_a_full_disk(switched: VideoStore, tmp_path: Path) -> None:
    record = accepted(switched)
    with refusing(errno.ENOSPC, operations=("pipe_file",)):
        switched.delete(record.id)
    assert files_of(tmp_path) == []


def test_a_marker_that_was_not_removed_is_swept_away(switched: VideoStore, tmp_path: Path) -> None:
    record = record_at(1000.0)
    switched.create(record)
    with refusing(errno.EACCES, operations=("rm_file",), containing="unfinished"):
        switched.delete(record.id)
    assert not switched.exists(record.id) and switched.unfinished() == []
    switched.sweep(retention_s=10.0, now=1000.0 + 3601.0)
    assert files_of(tmp_path) == []


def test_what_cannot_be_removed_does_not_keep_the_rest_from_being_swept_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = VideoStore(str(tmp_path))
    stuck, expired = (record_at(at).changed(expires_at=50.0, status=Status.COMPLETED) for at in (10.0, 20.0))
    for record in (stuck, expired):
        store.create(record)
        store.end(record)
    remove_folder = StoredFiles.remove_folder

    def remove_unless_stuck(stored: StoredFiles, folder: str) -> None:
        if stuck.id in folder:
            raise StorageError(errno.EACCES, "denied")
        remove_folder(stored, folder)

    monkeypatch.setattr(StoredFiles, "remove_folder", remove_unless_stuck)
    (tmp_path / "keys" / "0").mkdir(parents=True)
    store.keys.bind("k", expired.id)
    store.keys.bind("unused", "video_" + "0" * 32)
    assert store.sweep(retention_s=1.0, now=1e9) == [expired.id]
    assert store.exists(stuck.id)
    store.sweep(retention_s=1.0, now=1e9)
    assert store.keys.id_of("unused") is None
