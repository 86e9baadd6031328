"""Keys in a folder: every file is one, they come and go without a restart, and none is told."""

import asyncio
import logging
from pathlib import Path

import pytest

from deployments.http import key_folder
from deployments.http.config import HttpConfig
from deployments.http.errors import ApiError
from deployments.http.key_folder import KeyFolder, digest_of
from deployments.http.keys import Keys


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As Kubernetes mounts a Secret: links to files in a hidden folder."""
    hidden = tmp_path / "..2026_11_28"
    hidden.mkdir()
    for name, key in {"alice": "first", "bob": "second\n"}.items():
        (hidden / name).write_text(key)
        (tmp_path / name).symlink_to(hidden / name)
    return tmp_path


@pytest.fixture
def read_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_folder, "_REREAD_S", 0.0)


def passes(keys: Keys, key: str) -> bool:
    try:
        asyncio.run(keys.check(f"Bearer {key}", address="192.0.2.7"))
    except ApiError:
        return False
    return True


def test_each_file_is_a_key(folder: Path) -> None:
    keys = Keys(["third"], folder=KeyFolder(folder))
    assert [passes(keys, key) for key in ("first", "second", "third")] == [True] * 3
    assert not passes(keys, "fourth")


def test_only_digests_are_kept(folder: Path) -> None:
    keys = KeyFolder(folder)
    assert set(keys.digests()) == {digest_of("first"), digest_of("second")}
    assert "first" not in repr(vars(keys))


def test_the_names_of_the_owners_are_logged_and_no_key(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        KeyFolder(folder)
    assert caplog.messages == ["API keys: alice, bob"]


@pytest.mark.usefixtures("read_always")
def test_keys_come_and_go_without_a_restart(folder: Path) -> None:
    keys = Keys([], folder=KeyFolder(folder))
    (folder / "carol").write_text("new")
    (folder / "alice").unlink()
    assert passes(keys, "new")
    assert not passes(keys, "first")


@pytest.mark.usefixtures("read_always")
def test_without_its_last_key_a_folder_lets_nobody_in(folder: Path) -> None:
    keys = Keys([], folder=KeyFolder(folder))
    for name in ("alice", "bob"):
        (folder / name).unlink()
    assert not passes(keys, "first")
    assert not passes(keys, "")


@pytest.mark.usefixtures("read_always")
def test_a_file_that_becomes_no_key_is_left_out_and_a_folder_that_is_away_changes_nothing(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = Keys([], folder=KeyFolder(folder))
    (folder / "carol").write_text("with a line\nbreak")
    assert passes(keys, "second")
    assert "carol: must be printable ASCII" in caplog.text and "with a line" not in caplog.text
    folder.rename(folder.with_name("away"))
    assert passes(keys, "second")


def test_a_folder_is_not_read_at_every_request(folder: Path) -> None:
    keys = KeyFolder(folder)
    (folder / "alice").unlink()
    assert digest_of("first") in keys.digests()


@pytest.mark.parametrize("content", [b"", b"\n", b" key", b"sch\xc3\xbcssel", b"\xff"])
def test_a_file_that_is_no_key_is_refused_at_start_by_its_name(folder: Path, content: bytes) -> None:
    (folder / "carol").write_bytes(content)
    with pytest.raises(ValueError, match=r"api_keys_folder: .*/carol: must be printable ASCII characters"):
        KeyFolder(folder)


def test_a_folder_without_keys_or_that_is_not_there_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no files; put each key into a file"):
        KeyFolder(tmp_path)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        KeyFolder(tmp_path / "missing")


def test_with_a_folder_a_key_is_needed(tmp_path: Path) -> None:
    assert HttpConfig(api_keys_folder=tmp_path).needs_key
    assert HttpConfig(api_keys=("secret",)).needs_key
    assert not HttpConfig().needs_key
