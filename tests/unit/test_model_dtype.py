"""Who decides what a model is computed in."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from deployments.denoiser import DenoiserConfig
from pyramid_serve.checkpoints import Capabilities, CheckpointError, capabilities
from pyramid_serve.pyramid_flow.pipeline import PyramidFlow


@pytest.fixture
def checkpoint(miniflux: Path, tmp_path: Path) -> Path:
    """One that wants to be computed in bfloat16."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(miniflux, folder)
    (folder / "pyramid_serve.json").write_text(json.dumps({"dtype": "bfloat16"}))
    return folder


def test_without_a_word_it_is_float32_on_a_cpu_and_bfloat16_on_cuda() -> None:
    assert Capabilities().dtype_on(torch.device("cpu")) == torch.float32
    assert Capabilities().dtype_on(torch.device("cuda")) == torch.bfloat16


def test_a_checkpoint_may_say_it(checkpoint: Path) -> None:
    assert PyramidFlow.from_pretrained(checkpoint).vae.dtype == torch.bfloat16
    assert DenoiserConfig(source=str(checkpoint)).torch_dtype == torch.bfloat16


def test_the_user_has_the_last_word(checkpoint: Path) -> None:
    assert PyramidFlow.from_pretrained(checkpoint, dtype=torch.float32).vae.dtype == torch.float32
    assert DenoiserConfig(source=str(checkpoint), dtype="float32").torch_dtype == torch.float32


def test_another_dtype_is_refused(checkpoint: Path) -> None:
    (checkpoint / "pyramid_serve.json").write_text(json.dumps({"dtype": "int8"}))
    with pytest.raises(CheckpointError, match="dtype"):
        capabilities(checkpoint)
