import json
from pathlib import Path
from typing import Any

import pytest

from pyramid_serve.checkpoints.sources import CheckpointError
from pyramid_serve.pyramid_flow.capabilities import Capabilities, capabilities
from tests.unit.checkpoints.checkpoints_at_hand import write_checkpoint

GOLDEN = Path(__file__).parents[2] / "golden"
PUBLISHED_SD3 = {
    "_class_name": "PyramidDiffusionMMDiT",
    "num_layers": 24,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
}
PUBLISHED_MINIFLUX = {
    "_class_name": "PyramidFluxTransformer",
    "num_layers": 8,
    "num_single_layers": 16,
    "num_attention_heads": 30,
    "joint_attention_dim": 4096,
    "axes_dims_rope": [16, 24, 24],
}


@pytest.mark.parametrize("config", [PUBLISHED_SD3, PUBLISHED_MINIFLUX])
@pytest.mark.parametrize(
    ("variant", "default_size", "longest"),
    [("384p", (640, 384), 16), ("768p", (1280, 768), 31), ("image", (1024, 1024), 1)],
)
def test_published_transformers_are_known(
    tmp_path: Path, config: dict[str, Any], variant: str, default_size: tuple[int, int], longest: int
) -> None:
    write_checkpoint(tmp_path, f"diffusion_transformer_{variant}", config=config)
    known = capabilities(tmp_path)
    assert (known.default_size, known.max_num_latent_frames) == (default_size, longest)
    assert (known.num_inference_steps, known.video_num_inference_steps) == ((20, 20, 20), (10, 10, 10))
    assert (known.guidance_scale, known.video_guidance_scale, known.image_video_guidance_scale) == (7, 5, 4)


def test_an_unknown_transformer_makes_every_legal_size() -> None:
    able = capabilities(GOLDEN / "mmdit/checkpoint")
    able.check_size(128, 64)
    able.check_num_latent_frames(1000)
    with pytest.raises(ValueError, match="size=130x64: width and height must be positive multiples of 64"):
        able.check_size(130, 64)


def test_the_file_goes_before_what_is_known_and_a_variant_before_the_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "diffusion_transformer_384p", "diffusion_transformer_768p", config=PUBLISHED_SD3)
    own = {"guidance_scale": 9, "sizes": [[128, 64]]}
    content = {"guidance_scale": 3, "prompt_suffix": "", "variants": {"diffusion_transformer_384p": own}}
    (tmp_path / "pyramid_serve.json").write_text(json.dumps(content))
    small, large = (capabilities(tmp_path, variant) for variant in ("384p", "768p"))
    assert (small.guidance_scale, small.sizes, small.prompt_suffix) == (9, ((128, 64),), "")
    assert (large.guidance_scale, large.sizes, large.prompt_suffix) == (3, ((1280, 768),), "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"guidance": 3}, "guidance: Unexpected"),
        ({"variants": {"diffusion_transformer_1080p": {}}}, "variants that are not there: diffusion_transformer_1080p"),
        ({"variants": {"diffusion_transformer_384p": {"guidance": 3}}}, "guidance: Unexpected"),
        ({"sizes": [[640, 400]]}, r"sizes.0.1: .* multiple of 64"),
        ({"sizes": []}, "sizes"),
        ({"num_inference_steps": [20, 20]}, "num_inference_steps"),
        ({"num_inference_steps": [20, 20, "20"]}, "num_inference_steps.2"),
        ({"max_num_latent_frames": 4}, "num_latent_frames=16: at most 4"),
    ],
)
def test_a_field_that_is_unknown_or_not_allowed_is_named(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    write_checkpoint(tmp_path, "diffusion_transformer_384p")
    (tmp_path / "pyramid_serve.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"pyramid_serve.json: .*{message}"):
        capabilities(tmp_path)


def test_a_size_that_the_model_does_not_make_lists_those_it_does() -> None:
    with pytest.raises(ValueError, match=r"^size=640x400: this model makes 640x384, 384x640$"):
        Capabilities(sizes=((640, 384), (384, 640))).check_size(640, 400)


@pytest.mark.parametrize(
    ("longest", "message"),
    [
        (31, r"at most 31 \(10 s at 24 fps\)"),
        (16, r"at most 16 \(5 s at 24 fps\)"),
        (1, r"at most 1 \(a single picture\)"),
    ],
)
def test_a_video_that_is_too_long_says_what_is_allowed(longest: int, message: str) -> None:
    able = Capabilities(max_num_latent_frames=longest, default_num_latent_frames=1)
    with pytest.raises(ValueError, match=rf"^num_latent_frames=40: {message}$"):
        able.check_num_latent_frames(40)


def test_a_sine_table_bounds_the_sizes(mmdit: Path) -> None:
    able = capabilities(mmdit)
    assert able.max_side == 512
    assert able.default_size == (512, 384)
    able.check_size(512, 64)
    with pytest.raises(ValueError, match="size=576x64: this model's positions reach to 512 pixels"):
        able.check_size(576, 64)
