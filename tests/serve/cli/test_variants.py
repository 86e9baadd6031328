"""The forms in which a finished video is written: by the ending of the output, or as ``--variant`` says."""

import io
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from deployments import cli
from deployments.cli.demo import make
from deployments.cli.server import Server
from tests.serve.cli.conftest import Said
from tests.serve.local_server import LocalServer

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def test_the_ending_of_the_output_says_in_which_form_a_video_comes(said: Said, tmp_path: Path) -> None:
    assert "out.gif: 25 frames of 128x64, seed 7" in said("submit", "a ball", "-o", "out.gif", "--seed", "7")
    video_id = said("submit", "a ball").splitlines()[0]
    assert "out.webp: 25 frames of 128x64" in said("download", video_id, "-o", "out.webp")
    assert "out.zip: 25 frames of 128x64" in said("download", video_id, "-o", "out.zip")
    assert "first.png: frame, seed" in said("download", video_id, "-o", "first.png")
    said("download", video_id, "-o", "last.png", "--at", "last")
    said("download", video_id, "--variant", "frame", "--at", "0.5")
    said("download", video_id, "--variant", "gif")
    assert (Image.open("out.gif").format, Image.open("out.webp").format) == ("GIF", "WEBP")
    with zipfile.ZipFile("out.zip") as packed:
        assert packed.namelist()[-1] == "00024.png"
    shades = [Image.open(name).convert("L").getpixel((64, 32)) for name in ("first.png", f"{video_id}.png", "last.png")]
    assert shades == sorted(set(shades))  # units get brighter
    names = ["out.gif", "out.webp", "out.zip", "first.png", "last.png", f"{video_id}.png", f"{video_id}.gif"]
    assert {file.name for file in tmp_path.iterdir()} == set(names)


def test_a_frame_that_there_is_not_is_one_line_and_no_file(said: Said, tmp_path: Path) -> None:
    video_id = said("submit", "a ball").splitlines()[0]
    assert "at=9: must be first, last, or a time" in said("download", video_id, "-o", "a.png", "--at", "9", status=2)
    assert "--at 1: only for one frame" in said("download", video_id, "-o", "a.gif", "--at", "1", status=2)
    assert "a.gif: must end in .webp" in said("download", video_id, "-o", "a.gif", "--variant", "webp", status=2)
    assert "a.avi: must end in .mp4, .gif" in said("download", video_id, "-o", "a.avi", status=2)
    assert not list(tmp_path.iterdir())


def test_a_demo_is_written_in_the_form_that_its_ending_says(server: LocalServer, tmp_path: Path) -> None:
    make(Server(server.url), "a ball", tmp_path / "demo.gif", out=io.StringIO())
    assert (Image.open("demo.gif").format, Image.open("demo.png").format) == ("GIF", "PNG")


def test_a_demo_is_not_written_where_its_sheet_goes(said: Said, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "-o", "demo.png"]) == 2
    assert "demo.png: a sheet of its frames is written there" in capsys.readouterr().err
