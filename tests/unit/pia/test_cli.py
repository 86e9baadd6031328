"""``pyramid-serve generate`` with a model of PIA."""

from pathlib import Path

import pytest

from pyramid_serve import cli
from tests.serve.local_server import probe
from tests.unit.pia.models_at_hand import picture_file


@pytest.fixture
def image(tmp_path: Path) -> Path:
    file = tmp_path / "cat.jpg"
    file.write_bytes(picture_file(320, 160))
    return file


def generate(tiny: Path, image: Path, output: Path, *options: str) -> int:
    arguments = ["generate", "a cat", "--model", str(tiny), "--image", str(image), "-o", str(output), *options]
    return cli.main([*arguments, "--dtype", "float32", "--seed", "3", "--steps", "2"])


def test_a_picture_becomes_an_mp4_at_8_fps(
    tiny: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(tiny, image, tmp_path / "out.mp4") == 0
    assert probe(tmp_path / "out.mp4", fps=8) == (16, 16, 8)
    said = capsys.readouterr()
    assert "16 frames of 16x8, seed 3" in said.out and "float32: []" not in said.err


def test_every_field_has_an_option(tiny: Path, image: Path, tmp_path: Path) -> None:
    options = ["--mode", "loop", "--motion", "large", "--scheduler", "lcm", "--guidance-scale", "1", "--clip-skip", "1"]
    assert generate(tiny, image, tmp_path / "plain.mp4") == 0
    assert generate(tiny, image, tmp_path / "loop.mp4", *options, "--set", "num_frames=10", "--free-init") == 0
    assert probe(tmp_path / "loop.mp4", fps=8) == (10, 16, 8)
    assert generate(tiny, image, tmp_path / "scale.mp4", "--motion-scale", "2", "--strength", "0.5") == 0
    assert generate(tiny, image, tmp_path / "free.mp4", "--free-init", '{"num_iters": 2, "method": "ideal"}') == 0
    assert len({(tmp_path / f"{name}.mp4").read_bytes() for name in ("plain", "loop", "scale", "free")}) == 4


def test_without_a_picture_it_is_refused_in_one_line(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "a cat", "--model", str(tiny)]) == 2
    assert "input_reference: is required: this model brings a picture to life" in capsys.readouterr().err
