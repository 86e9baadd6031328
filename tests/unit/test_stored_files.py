"""Files under a storage root, where the filesystem works and where it does not."""

import errno
import os
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from s3fs import S3FileSystem

from pyramid_serve.stored_files import StorageError, StoredFiles
from tests.object_storage import client
from tests.switched_storage import refusing
from tests.unit.storage_at_hand import ROOTS, root_at


@pytest.fixture
def switched(tmp_path: Path) -> StoredFiles:
    """A storage that can be made to refuse."""
    return StoredFiles(f"switched://{tmp_path}/storage", patience_s=0.0)


@pytest.fixture(params=ROOTS)
def files(request: pytest.FixtureRequest) -> Iterator[StoredFiles]:
    with root_at(request.param, request) as root:
        yield StoredFiles(root)


def test_a_file_is_read_whole_and_in_part_until_it_is_removed(files: StoredFiles) -> None:
    files.put("a/b/c", b"0123456789")
    files.put("a/b/c", b"9876543210")
    assert files.cat("a/b/c") == b"9876543210" and files.cat("a/b/c", start=2, end=4) == b"76"
    assert files.exists("a/b/c") and files.size("a/b/c") == 10
    assert files.names("a/b") == ["c"] and files.sizes("a/b") == {"c": 10}
    files.remove("a/b/c")
    files.remove("a/b/c")
    assert not files.exists("a/b/c") and files.names("a/b") == [] and files.sizes("a/b") == {}


def test_what_is_not_there_is_told_apart_from_a_storage_that_fails(files: StoredFiles) -> None:
    for ask in (lambda: files.cat("a"), lambda: files.size("a"), lambda: files.remove_existing("a")):
        with pytest.raises(FileNotFoundError) as raised:
            ask()
        assert not isinstance(raised.value, StorageError)
    assert files.names("a") == [] and files.sizes("a") == {}


def test_a_range_without_bytes_is_empty(files: StoredFiles) -> None:
    files.put("a", b"0123456789")
    assert files.cat("a", start=4, end=4) == files.cat("a", start=0, end=0) == b""
    with pytest.raises(FileNotFoundError):
        files.cat("b", start=4, end=4)


def test_a_file_is_created_once_and_by_one_who_asks_twice(files: StoredFiles) -> None:
    files.create("a/b", b"first")
    files.create("a/b", b"first")  # the answer to the first time was lost
    with pytest.raises(FileExistsError):
        files.create("a/b", b"second")
    assert files.cat("a/b") == b"first" and files.creates_exclusively()


def test_of_many_who_create_a_file_at_once_one_succeeds(files: StoredFiles) -> None:
    if files.root.startswith("memory"):
        pytest.skip("fsspec's files in memory are for one thread")
    is_begun = threading.Barrier(8)

    def create(writer: int, name: str) -> bool:
        is_begun.wait()
        try:
            files.create(name, f"writer {writer}".encode())
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as writers:
        for name in ("a", "b", "c"):
            created = list(writers.map(create, range(8), [name] * 8))
            assert created.count(True) == 1
            assert files.cat(name) == f"writer {created.index(True)}".encode()


def test_a_folder_is_removed_with_all_that_is_in_it(files: StoredFiles) -> None:
    for name in ("a/b", "a/c/d", "a/c/e", "ab"):
        files.put(name, b"content")
    files.remove_folder("a")
    files.remove_folder("a")
    assert files.names("a") == files.names("a/c") == [] and not files.exists("a") and files.exists("ab")


def test_a_folder_that_a_console_has_made_is_as_good_as_none(bucket: str, s3_endpoint: str) -> None:
    """Consoles and other programs put an empty object there whose name ends in a slash."""
    files = StoredFiles(bucket)
    for folder in ("a/", "a/b/"):
        client(s3_endpoint).put_object(Bucket=bucket.removeprefix("s3://"), Key=folder, Body=b"")
    files.put("a/b/c", b"content")
    assert files.sizes("a/b") == {"c": 7} and files.names("a") == ["b"]
    files.remove_folder("a")
    assert not files.exists("a")


def test_files_that_an_object_store_keeps_in_silence_are_not_taken_for_removed(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = StoredFiles(bucket, patience_s=0.2)
    for name in ("a/b", "a/c"):
        files.put(name, b"content")
    bulk_delete = S3FileSystem._bulk_delete

    async def keep_one(filesystem: S3FileSystem, paths: list[str]) -> Any:
        return await bulk_delete(filesystem, [path for path in paths if not path.endswith("c")])

    with monkeypatch.context() as patched:
        patched.setattr(S3FileSystem, "_bulk_delete", keep_one)
        with pytest.raises(StorageError, match="cannot be written"):
            files.remove_folder("a")
    assert files.names("a") == ["c"]
    files.remove_folder("a")
    assert files.names("a") == []


def test_what_another_process_does_is_seen_at_once(files: StoredFiles) -> None:
    other = StoredFiles(files.root)
    assert files.names("a") == [] and not files.exists("a/b")
    other.put("a/b", b"1")
    assert files.names("a") == ["b"] and files.sizes("a") == {"b": 1} and files.cat("a/b") == b"1"
    other.put("a/b", b"22")
    assert files.sizes("a") == {"b": 2} and files.size("a/b") == 2 and files.cat("a/b") == b"22"
    other.remove("a/b")
    assert files.names("a") == [] and not files.exists("a/b")


@pytest.mark.slow
def test_more_files_than_one_answer_of_s3_has_are_listed_and_removed(bucket: str, s3_endpoint: str) -> None:
    files = StoredFiles(bucket)
    plain, name = client(s3_endpoint), bucket.removeprefix("s3://")
    for number in range(1001):
        plain.put_object(Bucket=name, Key=f"a/{number:04d}", Body=b"")
    assert sorted(files.names("a")) == [f"{number:04d}" for number in range(1001)]
    files.remove_folder("a")
    assert files.names("a") == []


def test_a_local_file_is_on_the_disk_with_every_folder_that_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def note(opened: int) -> None:
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{opened}"), tmp_path))
        fsync(opened)

    files = StoredFiles(str(tmp_path / "root"))
    monkeypatch.setattr(os, "fsync", note)
    files.put("videos/a/video.json", b"{}")
    # In this order: each new folder in the one above it, the file while it is aside, and its name in its folder.
    assert synced[:4] == [".", "root", "root", "root/videos"]
    assert synced[4].startswith("root/aside/") and synced[5:] == ["root/videos/a"]
    synced.clear()
    files.put("videos/a/video.json", b"{}")
    assert len(synced) == 2 and synced[1] == "root/videos/a"


def test_a_storage_error_is_the_same_in_another_process() -> None:
    error = StorageError(errno.ENOSPC, "storage /videos: cannot be written: No space left on device")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.errno) == (str(error), errno.ENOSPC)


def test_a_check_of_the_storage_leaves_nothing(files: StoredFiles) -> None:
    files.check()
    assert files.names("probe") == files.names("videos") == files.names("unfinished") == []


@pytest.mark.parametrize("operation", ["pipe_file", "cat_file", "rm_file"])
def test_a_check_fails_where_the_storage_does(switched: StoredFiles, operation: str) -> None:
    with refusing(errno.EACCES, operations=(operation,)), pytest.raises(StorageError, match="Permission denied"):
        switched.check()
    switched.check()


def test_a_root_that_cannot_be_a_folder_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for root, reason in (
        ("file", "is not a folder"),
        ("link", "is a symbolic link to nothing"),
        ("file/under", "Not a directory"),
    ):
        with pytest.raises(StorageError, match=reason):
            StoredFiles(str(tmp_path / root)).check()
