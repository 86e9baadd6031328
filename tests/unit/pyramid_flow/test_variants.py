from pathlib import Path

import pytest

from pyramid_serve.checkpoints.sources import CheckpointError
from pyramid_serve.pyramid_flow.variants import choose_variant, transformer_folder
from tests.unit.checkpoints.checkpoints_at_hand import write_checkpoint

GOLDEN = Path(__file__).parents[2] / "golden"


def test_the_768p_variant_is_the_default(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path, "diffusion_transformer_384p", "diffusion_transformer_768p", "diffusion_transformer_image"
    )
    assert transformer_folder(tmp_path) == tmp_path / "diffusion_transformer_768p"


def test_the_only_variant_is_the_default() -> None:
    assert choose_variant(GOLDEN / "mmdit/checkpoint") == "diffusion_transformer_384p"


def test_without_768p_one_of_several_variants_must_be_chosen(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "diffusion_transformer_384p", "diffusion_transformer_image")
    with pytest.raises(
        CheckpointError, match="choose a variant: diffusion_transformer_384p, diffusion_transformer_image"
    ):
        choose_variant(tmp_path)


@pytest.mark.parametrize("variant", ["384p", "diffusion_transformer_384p"])
def test_a_variant_goes_by_its_full_or_its_short_name(tmp_path: Path, variant: str) -> None:
    write_checkpoint(tmp_path, "diffusion_transformer_384p", "diffusion_transformer_768p")
    assert choose_variant(tmp_path, variant) == "diffusion_transformer_384p"


def test_a_variant_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "diffusion_transformer_384p", "diffusion_transformer_768p")
    with pytest.raises(CheckpointError, match=r"no variant '1080p'; there are diffusion_transformer_384p, .*768p"):
        transformer_folder(tmp_path, "1080p")


def test_a_folder_without_transformers_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"looked for diffusion_transformer_\*/config.json; it is empty"):
        transformer_folder(tmp_path)
