import errno
import os
from pathlib import Path

import pytest

from pyramid_serve.whole_files import aside_of, make_folder, move_whole, replaced_whole, written_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_in_its_place_when_it_is_whole_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with written_whole(path) as opened:
        opened.write(b"after")
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after" and names(tmp_path) == ["file"]


def test_of_a_file_that_fails_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt), written_whole(path) as opened:
        opened.write(b"half")
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError), replaced_whole(path):
        pass  # nobody wrote it
    assert path.read_bytes() == b"before" and names(tmp_path) == ["file"]


def test_a_file_that_does_not_reach_the_disk_does_not_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), written_whole(tmp_path / "file") as opened:
        opened.write(b"half")
    assert names(tmp_path) == []


def test_a_filesystem_that_cannot_sync_folders_still_takes_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_folders(opened: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{opened}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refuse_folders)
    make_folder(tmp_path / "a" / "b")
    with written_whole(tmp_path / "a" / "b" / "file") as opened:
        opened.write(b"whole")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"whole"


def test_another_program_may_write_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replaced_whole(path) as aside:
        assert aside.parent == tmp_path
        aside.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"
    aside = aside_of(path)
    aside.write_bytes(b"newer")
    move_whole(aside, path)
    assert path.read_bytes() == b"newer" and names(tmp_path) == ["file"]


def test_a_folder_that_is_there_is_no_error_and_a_file_in_its_place_is(tmp_path: Path) -> None:
    for _ in range(2):
        make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "file")
    with pytest.raises(NotADirectoryError):
        make_folder(tmp_path / "file" / "under")
