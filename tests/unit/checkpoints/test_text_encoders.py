"""Text encoders from anyone: nothing that the files say is run or fetched, and what is wrong is one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pyramid_serve.checkpoints.sources import CheckpointError
from pyramid_serve.checkpoints.text_encoders import load_encoder
from pyramid_serve.pyramid_flow.text_encoder import TextEncoder

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tmp_path: Path, miniflux: Path) -> Path:
    folder = tmp_path / "checkpoint"
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.copytree(miniflux / part, folder / part)
    return folder


def change(file: Path, **changed: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


def refusal(part: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_encoder(part, torch.float32, CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("value", [10**9, -1, 0, None, "8", 1.5, True], ids=repr)
@pytest.mark.parametrize(
    ("part", "key"),
    [
        *[("text_encoder", key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")],
        *[("text_encoder_2", key) for key in ("d_model", "num_layers", "num_heads", "d_ff", "vocab_size")],
    ],
)
def test_a_size_that_cannot_be_is_refused_by_file_and_key(checkpoint: Path, part: str, key: str, value: object) -> None:
    change(checkpoint / part / "config.json", **{key: value})
    assert refusal(checkpoint / part).startswith(f"{checkpoint / part}/config.json: {key}=")


def test_a_model_larger_than_its_weights_is_refused_before_it_is_allocated(checkpoint: Path) -> None:
    change(
        checkpoint / "text_encoder" / "config.json", hidden_size=2**16, intermediate_size=2**20, num_hidden_layers=200
    )
    said = refusal(checkpoint / "text_encoder")
    assert said.startswith(f"{checkpoint}/text_encoder: cannot be loaded: config.json describes ")


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_a_config_chooses_no_kernel(checkpoint: Path, part: str, key: str) -> None:
    before = load_encoder(checkpoint / part, torch.float32, CPU).model.config._attn_implementation
    change(checkpoint / part / "config.json", **{key: "owner/kernel"})
    assert load_encoder(checkpoint / part, torch.float32, CPU).model.config._attn_implementation == before == "sdpa"


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_quantised_weights_are_refused(checkpoint: Path, part: str) -> None:
    change(checkpoint / part / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert refusal(checkpoint / part).endswith("/config.json: quantization_config: quantised weights are not taken")


@pytest.mark.parametrize(("part", "key"), [("text_encoder", "num_hidden_layers"), ("text_encoder_2", "num_layers")])
def test_a_config_of_fewer_layers_than_the_weights_loads_no_half_model(checkpoint: Path, part: str, key: str) -> None:
    change(checkpoint / part / "config.json", **{key: 1})
    assert "weights do not fit the config: " in (said := refusal(checkpoint / part)) and " left over: " in said


def test_code_of_a_tokenizer_is_neither_run_nor_asked_about(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = checkpoint / "ran"
    (checkpoint / "tokenizer" / "mine.py").write_text(f"open({str(ran)!r}, 'w')\nclass Mine:\n    pass\n")
    change(
        checkpoint / "tokenizer" / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["mine.Mine", None]},
        tokenizer_class="Mine",
    )

    def answer(*_: object) -> str:
        raise AssertionError("it asks at the terminal")

    monkeypatch.setattr("builtins.input", answer)
    said = refusal(checkpoint / "text_encoder")
    assert said.startswith(f"{checkpoint}/tokenizer: cannot be loaded: ")
    assert not ran.exists()


@pytest.mark.parametrize("value", ["77", -1, True], ids=repr)
def test_a_length_of_the_tokenizer_that_cannot_be_is_refused(checkpoint: Path, value: object) -> None:
    change(checkpoint / "tokenizer" / "tokenizer_config.json", model_max_length=value)
    assert refusal(checkpoint / "text_encoder").startswith(f"{checkpoint}/tokenizer")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "tokenizer_2")
    shutil.copytree(checkpoint / "tokenizer", checkpoint / "tokenizer_2")
    assert "has 714 tokens, but text_encoder_2/config.json: vocab_size=320" in refusal(checkpoint / "text_encoder_2")


@pytest.mark.parametrize("architectures", ["CLIPTextModel", [["CLIPTextModel"]], {"a": 1}, 5, [None]], ids=repr)
def test_an_architecture_of_another_type_is_no_traceback(checkpoint: Path, architectures: object) -> None:
    change(checkpoint / "text_encoder" / "config.json", architectures=architectures)
    if architectures != "CLIPTextModel":
        assert "architecture" in refusal(checkpoint / "text_encoder")


def test_positions_that_old_files_hold_are_left_out(checkpoint: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = checkpoint / "text_encoder" / "model.safetensors"
    state = load_file(file)
    save_file({**state, "text_model.embeddings.position_ids": torch.arange(77)}, file, metadata={"format": "pt"})
    assert TextEncoder.from_pretrained(checkpoint).encode(["a ball"])
