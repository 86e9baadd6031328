"""``pyramid-serve generate``, as its user runs it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from pyramid_serve import cli
from pyramid_serve.media.ffmpeg import EncodeError
from tests.unit.media.test_writers import decode

SMALL = ["--size", "128x64", "--seconds", "0.3", "--steps", "1", "--video-steps", "1", "--seed", "3"]


def generate(*arguments: str | Path) -> int:
    return cli.main(["generate", *map(str, arguments)])


def test_a_prompt_becomes_an_mp4(tmp_path: Path, miniflux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("a ball", "--model", miniflux, "-o", tmp_path / "out.mp4", *SMALL) == 0
    assert tuple(decode(tmp_path / "out.mp4").shape) == (9, 64, 128, 3)
    assert "9 frames of 128x64, seed 3" in capsys.readouterr().out


def test_a_picture_can_be_its_beginning(tmp_path: Path, mmdit: Path) -> None:
    Image.new("RGB", (200, 300), "red").save(tmp_path / "in.png")
    picture = ["--image", tmp_path / "in.png"]
    assert generate("a ball", "--model", mmdit, "-o", tmp_path / "frames", *picture, *SMALL) == 0
    frames = sorted((tmp_path / "frames").iterdir())
    assert len(frames) == 9
    assert Image.open(frames[0]).size == (128, 64)


def test_a_png_is_a_single_picture(tmp_path: Path, miniflux: Path) -> None:
    settings = ["--size", "64x64", "--steps", "1"]
    assert generate("a ball", "--model", miniflux, "-o", tmp_path / "out.png", *settings) == 0
    assert Image.open(tmp_path / "out.png").size == (64, 64)


def test_one_seed_gives_one_video(tmp_path: Path, miniflux: Path) -> None:
    for name in ("a", "b"):
        generate("a ball", "--model", miniflux, "-o", tmp_path / f"{name}.mp4", *SMALL)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_seed_of_minus_one_is_drawn_and_told(
    tmp_path: Path, miniflux: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = [*SMALL[:-1], "-1"]
    assert generate("a ball", "--model", miniflux, "-o", tmp_path / "out.mp4", *drawn) == 0
    assert re.search(r"seed \d+$", capsys.readouterr().out)


def test_linear_guidance_changes_the_video(tmp_path: Path, miniflux: Path) -> None:
    guidances = {"a": [], "b": ["--linear-guidance-minimum", "6"], "c": ["--linear-guidance-alpha", "0.5"]}
    for name, guidance in guidances.items():
        longer = [*SMALL[:2], "--seconds", "0.7", *SMALL[4:], *guidance]
        assert generate("a ball", "--model", miniflux, "-o", tmp_path / f"{name}.mp4", *longer) == 0
    assert len({(tmp_path / f"{name}.mp4").read_bytes() for name in guidances}) >= 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "100x64"], "size=100x64: width and height must be positive multiples of 64"),
        (["--size", "large"], "must be WIDTHxHEIGHT"),
        (["--seconds", "-1"], "seconds='-1': input should be greater than 0"),
        (["--seconds", "soon"], "seconds='soon'"),
        (["--steps", "0"], "num_inference_steps='0': input should be greater than or equal to 1"),
        (["--steps", "1,2"], "one for each of the 3 stages"),
        (["--video-steps", "1,2,x"], "one for each of the 3 stages"),
        (["--guidance-scale", "-2"], "guidance_scale='-2'"),
        (["--seed", "-2"], "seed='-2'"),
        (["--linear-guidance-alpha", "soft"], "linear_guidance_alpha='soft'"),
        (["--linear-guidance-alpha", "1", "--video-guidance-scale", "5"], "contradicts video_guidance_scale=5"),
        (["--image", "nowhere.png"], "nowhere.png: cannot be read"),
        (["--tiling", "100"], "tiling=100: must be a positive multiple of 32"),
        (["--device", "cuda:99"], "device='cuda:99'"),
        (["--variant", "9p"], "no variant '9p'; there are diffusion_transformer_384p"),
        (["--model", "/nowhere"], "/nowhere: no such folder"),
        (["--offload", "some"], "invalid choice: 'some'"),
        (["-o", "out.avi"], "must end in .mp4, .gif, .webp, .png"),
        (["-o", "nowhere/out.mp4"], "no folder nowhere"),
        (["-o", "out.png", "--seconds", "1"], "a .png holds one frame"),
    ],
)
def test_what_the_user_got_wrong_is_one_line_and_no_file(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    miniflux: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = generate("a ball", "--model", miniflux, "-o", "out.mp4", *arguments)
    except SystemExit as stopped:  # argparse's own
        code = int(stopped.code or 0)
    assert code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_no_half_written_file(tmp_path: Path, miniflux: Path) -> None:
    command = [sys.executable, "-m", "pyramid_serve.cli", "generate", "a ball", "--model", str(miniflux)]
    long = [
        "-o",
        str(tmp_path / "out.mp4"),
        "--size",
        "128x64",
        "--seconds",
        "40",
        "--steps",
        "5",
        "--video-steps",
        "5",
    ]
    process = subprocess.Popen([*command, *long], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert " in float32 on cpu" in process.stdout.readline()
    time.sleep(0.5)  # among its units
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.strip().splitlines()[-1] == "pyramid-serve generate: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_a_reader_of_the_output_may_leave() -> None:
    code = """
import argparse, sys
from pyramid_serve import cli

def say(arguments):
    print("a line")
    print("another", flush=True)

parser, commands = cli.new_parser()
commands.add_parser("say").set_defaults(run=say)
sys.exit(cli.run(parser, ["say"]))
"""
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert (process.returncode, process.stderr) == (cli.READER_LEFT, "")


@pytest.mark.parametrize("error", [EncodeError("ffmpeg ended with 1: x\nNo space left on device"), OSError(28, "full")])
def test_a_disk_that_fills_up_is_one_line_with_the_path(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    miniflux: Path,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("pyramid_serve.media.writers.write_video", fail)
    assert generate("a ball", "--model", miniflux, "-o", tmp_path / "out.mp4", *SMALL) == cli.OUR_ERROR
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"pyramid-serve generate: {tmp_path / 'out.mp4'}: cannot be written: ")


def test_a_signal_while_the_output_is_checked_ends_it_as_ctrl_c_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli, "check_output", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a Ray that ran in this process has its own
    try:
        assert generate("a ball", "-o", tmp_path / "out.mp4") == cli.INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_it_makes_a_video_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "pyramid_serve.cli", "generate", "a red circle", "-o", str(tmp_path / "out.mp4")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("shapes in ")
        time.sleep(0.5)  # among its units
        process.send_signal(number)
        assert process.wait(60) == cli.INTERRUPTED
    assert not any(tmp_path.iterdir())
