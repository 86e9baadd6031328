"""Both transformers: their keys, and that packing changes nothing."""

import json

import pytest
import torch
from torch import nn

from pyramid_serve.pyramid_flow import autoencoder, flux, mmdit
from tests.conftest import PUBLISHED
from tests.unit.pyramid_flow.transformers_at_hand import (
    FLUX_CONFIG,
    MMDIT_CONFIG,
    largest_difference,
    random_sequence,
    tiny_transformers,
)

both = pytest.mark.parametrize("model", tiny_transformers(), ids=["mmdit", "flux"])


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("sd3_transformer", mmdit.from_config),
        ("miniflux_transformer", flux.from_config),
        ("causal_video_vae", autoencoder.from_config),
    ],
)
def test_published_configs_give_the_published_keys_and_shapes(name, build) -> None:  # type: ignore[no-untyped-def]
    with torch.device("meta"):
        model = build(json.loads((PUBLISHED / f"{name}_config.json").read_text()))
    keys = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert keys == json.loads((PUBLISHED / f"{name}_keys.json").read_text())


@both
def test_a_pack_of_six_gives_each_sequences_own_result(model: nn.Module) -> None:
    sequences = [
        random_sequence(unit=0, stage=0, timestep=1000.0),
        random_sequence(unit=0, stage=2, timestep=3.5, num_tokens=1),
        random_sequence(unit=1, stage=1, timestep=500.0, num_tokens=128),
        random_sequence(unit=5, stage=2, timestep=386.0),
        random_sequence(unit=3, stage=0, timestep=744.256, num_tokens=17),
        random_sequence(unit=5, stage=2, timestep=97.5),
    ]
    alone = [model([sequence])[0] for sequence in sequences]
    assert largest_difference(model(sequences), alone) <= 1e-5
    assert largest_difference(model(sequences[::-1]), alone[::-1]) <= 1e-5


@both
def test_the_prediction_depends_on_everything_in_the_sequence(model: nn.Module) -> None:
    sequence = random_sequence(unit=2, stage=1, timestep=500.0)
    before = model([sequence])[0]
    assert before.shape == sequence.clips[-1].shape
    assert before.dtype == torch.float32
    others = random_sequence(unit=2, stage=1, timestep=300.0)
    for name in ("prompt", "clips", "timestep"):
        changed = type(sequence)(**{**vars(sequence), name: getattr(others, name)})
        assert largest_difference([model([changed])[0]], [before]) > 1e-3, name


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float32(model: nn.Module, dtype: torch.dtype) -> None:
    sequence = random_sequence(unit=2, stage=2, timestep=500.0)
    exact = model([sequence])[0]
    build, config = (mmdit, MMDIT_CONFIG) if isinstance(model, mmdit.MMDiT) else (flux, FLUX_CONFIG)
    half = build.from_config(config)
    half.load_state_dict(model.state_dict())
    out = half.to(dtype).eval()([sequence])[0]
    assert out.dtype == torch.float32
    assert (out - exact).abs().max() < 0.05 * exact.abs().max() + 0.02


def test_a_size_larger_than_the_sine_table_is_refused() -> None:
    model = tiny_transformers()[0]
    sequence = random_sequence(unit=0, stage=2, timestep=1.0)
    large = type(sequence)(sequence.prompt, (torch.randn(16, 1, 40, 40),), 1.0)
    with pytest.raises(ValueError, match="20 x 20 patches, at most 16 x 16"):
        model([large])


def test_rope_axes_that_do_not_fill_a_head_are_refused() -> None:
    with pytest.raises(ValueError, match="axes_dims_rope"):
        flux.from_config({**FLUX_CONFIG, "axes_dims_rope": [4, 4, 4]})


def test_another_patch_size_is_refused() -> None:
    with pytest.raises(ValueError, match="patch_size=1"):
        mmdit.from_config({**MMDIT_CONFIG, "patch_size": 1})


@both
def test_what_was_run_in_inference_mode_can_be_trained_on(model: nn.Module) -> None:
    sequence = random_sequence(unit=4, stage=1, timestep=500.0, num_tokens=11)
    with torch.inference_mode():
        model([sequence])
    prompt = type(sequence.prompt)(sequence.prompt.prompt_embeds.requires_grad_(), sequence.prompt.pooled_prompt_embeds)
    model([type(sequence)(prompt, sequence.clips, sequence.timestep)])[0].sum().backward()
    assert prompt.prompt_embeds.grad is not None


@both
def test_an_empty_pack_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="give at least one"):
        model([])
