"""Files under a storage root, where the filesystem works and where it does not."""

import errno
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from pyramid_serve.stored_files import StorageError, StoredFiles, shown_root
from tests.switched_storage import refusing


@pytest.fixture
def switched(tmp_path: Path) -> StoredFiles:
    """A storage that can be made to refuse."""
    return StoredFiles(f"switched://{tmp_path}/storage")


@pytest.fixture(params=["local", "file", "memory"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoredFiles]:
    roots = {"local": str(tmp_path / "a b"), "file": f"file://{tmp_path}/a b", "memory": "memory://files/of/a/test"}
    yield StoredFiles(roots[request.param])
    fsspec.filesystem("memory").store.clear()


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


@pytest.mark.parametrize(("protocol", "extra"), [("s3", "s3"), ("gs", "gcs"), ("abfs", "azure")])
def test_a_filesystem_that_is_not_installed_is_named_with_its_extra(
    protocol: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install it")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ValueError, match=rf'pip install "pyramid-serve\[{extra}\]"') as raised:
        StoredFiles(f"{protocol}://key:secret@bucket/videos")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("root", "shown"),
    [
        ("outputs", "outputs"),
        ("/videos/a:b@c", "/videos/a:b@c"),
        ("s3://bucket/videos", "s3://bucket/videos"),
        ("s3://AKIA:se/cr@t+@bucket/videos", "s3://***@bucket/videos"),
        ("s3://key:se/cret@bucket/videos", "s3://***@bucket/videos"),
        ("simplecache::s3://key:secret@bucket", "simplecache::s3://***@bucket"),
        ("abfs://container@account.example/videos", "abfs://container@account.example/videos"),
        ("https://host/videos?sig=abc", "https://host/videos?***"),
    ],
)
def test_a_root_is_shown_without_credentials(root: str, shown: str) -> None:
    assert shown_root(root) == shown
