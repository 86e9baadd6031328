import json
import re
from enum import StrEnum
from pathlib import Path

import pytest
from PIL import Image
from pydantic import BaseModel, Field

from pyramid_serve import cli
from pyramid_serve.api.offers import Offer, field_schemas_of
from pyramid_serve.checkpoints.sources import CheckpointError
from pyramid_serve.families import Family, family_of, imported, known_families
from tests.families import noise
from tests.unit.media.test_writers import decode

NOISE = "tests.families.noise:FAMILY"


@pytest.fixture
def noise_model(tmp_path: Path) -> Path:
    """The checkpoint of a family that does not come with the package."""
    folder = tmp_path / "noise-model"
    folder.mkdir()
    (folder / "noise.json").write_text(json.dumps({"size": [128, 64]}))
    return folder


def test_a_checkpoint_is_recognised_by_its_files(miniflux: Path, mmdit: Path) -> None:
    assert family_of(miniflux).name == family_of(mmdit).name == family_of("shapes").name == "pyramid_flow"


def test_a_checkpoint_that_no_family_recognises_says_which_there_are(noise_model: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"noise-model: no checkpoint of a model that is known here \(Pyramid Flow, PIA\); there are noise.json",
    ):
        family_of(noise_model)


def test_a_family_of_ones_own_is_named_by_its_import_path(noise_model: Path) -> None:
    assert family_of(noise_model, NOISE).name == "noise"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("tests.families.nowhere:FAMILY", "cannot be imported: No module named"),
        ("tests.families.noise:OTHER", "cannot be imported: .*OTHER"),
        ("tests.families.noise", "cannot be imported"),
        ("tests.families.noise:FPS", "is not a family"),
    ],
)
def test_an_import_path_that_leads_to_none_is_refused(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"family='{path}': {message}"):
        imported(path)


def test_a_family_must_not_take_the_name_of_a_key_of_every_video(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shown(BaseModel):
        status: str

    monkeypatch.setattr(noise.NoiseFamily, "shown_fields", Shown)
    with pytest.raises(ValueError, match="its fields status are those of every request or answer"):
        imported(NOISE)


def test_a_field_may_have_several_values_where_its_schema_says_so_and_not_its_description() -> None:
    class Fields(BaseModel):
        one: float | None = Field(None, description="not an array")
        many: list[int] | None = None

    offer = Offer((64, 64), 8, 16, 16, field_schemas=field_schemas_of(Fields))
    assert offer.fields_with_several_values == {"many"}


class Colour(StrEnum):
    RED = "red"


class Frame(BaseModel):
    width: int = Field(ge=1)


def test_the_schema_of_a_field_stands_by_itself() -> None:
    class Fields(BaseModel):
        colour: Colour | None = None
        frames: list[Frame] | None = None

    schemas = field_schemas_of(Fields)
    assert schemas["colour"]["enum"] == ["red"]
    assert schemas["frames"]["items"]["properties"]["width"]["minimum"] == 1
    assert "$ref" not in json.dumps(schemas)


def test_a_family_whose_fields_have_aliases_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fields(BaseModel):
        own: int | None = Field(None, alias="prompt")

    monkeypatch.setattr(noise.NoiseFamily, "request_fields", Fields)
    with pytest.raises(ValueError, match="its request fields own have aliases"):
        imported(NOISE)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("prompt=other", "prompt has an option or a place of its own"),
        ("input_reference=abc", "input_reference has an option"),
        ("hue", "must be NAME=VALUE"),
        ("hue=[1", "not valid JSON"),
        ("hue=[1]", "hue=[1]: input should be a valid number"),
    ],
)
def test_set_gives_fields_that_have_no_option(
    noise_model: Path, given: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(["generate", "noise", "--model", str(noise_model), "--family", NOISE, "--set", given])
    except SystemExit as stopped:  # argparse's own
        code = int(stopped.code or 0)
    assert code == 2
    assert said in capsys.readouterr().err


def test_every_family_answers_all_that_it_may_be_asked() -> None:
    asked = {name for name in dir(Family) if not name.startswith("_")}
    for family in known_families():
        assert asked <= set(dir(family)), family.title


def test_no_two_families_have_one_name() -> None:
    names = [family.name for family in known_families()]
    assert len(set(names)) == len(names)


def test_generate_makes_a_video_with_a_family_of_ones_own(
    noise_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "noise", "--model", str(noise_model), "--family", NOISE, "--seed", "3"]
    assert cli.main([*command, "--hue", "0.33", "-o", str(tmp_path / "green.mp4")]) == 0
    said = capsys.readouterr().out
    assert "float32 on cpu: it is noise" in said and "16 frames of 128x64, seed 3" in said
    frames = decode(tmp_path / "green.mp4").float()
    assert tuple(frames.shape) == (16, 64, 128, 3)
    red, green, blue = (frames[..., channel].mean() for channel in range(3))
    assert green > 3 * red and green > 3 * blue


def test_generate_passes_a_picture_on_that_is_not_itself_a_unit(noise_model: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 48), "black").save(tmp_path / "dark.png")
    command = [
        "generate",
        "noise",
        "--model",
        str(noise_model),
        "--family",
        NOISE,
        "--image",
        str(tmp_path / "dark.png"),
    ]
    assert cli.main([*command, "-o", str(tmp_path / "dark.mp4")]) == 0
    assert decode(tmp_path / "dark.mp4").max() < 30


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--hue", "2"], "hue='2': input should be less than or equal to 1"),
        (["--steps", "3"], "num_inference_steps: unknown field; known are prompt, .*, hue"),
        (["--tiling", "64"], "--tiling: a model of Noise has no such option"),
        (["--set", "hue=blue"], "hue='blue': input should be a valid number"),
    ],
)
def test_generate_refuses_what_the_family_does_not_take(
    noise_model: Path, tmp_path: Path, options: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "noise", "--model", str(noise_model), "--family", NOISE, "-o", str(tmp_path / "out.mp4")]
    assert cli.main([*command, *options]) == 2
    assert re.search(said, capfd.readouterr().err)


def test_the_help_shows_the_fields_of_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["generate", "--family", NOISE, "--help"])
    said = capsys.readouterr().out
    assert "Noise, request fields:" in said and "--hue H" in said
    assert "Pyramid Flow, loading:" in said and "--video-steps N" in said
