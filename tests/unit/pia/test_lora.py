"""LoRA files: the weights that ``diffusers.PIAPipeline`` has with them."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from pyramid_serve.checkpoints.sources import CheckpointError
from pyramid_serve.pia.model_files import model_files
from pyramid_serve.pia.parts import load_unet
from pyramid_serve.pia.text_encoder import TextEncoder
from tests.unit.pia.golden import CHECKPOINT

CPU = torch.device("cpu")
RANK = 2
ALPHA = 3.0
_UNET_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT_LAYERS = ("q_proj", "v_proj", "out_proj")


def pipeline() -> Any:
    import diffusers

    adapter = diffusers.MotionAdapter.from_pretrained(CHECKPOINT / "motion_adapter")
    return diffusers.PIAPipeline.from_pretrained(CHECKPOINT, motion_adapter=adapter)


def layers_of(pipe: Any) -> dict[str, dict[str, tuple[int, int]]]:
    """The sizes (out, in) of the layers that LoRA files have, by part and name."""
    unet = {
        name: tuple(module.weight.shape)
        for name, module in pipe.unet.named_modules()
        if ".attentions." in name and name.endswith(_UNET_LAYERS)
    }
    text = {
        name if name.startswith("text_model.") else f"text_model.{name}": tuple(module.weight.shape)
        for name, module in pipe.text_encoder.named_modules()
        if name.endswith(_TEXT_LAYERS)
    }
    return {"unet": unet, "text_encoder": text}


def write_lora(file: Path, pipe: Any, *, as_kohya: bool, parts: tuple[str, ...] = ("unet", "text_encoder")) -> Path:
    generator = torch.Generator().manual_seed(3)
    state: dict[str, Tensor] = {}
    for part in parts:
        for name, (num_out, num_in) in layers_of(pipe)[part].items():
            down, up = (torch.randn(size, generator=generator) / 3 for size in ((RANK, num_in), (num_out, RANK)))
            if as_kohya:
                key = f"lora_{'unet' if part == 'unet' else 'te'}_{name.replace('.', '_')}"
                state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
                state[f"{key}.alpha"] = torch.tensor(ALPHA)
            else:
                state |= {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
    safetensors.torch.save_file(state, file)
    return file


def model_with(folder: Path, *loras: dict[str, Any]) -> Path:
    """The tiny model with a settings file that names LoRA files."""
    shutil.copytree(CHECKPOINT, folder, dirs_exist_ok=True)
    (folder / "pyramid_serve.json").write_text(json.dumps({"lora": loras}))
    return folder


def weights(model: Path) -> dict[str, Tensor]:
    files = model_files(model)
    unet = load_unet(files, dtype=torch.float32, device=CPU)
    encoder = TextEncoder(files.base, dtype=torch.float32, device=CPU, loras=files.loras)
    return {**unet.state_dict(), "prompt": encoder.encode("a cat in a hat")[0]}


@pytest.mark.parametrize("as_kohya", [False, True])
def test_weights_are_those_of_diffusers(tmp_path: Path, as_kohya: bool) -> None:
    pipe = pipeline()
    (tmp_path / "model" / "loras").mkdir(parents=True)
    first = write_lora(tmp_path / "model" / "loras" / "first.safetensors", pipe, as_kohya=as_kohya)
    second = write_lora(tmp_path / "second.safetensors", pipe, as_kohya=not as_kohya, parts=("unet",))
    model = model_with(
        tmp_path / "model", {"file": "./loras/first.safetensors", "scale": 0.7}, {"file": str(second), "scale": -0.5}
    )
    plain, ours = weights(CHECKPOINT), weights(model)
    assert not torch.equal(plain["prompt"], ours["prompt"])
    for path, scale in ((first, 0.7), (second, -0.5)):
        pipe.load_lora_weights(str(path.parent), weight_name=path.name)
        pipe.fuse_lora(lora_scale=scale)
        pipe.unload_lora_weights()
    theirs = pipe.unet.state_dict()
    assert set(ours) - {"prompt"} == set(theirs), "something of LoRA is left in the UNet"
    num_changed = sum(not torch.equal(ours[name], plain[name]) for name in theirs)
    assert num_changed == len(layers_of(pipe)["unet"])
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-6)
    tokens = pipe.tokenizer(["a cat in a hat"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(ours["prompt"], pipe.text_encoder(tokens)[0][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"a": torch.zeros(2)}, "no LoRA|no layers of LoRA"),
        (
            {
                "unet.down_blocks.0.attentions.9.to_q.lora_A.weight": torch.zeros(2, 8),
                "unet.down_blocks.0.attentions.9.to_q.lora_B.weight": torch.zeros(8, 2),
            },
            "does not fit",
        ),
        (
            {
                "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 320),
                "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.zeros(320, 2),
            },
            "does not fit",
        ),
    ],
)
def test_a_file_that_is_of_another_model_is_refused(tmp_path: Path, state: dict[str, Tensor], said: str) -> None:
    safetensors.torch.save_file(state, tmp_path / "other.safetensors")
    model = model_with(tmp_path / "model", {"file": str(tmp_path / "other.safetensors")})
    with pytest.raises(CheckpointError, match=said):
        weights(model)


def test_a_file_that_is_broken_or_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    for name, said in (("broken", "no LoRA file"), ("none", "no such LoRA file")):
        model = model_with(tmp_path / "model", {"file": str(tmp_path / f"{name}.safetensors")})
        with pytest.raises(CheckpointError, match=f"{name}.safetensors: {said}"):
            weights(model)


def test_without_peft_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2)}, file)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(CheckpointError, match=r"pip install 'pyramid-serve\[lora\]'"):
        weights(model_with(tmp_path / "model", {"file": str(file)}))
