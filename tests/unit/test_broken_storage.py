"""A storage in which something is broken: one entry must not stop the others."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pyramid_serve.api import Status, new_video_id
from pyramid_serve.storage import StorageError, VideoFile, VideoStore
from tests.switched_storage import READS, refusing
from tests.unit.storage_at_hand import accepted, record_at


@pytest.fixture
def switched(tmp_path: Path) -> VideoStore:
    """A storage that can be made to refuse."""
    return VideoStore(f"switched://{tmp_path}/storage", patience_s=0.0)


def break_with_a_folder(path: Path) -> None:
    path.unlink()
    (path / "in it").mkdir(parents=True)


def break_with_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def break_with_a_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def break_with_a_link(path: Path) -> None:
    elsewhere = path.parent.parent.parent / "elsewhere.json"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def break_with_the_id_of_another(path: Path) -> None:
    path.write_text(path.read_text().replace(path.parent.name, new_video_id()))


def break_with(old: str, new: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return write


BROKEN = {
    "a folder": break_with_a_folder,
    "a pipe": break_with_a_pipe,
    "a link to itself": break_with_a_loop,
    "a link to another place": break_with_a_link,
    "the id of another": break_with_the_id_of_another,
    "NaN": break_with('"not_before": 0.0', '"not_before": NaN'),
    "Infinity": break_with('"not_before": 0.0', '"not_before": -Infinity'),
    "a number too large": break_with('"not_before": 0.0', '"not_before": 1e999'),
    "half of it": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "no UTF-8": lambda path: path.write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_entry_stops_nothing_is_told_once_and_can_be_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    store = VideoStore(str(tmp_path))
    broken, whole, expired = record_at(1.0), record_at(2.0), record_at(3.0)
    for record in (broken, whole, expired):
        store.create(record)
    store.end(expired.changed(status=Status.COMPLETED, expires_at=4.0))
    BROKEN[how](tmp_path / "videos" / broken.id / "video.json")
    for _ in range(2):
        assert [record.id for record in store.page(newest_first=False)[0]] == [whole.id, expired.id]
        assert [record.id for record in store.unfinished()] == [whole.id]
    assert store.num_unreadable == 1
    assert [record.getMessage()[:25] for record in caplog.records] == ["its record cannot be read"]
    assert store.sweep(retention_s=1.0, now=1e6) == [expired.id]
    with pytest.raises((ValueError, StorageError)):
        store.read(broken.id)
    store.delete(broken.id)
    assert store.ids() == [whole.id] and store.num_unreadable == 0
    assert not (tmp_path / "videos" / broken.id).exists()


def test_one_entry_that_the_disk_cannot_read_hides_no_other_but_a_disk_that_reads_nothing_is_told(
    switched: VideoStore,
) -> None:
    broken, whole = accepted(switched), accepted(switched)
    with refusing(errno.EIO, operations=("cat_file",), containing=broken.id):
        assert [record.id for record in switched.page()[0]] == [whole.id]
    with refusing(errno.EIO, operations=READS), pytest.raises(StorageError):
        switched.page()
    assert len(switched.page()[0]) == 2 and switched.num_unreadable == 0


def test_only_files_of_its_own_folder_are_sent_of_a_video(tmp_path: Path) -> None:
    store = VideoStore(str(tmp_path / "root"))
    record = accepted(store)
    (tmp_path / "secret").write_bytes(b"secret")
    folder = tmp_path / "root" / "videos" / record.id
    (folder / "video.mp4").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / "thumbnail.webp")
    for file in (VideoFile.VIDEO, VideoFile.THUMBNAIL):
        for read in (store.files.fetch, store.files.size_of):
            with pytest.raises(StorageError):
                read(record.id, file)
        with pytest.raises(StorageError):
            store.files.read_range(record.id, file, 0, 1)


def test_the_folders_of_a_root_may_be_links(tmp_path: Path) -> None:
    for name in ("root", "disk", "other disk"):
        (tmp_path / name).mkdir()
    (tmp_path / "root" / "videos").symlink_to(tmp_path / "disk")
    (tmp_path / "link").symlink_to(tmp_path / "root")
    store = VideoStore(str(tmp_path / "link"))
    record = accepted(store)
    assert store.read(record.id) == record
