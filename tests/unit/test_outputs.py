"""Files that commands write, and what is printed of others' text."""

import errno
import os
from pathlib import Path

import pytest

from deployments import cli
from pyramid_serve.outputs import check_file_output, check_output, written_aside
from pyramid_serve.terminal import printable, printable_lines


def test_a_path_that_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "there.mp4").write_bytes(b"before")
    for name in ("new.mp4", "there.mp4", "a" * 251 + ".mp4"):
        check_output(tmp_path / name)
    assert (tmp_path / "there.mp4").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["there.mp4"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_takes_no_file_is_found_before(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ValueError, match=os.strerror(number)):
        check_output(tmp_path / "out.mp4")


@pytest.mark.parametrize(
    ("output", "reason"),
    [("nowhere/out.mp4", "no folder"), ("file/out.mp4", "no folder"), ("a" * 300 + ".mp4", "File name too long")],
)
def test_every_command_finds_a_path_that_cannot_be_written_before_the_work(
    tmp_path: Path,
    output: str,
    reason: str,
    miniflux: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    commands = (
        ["submit", "a", "--url", "http://127.0.0.1:1"],
        ["download", "video_1", "--url", "http://127.0.0.1:1"],
        ["demo"],
        ["generate", "a", "--model", str(miniflux)],
    )
    for command in commands:
        assert cli.main([*command, "-o", output]) == 2
        assert reason in capsys.readouterr().err


def test_the_demo_finds_that_its_picture_cannot_be_written_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "demo.png").mkdir()
    assert cli.main(["demo", "-o", str(tmp_path / "demo.mp4")]) == 2
    assert "demo.png: is a folder" in capsys.readouterr().err


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    output = tmp_path / "out.mp4"
    with written_aside(output) as opened:
        opened.write(b"whole")
        assert not output.exists()
    assert output.read_bytes() == b"whole"
    with pytest.raises(RuntimeError), written_aside(output) as opened:
        opened.write(b"half")
        raise RuntimeError
    assert output.read_bytes() == b"whole" and [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a red circle, größer 円 مرحبا", "a red circle, größer 円 مرحبا"),
        ("a\x1b[31mb\x9bc\x7fd", "a\ufffd[31mb\ufffdc\ufffdd"),
        ("a\r\nb\tc\x85d\u2028e", "a  b c d e"),
        ("\u202eevil\u2066\u200e\ufeff", "\ufffdevil\ufffd\ufffd\ufffd"),
        ("\ud800", "\ufffd"),
        ("\U0001f469\u200d\U0001f680", "\U0001f469\u200d\U0001f680"),
    ],
)
def test_what_controls_a_terminal_is_replaced(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable_lines(f"{text}\nline") == "\n".join(map(printable, [*text.split("\n"), "line"]))


def test_a_file_must_have_its_ending_and_may_not_be_a_folder(tmp_path: Path) -> None:
    check_file_output(tmp_path / "new.MP4", ".mp4")
    with pytest.raises(ValueError, match=r"new\.avi: must end in \.mp4"):
        check_file_output(tmp_path / "new.avi", ".mp4")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ValueError, match=r"folder\.mp4: is a folder"):
        check_file_output(tmp_path / "folder.mp4", ".mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.mp4"]
