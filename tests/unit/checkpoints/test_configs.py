"""Configurations from anyone: each wrong value is one line that names its key, before anything is built."""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from pyramid_serve.checkpoints.sources import CheckpointError
from pyramid_serve.checkpoints.weights import load_module
from pyramid_serve.pyramid_flow import autoencoder, flux, mmdit
from pyramid_serve.pyramid_flow.capabilities import capabilities
from tests.conftest import GOLDEN

Build = Callable[[Mapping[str, Any]], nn.Module]

PARTS: dict[str, tuple[Build, Path]] = {
    "flux": (flux.from_config, GOLDEN / "miniflux" / "checkpoint" / "diffusion_transformer_384p"),
    "mmdit": (mmdit.from_config, GOLDEN / "mmdit" / "checkpoint" / "diffusion_transformer_384p"),
    "vae": (autoencoder.from_config, GOLDEN / "mmdit" / "checkpoint" / "causal_video_vae"),
}
SIZES = [
    *[("flux", key) for key in ("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim")],
    *[("flux", key) for key in ("in_channels", "joint_attention_dim", "pooled_projection_dim")],
    *[("mmdit", key) for key in ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels")],
    *[("mmdit", key) for key in ("joint_attention_dim", "pooled_projection_dim", "pos_embed_max_size")],
    *[("vae", key) for key in ("encoder_out_channels", "encoder_norm_num_groups", "decoder_norm_num_groups")],
]
LISTS = [
    ("flux", "axes_dims_rope"),
    *[("vae", f"encoder_{key}") for key in ("block_out_channels", "layers_per_block", "spatial_down_sample")],
    *[("vae", f"decoder_{key}") for key in ("block_out_channels", "layers_per_block", "temporal_up_sample")],
]


def refusal(tmp_path: Path, part: str, **changed: Any) -> str:
    """The one line with which a part is refused whose config has these values."""
    build, source = PARTS[part]
    folder = tmp_path / "part"
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    started = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        load_module(build, folder)
    assert time.monotonic() - started < 10
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{folder}/config.json: ")
    return message


@pytest.mark.parametrize("value", [10**9, -1, 0, None, "8", 1.5, True, [1], 10**30], ids=repr)
@pytest.mark.parametrize(("part", "key"), SIZES)
def test_a_size_that_cannot_be_is_refused_by_its_key(tmp_path: Path, part: str, key: str, value: object) -> None:
    assert key in refusal(tmp_path, part, **{key: value})


@pytest.mark.parametrize(
    "value", [None, 3, "four", [], [10**9] * 4, [-1] * 4, [None] * 4, [[1]] * 4, [2] * 10**5], ids=str
)
@pytest.mark.parametrize(("part", "key"), LISTS)
def test_a_list_that_cannot_be_is_refused_by_its_key(tmp_path: Path, part: str, key: str, value: object) -> None:
    assert key in refusal(tmp_path, part, **{key: value})


def test_lists_of_different_lengths_are_refused(tmp_path: Path) -> None:
    said = refusal(tmp_path, "vae", encoder_layers_per_block=[1, 1, 1])
    assert "encoder_layers_per_block: 3 blocks, but encoder_block_out_channels has 4" in said


def test_groups_that_do_not_divide_the_channels_are_refused(tmp_path: Path) -> None:
    assert "decoder_norm_num_groups=7: must divide each of" in refusal(tmp_path, "vae", decoder_norm_num_groups=7)


@pytest.mark.parametrize("part", list(PARTS))
def test_quantised_weights_are_refused(tmp_path: Path, part: str) -> None:
    said = refusal(tmp_path, part, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert said.endswith("quantization_config: quantised weights are not taken")


@pytest.mark.parametrize(("part", "key"), [("flux", "num_single_layers"), ("mmdit", "num_layers")])
def test_a_config_of_fewer_layers_than_the_weights_loads_no_half_model(tmp_path: Path, part: str, key: str) -> None:
    build, source = PARTS[part]
    shutil.copytree(source, tmp_path / "part")
    file = tmp_path / "part" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, key: config[key] - 1}))
    with pytest.raises(CheckpointError, match=r"weights do not fit the config: .*left over: "):
        load_module(build, tmp_path / "part")


@pytest.mark.parametrize("value", [10**9, -1, 0, "192", True, [192]], ids=repr)
def test_a_table_of_positions_that_cannot_be_is_refused_where_the_model_is_described(
    tmp_path: Path, mmdit: Path, value: object
) -> None:
    shutil.copytree(mmdit, tmp_path / "checkpoint")
    (file,) = (tmp_path / "checkpoint").glob("diffusion_transformer_*/config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "pos_embed_max_size": value}))
    with pytest.raises(
        CheckpointError, match=rf"^{file}: pos_embed_max_size=.*: must be a whole number from 1 to 1024$"
    ):
        capabilities(tmp_path / "checkpoint")
