import json
import logging
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pyramid_serve.checkpoints.sources import CheckpointError, read_config
from pyramid_serve.checkpoints.weights import load_module, load_state
from pyramid_serve.pyramid_flow import autoencoder


class Small(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(2, width)
        self.register_buffer("table", torch.zeros(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def small_state() -> dict[str, torch.Tensor]:
    return {
        "linear.weight": torch.arange(6.0).reshape(3, 2),
        "linear.bias": torch.tensor([1.0, 2.0, 3.0]),
        "table": torch.arange(4.0),
        "count": torch.tensor(7),
    }


def build_small(config: dict[str, Any]) -> Small:
    return Small(config["width"])


@pytest.fixture
def part(tmp_path: Path) -> Path:
    folder = tmp_path / "part"
    folder.mkdir()
    (folder / "config.json").write_text('{"width": 3}')
    return folder


def save_shards(state: dict[str, torch.Tensor], folder: Path, suffix: str) -> None:
    names = sorted(state)
    weight_map: dict[str, str] = {}
    for number, keys in enumerate((names[:2], names[2:]), start=1):
        shard = f"diffusion_pytorch_model-{number:05d}-of-00002{suffix}"
        tensors = {key: state[key] for key in keys}
        save_file(tensors, folder / shard) if suffix == ".safetensors" else torch.save(tensors, folder / shard)
        weight_map |= dict.fromkeys(keys, shard)
    (folder / f"diffusion_pytorch_model{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def save_whole(state: dict[str, torch.Tensor], folder: Path, suffix: str) -> Path:
    file = folder / f"diffusion_pytorch_model{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    return file


# --- weights


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("save", [save_whole, save_shards])
def test_every_file_format_gives_the_same_state(part: Path, suffix: str, save: Any) -> None:
    save(small_state(), part, suffix)
    state = load_state(part)
    assert state.keys() == small_state().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in small_state().items())


def test_safetensors_go_before_a_pickle(part: Path) -> None:
    save_whole({"a": torch.zeros(1)}, part, ".bin")
    save_shards({"a": torch.ones(1), "b": torch.ones(1), "c": torch.ones(1)}, part, ".safetensors")
    assert load_state(part)["a"] == 1


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_truncated_file_is_named(part: Path, suffix: str) -> None:
    file = save_whole(small_state(), part, suffix)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=f"diffusion_pytorch_model{suffix}: truncated"):
        load_state(part)


def test_a_pickle_with_more_than_tensors_is_not_run(part: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("the pickle was run",))

    torch.save({"a": Evil()}, part / "diffusion_pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(CheckpointError, match="more than tensors"):
        load_state(part)


def test_a_nested_pickle_is_refused(part: Path) -> None:
    torch.save({"state_dict": small_state()}, part / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="tensors by name and nothing else"):
        load_state(part)


def test_the_old_unmappable_format_is_refused_with_the_remedy(part: Path) -> None:
    torch.save(small_state(), part / "diffusion_pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="save it again"):
        load_state(part)


def test_a_missing_shard_is_named(part: Path) -> None:
    save_shards(small_state(), part, ".safetensors")
    (part / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002.safetensors: no such file"):
        load_state(part)


def test_a_shard_outside_the_folder_is_refused(part: Path) -> None:
    index = part / "diffusion_pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../part/config.json"}}))
    with pytest.raises(CheckpointError, match="no such file"):
        load_state(part)


def test_a_folder_without_weights_says_what_was_looked_for(part: Path) -> None:
    with pytest.raises(CheckpointError, match=r"looked for diffusion_pytorch_model.safetensors and .bin"):
        load_state(part)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_config_that_is_no_json_object_is_refused(part: Path, text: str) -> None:
    (part / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config.json"):
        read_config(part)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_module_is_filled_in_the_dtype_asked_for(part: Path, dtype: torch.dtype) -> None:
    save_whole(small_state(), part, ".bin")
    module = load_module(build_small, part, dtype=dtype)
    assert module.linear.weight.dtype == module.table.dtype == dtype
    assert module.count.dtype == torch.int64
    assert torch.equal(module.linear.weight.float(), small_state()["linear.weight"])
    assert module.count == 7
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_missing_and_misshapen_keys_are_all_named_in_one_error(part: Path) -> None:
    state = small_state() | {"linear.bias": torch.zeros(5)}
    del state["table"], state["count"]
    save_whole(state, part, ".safetensors")
    with pytest.raises(
        CheckpointError, match=r"2 missing: table, count; 1 misshapen: linear.bias is \(5,\), not \(3,\)"
    ):
        load_module(build_small, part)


def test_many_missing_keys_are_counted(part: Path) -> None:
    save_whole({"a": torch.zeros(1)}, part, ".safetensors")
    with pytest.raises(CheckpointError, match=r"24 missing: 0.weight, .*, and 14 more$"):
        load_module(lambda config: nn.Sequential(*(nn.Linear(1, 1) for _ in range(12))), part)


def test_unexpected_keys_are_one_warning(part: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_whole(small_state() | {"loss.a": torch.zeros(1), "loss.b": torch.zeros(1)}, part, ".bin")
    with caplog.at_level(logging.WARNING):
        load_module(build_small, part)
    assert [record.getMessage() for record in caplog.records] == [
        f"{part}: 2 unexpected keys are left out: loss.a, loss.b"
    ]


def test_keys_left_over_of_a_part_of_the_module_are_an_error(part: Path) -> None:
    name = next(iter(small_state()))
    save_whole(small_state() | {f"{name.partition('.')[0]}.more": torch.zeros(1)}, part, ".bin")
    with pytest.raises(CheckpointError, match=r"weights do not fit the config: 1 left over: \w+\.more"):
        load_module(build_small, part)


def test_a_buffer_that_no_checkpoint_fills_is_an_error(part: Path) -> None:
    class WithBuffer(Small):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("frequencies", torch.ones(2), persistent=False)

    save_whole(small_state(), part, ".bin")
    with pytest.raises(RuntimeError, match="frequencies"):
        load_module(lambda config: WithBuffer(), part)


PEAK = """
import sys, torch
from pyramid_serve.checkpoints.weights import load_module
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
build = lambda config: torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(48)))
torch.ones(512, 512).bfloat16().sum()
before = peak()
module = load_module(build, sys.argv[1], dtype=getattr(torch, sys.argv[2]))
assert sum(float(parameter.sum()) for parameter in module.parameters()) == 48 * 1024 * 1024
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize(("dtype", "copies"), [("float32", 1.0), ("bfloat16", 1.5)])
def test_loading_never_holds_a_second_copy(part: Path, suffix: str, dtype: str, copies: float) -> None:
    # 192 MiB in float32. In bfloat16 the peak is the mapped file (which the kernel may drop) and the cast weights.
    save_whole({f"{index}.weight": torch.ones(1024, 1024) for index in range(48)}, part, suffix)
    command = [sys.executable, "-c", PEAK, str(part), dtype]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert float(output) < copies * 192 + 32


def test_a_config_that_lacks_something_is_an_error_that_names_it(mmdit: Path, tmp_path: Path) -> None:
    folder = tmp_path / "part"
    shutil.copytree(mmdit / "causal_video_vae", folder)
    config = json.loads((folder / "config.json").read_text())
    del config["encoder_layers_per_block"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="encoder_layers_per_block is missing"):
        load_module(autoencoder.from_config, folder)
