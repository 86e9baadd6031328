import json
import logging
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pyramid_serve import checkpoints
from pyramid_serve.checkpoints import Capabilities, CheckpointError, load_module, load_state, resolve
from pyramid_serve.pyramid_flow import autoencoder

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


def write_checkpoint(folder: Path, *names: str, config: dict[str, Any] | None = None) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config or {}))
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
        checkpoints.read_config(part)


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
from pyramid_serve.checkpoints import load_module
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


# --- sources


def test_a_local_folder_is_returned_as_it_stands(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "causal_video_vae")
    assert resolve(str(tmp_path), parts=["causal_video_vae"]) == tmp_path


def test_a_path_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing: no such folder"):
        resolve(tmp_path / "nothing")


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(CheckpointError, match="a checkpoint is a folder"):
        resolve(tmp_path / "model.bin")


def test_a_folder_that_is_no_checkpoint_says_what_was_looked_for_and_what_is_there(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "photos")
    with pytest.raises(CheckpointError, match=r"looked for causal_video_vae/, text_encoder\*/; there are photos"):
        resolve(tmp_path, parts=["causal_video_vae", "text_encoder*", "photos"])


@pytest.fixture
def url() -> str:
    filesystem = fsspec.filesystem("memory")
    root = f"/{uuid4().hex}/model"
    files = {
        "pyramid_serve.json": b"{}",
        "README.md": b"#",
        "causal_video_vae/config.json": b"{}",
        "causal_video_vae/diffusion_pytorch_model.bin": b"vae",
        "diffusion_transformer_384p/config.json": b"{}",
        "diffusion_transformer_384p/diffusion_pytorch_model.bin": b"old",
        "diffusion_transformer_384p/diffusion_pytorch_model.safetensors": b"new",
        "tokenizer/merges.txt": b"",
    }
    for name, content in files.items():
        filesystem.pipe(f"{root}/{name}", content)
    return f"memory:/{root}"


def listing(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_from_a_url_only_the_needed_parts_are_copied(url: str, tmp_path: Path) -> None:
    folder = resolve(url, parts=["diffusion_transformer_384p"], cache=tmp_path)
    assert listing(folder) == [
        "causal_video_vae/config.json",
        "diffusion_transformer_384p/config.json",
        "diffusion_transformer_384p/diffusion_pytorch_model.safetensors",
        "pyramid_serve.json",
    ]


def test_from_a_url_a_part_that_has_only_a_pickle_is_copied_with_it(url: str, tmp_path: Path) -> None:
    folder = resolve(url, parts=["causal_video_vae"], cache=tmp_path)
    assert (folder / "causal_video_vae/diffusion_pytorch_model.bin").read_bytes() == b"vae"


def test_from_a_url_nothing_is_copied_twice(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve(url, parts=["causal_video_vae"], cache=tmp_path)
    monkeypatch.setattr(fsspec.filesystem("memory"), "get_file", None)
    assert resolve(url, parts=["causal_video_vae"], cache=tmp_path) == folder


def test_a_checkpoint_changed_at_its_url_is_copied_anew(url: str, tmp_path: Path) -> None:
    resolve(url, parts=["causal_video_vae"], cache=tmp_path)
    fsspec.filesystem("memory").pipe(
        f"{url.removeprefix('memory:/')}/causal_video_vae/diffusion_pytorch_model.bin", b"2nd"
    )
    folder = resolve(url, parts=["causal_video_vae"], cache=tmp_path)
    assert (folder / "causal_video_vae/diffusion_pytorch_model.bin").read_bytes() == b"2nd"


def test_a_copy_that_fails_leaves_no_half_file(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def get_half(remote: str, local: str) -> None:
        Path(local).write_bytes(b"v")
        raise OSError("connection lost")

    monkeypatch.setattr(fsspec.filesystem("memory"), "get_file", get_half)
    with pytest.raises(CheckpointError, match="connection lost"):
        resolve(url, parts=["causal_video_vae"], cache=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("source", ["memory://nowhere/at/all", "nosuchprotocol://bucket/model"])
def test_a_url_with_nothing_there_says_so(source: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=source):
        resolve(source, cache=tmp_path)


def test_a_file_url_is_used_in_place(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "causal_video_vae")
    assert resolve(tmp_path.as_uri(), parts=["causal_video_vae"]) == tmp_path


class Hub:
    """Stands in for the Hub: notes what was asked for and hands out a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str | None, list[str]]] = []

    def snapshot_download(self, repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((repo, revision, allow_patterns))
        return str(self.folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(write_checkpoint(tmp_path, "diffusion_transformer_384p", "diffusion_transformer_768p"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def test_from_the_hub_only_the_needed_parts_are_asked_for(hub: Hub) -> None:
    (hub.folder / "diffusion_transformer_384p/diffusion_pytorch_model.safetensors").touch()
    assert resolve("owner/name@v1", parts=["diffusion_transformer_384p"]) == hub.folder
    (repo, revision, patterns), *others = hub.asked
    assert (repo, revision, others) == ("owner/name", "v1", [])
    assert "diffusion_transformer_384p/*.safetensors" in patterns
    assert not any("768p" in pattern or pattern.endswith(".bin") for pattern in patterns)


def test_from_the_hub_a_pickle_is_asked_for_only_where_there_are_no_safetensors(hub: Hub) -> None:
    (hub.folder / "diffusion_transformer_768p/diffusion_pytorch_model.safetensors").touch()
    resolve("owner/name", parts=["diffusion_transformer_*"])
    assert hub.asked[-1] == ("owner/name", None, ["*.json", "diffusion_transformer_384p/*.bin"])


def test_variants_of_a_hub_checkpoint_are_listed_without_weights(hub: Hub) -> None:
    assert checkpoints.variants("owner/name") == ["diffusion_transformer_384p", "diffusion_transformer_768p"]
    assert [patterns for _, _, patterns in hub.asked] == [["*.json"]]


def test_a_hub_checkpoint_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"^owner/name: no such folder, .*: offline$"):
        resolve("owner/name")


# --- variants


def test_the_768p_variant_is_the_default(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path, "diffusion_transformer_384p", "diffusion_transformer_768p", "diffusion_transformer_image"
    )
    assert checkpoints.transformer_folder(tmp_path) == tmp_path / "diffusion_transformer_768p"


def test_the_only_variant_is_the_default() -> None:
    assert checkpoints.choose_variant(GOLDEN / "mmdit/checkpoint") == "diffusion_transformer_384p"


def test_without_768p_one_of_several_variants_must_be_chosen(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "diffusion_transformer_384p", "diffusion_transformer_image")
    with pytest.raises(
        CheckpointError, match="choose a variant: diffusion_transformer_384p, diffusion_transformer_image"
    ):
        checkpoints.choose_variant(tmp_path)


@pytest.mark.parametrize("variant", ["384p", "diffusion_transformer_384p"])
def test_a_variant_goes_by_its_full_or_its_short_name(tmp_path: Path, variant: str) -> None:
    write_checkpoint(tmp_path, "diffusion_transformer_384p", "diffusion_transformer_768p")
    assert checkpoints.choose_variant(tmp_path, variant) == "diffusion_transformer_384p"


def test_a_variant_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "diffusion_transformer_384p", "diffusion_transformer_768p")
    with pytest.raises(CheckpointError, match=r"no variant '1080p'; there are diffusion_transformer_384p, .*768p"):
        checkpoints.transformer_folder(tmp_path, "1080p")


def test_a_folder_without_transformers_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"looked for diffusion_transformer_\*/config.json; it is empty"):
        checkpoints.transformer_folder(tmp_path)


# --- capabilities


@pytest.mark.parametrize("config", [PUBLISHED_SD3, PUBLISHED_MINIFLUX])
@pytest.mark.parametrize(
    ("variant", "default_size", "longest"),
    [("384p", (640, 384), 16), ("768p", (1280, 768), 31), ("image", (1024, 1024), 1)],
)
def test_published_transformers_are_known(
    tmp_path: Path, config: dict[str, Any], variant: str, default_size: tuple[int, int], longest: int
) -> None:
    write_checkpoint(tmp_path, f"diffusion_transformer_{variant}", config=config)
    known = checkpoints.capabilities(tmp_path)
    assert (known.default_size, known.max_num_latent_frames) == (default_size, longest)
    assert (known.num_inference_steps, known.video_num_inference_steps) == ((20, 20, 20), (10, 10, 10))
    assert (known.guidance_scale, known.video_guidance_scale, known.image_video_guidance_scale) == (7, 5, 4)


def test_an_unknown_transformer_makes_every_legal_size() -> None:
    able = checkpoints.capabilities(GOLDEN / "mmdit/checkpoint")
    able.check_size(128, 64)
    able.check_num_latent_frames(1000)
    with pytest.raises(ValueError, match="size=130x64: width and height must be positive multiples of 64"):
        able.check_size(130, 64)


def test_the_file_goes_before_what_is_known_and_a_variant_before_the_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "diffusion_transformer_384p", "diffusion_transformer_768p", config=PUBLISHED_SD3)
    own = {"guidance_scale": 9, "sizes": [[128, 64]]}
    content = {"guidance_scale": 3, "prompt_suffix": "", "variants": {"diffusion_transformer_384p": own}}
    (tmp_path / "pyramid_serve.json").write_text(json.dumps(content))
    small, large = (checkpoints.capabilities(tmp_path, variant) for variant in ("384p", "768p"))
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
        checkpoints.capabilities(tmp_path)


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
    able = checkpoints.capabilities(mmdit)
    assert able.max_side == 512
    assert able.default_size == (512, 384)
    able.check_size(512, 64)
    with pytest.raises(ValueError, match="size=576x64: this model's positions reach to 512 pixels"):
        able.check_size(576, 64)


def test_a_config_that_lacks_something_is_an_error_that_names_it(mmdit: Path, tmp_path: Path) -> None:
    folder = tmp_path / "part"
    shutil.copytree(mmdit / "causal_video_vae", folder)
    config = json.loads((folder / "config.json").read_text())
    del config["encoder_layers_per_block"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="encoder_layers_per_block is missing"):
        load_module(autoencoder.from_config, folder)
