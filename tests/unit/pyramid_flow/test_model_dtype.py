"""Who decides what a model is computed in: the user, else the device and the checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from deployments.app import AppConfig
from deployments.pools.decoder import DecoderConfig
from deployments.pools.denoiser import DenoiserConfig
from pyramid_serve import precision
from pyramid_serve.checkpoints.sources import CheckpointError
from pyramid_serve.dtypes import DTypeName
from pyramid_serve.precision import suitable_dtype
from pyramid_serve.pyramid_flow.capabilities import capabilities
from pyramid_serve.pyramid_flow.parts import load_transformer, load_vae
from pyramid_serve.pyramid_flow.pipeline import PyramidFlow


@pytest.fixture
def checkpoint(miniflux: Path, tmp_path: Path) -> Path:
    """One that prefers bfloat16."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(miniflux, folder)
    (folder / "pyramid_serve.json").write_text(json.dumps({"dtype": "bfloat16"}))
    return folder


@pytest.fixture
def slow_at_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_library_has", lambda dtype: False)


def test_library_and_deployments_follow_one_rule(checkpoint: Path) -> None:
    expected = suitable_dtype(torch.device("cpu"), "bfloat16").dtype
    assert PyramidFlow.from_pretrained(checkpoint).vae.dtype == expected
    assert DenoiserConfig(source=str(checkpoint), device="cpu").precision.dtype == expected


def test_a_cpu_that_is_slow_at_bfloat16_gets_float32(checkpoint: Path, slow_at_bfloat16: None) -> None:
    pipeline = PyramidFlow.from_pretrained(checkpoint)
    assert pipeline.vae.dtype == torch.float32
    assert pipeline.precision.name == "float32"
    assert DenoiserConfig(source=str(checkpoint), device="cpu").precision.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_the_user_has_the_last_word(checkpoint: Path, slow_at_bfloat16: None, dtype: DTypeName | torch.dtype) -> None:
    assert PyramidFlow.from_pretrained(checkpoint, dtype=dtype).vae.dtype == torch.bfloat16
    assert DenoiserConfig(source=str(checkpoint), device="cpu", dtype="bfloat16").precision.dtype == torch.bfloat16


def test_the_dtype_is_set_once_for_all_deployments(checkpoint: Path) -> None:
    config = AppConfig.model_validate({"model": {"source": str(checkpoint), "dtype": "float16"}})
    (model,) = config.models
    configs = (model.text_encoder_config, model.denoiser_config, model.decoder_config)
    assert {each.precision.dtype for each in configs} == {torch.float16}
    with pytest.raises(ValueError, match=r"decoder\.settings\.dtype: set the model's dtype"):
        AppConfig.model_validate({"model": {"source": str(checkpoint)}, "decoder": {"settings": {"dtype": "float32"}}})


def test_the_vae_is_in_float32_beside_a_transformer_in_float16(checkpoint: Path) -> None:
    assert load_vae(checkpoint, dtype=torch.float16).dtype == torch.float32
    transformer = load_transformer(checkpoint, dtype=torch.float16)
    assert {parameter.dtype for parameter in transformer.parameters()} == {torch.float16}  # type: ignore[attr-defined]


def test_another_dtype_is_refused(checkpoint: Path) -> None:
    (checkpoint / "pyramid_serve.json").write_text(json.dumps({"dtype": "int8"}))
    with pytest.raises(CheckpointError, match="dtype"):
        capabilities(checkpoint)


def test_the_record_says_what_the_vae_is_in_beside_float16(checkpoint: Path) -> None:
    config = DecoderConfig(source=str(checkpoint), device="cpu", dtype="float16")
    family = config.model_family
    assert family.load_decode(config.part_source(family.decode_options)).dtype == torch.float32
    assert family.load_denoise(config.part_source(family.denoise_options)).dtype == torch.float16
    assert config.computed_as("decoder", torch.float32).dtype == "float32"
