"""``pyramid-serve generate`` with a model of PIA."""

from pathlib import Path

import pytest

from pyramid_serve import cli
from pyramid_serve.pia.request_fields import RequestFields
from tests.serve.local_server import probe
from tests.unit.pia.models_at_hand import picture_file


@pytest.fixture
def image(tmp_path: Path) -> Path:
    file = tmp_path / "cat.jpg"
    file.write_bytes(picture_file(320, 160))
    return file


def generate(tiny: Path, image: Path, output: Path, *options: str) -> int:
    arguments = ["generate", "a cat", "--model", str(tiny), "--image", str(image), "-o", str(output), *options]
    return cli.main([*arguments[:8], "--dtype", "float32", "--seed", "3", "--steps", "2", *arguments[8:]])


def test_a_picture_becomes_an_mp4_at_8_fps(
    tiny: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(tiny, image, tmp_path / "out.mp4") == 0
    assert probe(tmp_path / "out.mp4", fps=8) == (16, 16, 8)
    said = capsys.readouterr()
    assert "16 frames of 16x8, seed 3" in said.out and "float32: []" not in said.err


OPTIONS = {
    "mode": ["--mode", "loop"],
    "motion": ["--motion", "large"],
    "motion_scale": ["--motion-scale", "5"],
    "num_inference_steps": ["--steps", "3"],
    "guidance_scale": ["--guidance-scale", "1"],
    "strength": ["--strength", "0.5"],
    "scheduler": ["--scheduler", "lcm"],
    "free_init": ["--free-init", '{"num_iters": 2, "method": "ideal"}'],
    "clip_skip": ["--clip-skip", "1"],
}


def test_every_field_has_an_option_that_changes_the_video(tiny: Path, image: Path, tmp_path: Path) -> None:
    assert OPTIONS.keys() == RequestFields.model_fields.keys()
    videos = {}
    for name, option in {"plain": [], **OPTIONS}.items():
        assert generate(tiny, image, tmp_path / f"{name}.zip", *option) == 0  # every bit, which an MP4 may lose
        videos[name] = (tmp_path / f"{name}.zip").read_bytes()
    same = [name for name in OPTIONS if videos[name] == videos["plain"]]
    assert same == []
    assert len(set(videos.values())) == len(videos)


def test_a_length_can_be_set_and_free_init_needs_no_settings(tiny: Path, image: Path, tmp_path: Path) -> None:
    assert generate(tiny, image, tmp_path / "loop.mp4", "--set", "num_frames=10", "--free-init") == 0
    assert probe(tmp_path / "loop.mp4", fps=8) == (10, 16, 8)


def test_a_single_picture_is_refused_in_words_of_the_output(
    tiny: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(tiny, image, tmp_path / "out.png") == 2
    said = capsys.readouterr().err
    assert "out.png: a .png holds one frame, and this model makes no single frame; name a .mp4, .gif" in said
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("option", [["--tiling"], ["--offload", "model"], ["--compiled", "none"]])
def test_an_option_of_the_other_family_is_refused_by_its_name(
    tiny: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    assert generate(tiny, image, tmp_path / "out.mp4", *option) == 2
    assert f"{option[0]}: a model of PIA has no such option" in capsys.readouterr().err


def test_without_a_picture_it_is_refused_in_one_line(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "a cat", "--model", str(tiny)]) == 2
    assert "input_reference: is required: this model brings a picture to life" in capsys.readouterr().err
