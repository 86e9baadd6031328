import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyramid_serve.checkpoints.sources import CheckpointError
from pyramid_serve.families import family_of
from pyramid_serve.pia.capabilities import capabilities
from pyramid_serve.pia.model_files import model_files
from pyramid_serve.pia.parts import load_unet, load_vae
from pyramid_serve.pia.text_encoder import TextEncoder
from tests.unit.pia.golden import CHECKPOINT
from tests.unit.pia.models_at_hand import change, copied, with_settings
from tests.unit.pia.tiny import tiny_adapter

CPU = torch.device("cpu")


def load(source: Path) -> Any:
    return load_unet(model_files(source), dtype=torch.float32, device=CPU)


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def merged(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved PIAPipeline: its UNet has the adapter in it, and there is none beside it."""
    folder = tmp_path_factory.mktemp("models") / "merged"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("unet", "motion_adapter"))
    load(tiny).save_pretrained(folder / "unet")
    change(folder / "model_index.json", _class_name="PIAPipeline")
    return folder


def test_all_three_kinds_of_models_are_recognised(tiny: Path, merged: Path, tmp_path: Path) -> None:
    for source in (tiny, merged, with_settings(tmp_path / "named")):
        assert family_of(source).name == "pia"


def test_a_base_model_without_an_adapter_is_no_model_of_this_family(tmp_path: Path) -> None:
    model = copied(tmp_path)
    shutil.rmtree(model / "motion_adapter")
    with pytest.raises(CheckpointError, match=r"no checkpoint of a model that is known here \(Pyramid Flow, PIA\)"):
        family_of(model)


def test_a_broken_index_makes_a_folder_no_model(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(CheckpointError, match="no checkpoint of a model that is known here"):
        family_of(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"base": "a",}'])
def test_a_broken_settings_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "pyramid_serve.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"/pyramid_serve\.json: (cannot be read|must be a JSON object)"):
        family_of(tmp_path)


def test_a_long_edge_that_no_video_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"pyramid_serve\.json: long_edge=18: must be a multiple of 4"):
        capabilities(with_settings(tmp_path / "named", long_edge=18), None)
    assert capabilities(with_settings(tmp_path / "named", long_edge=20), None).long_edge == 20


def test_all_three_kinds_have_the_same_unet(tiny: Path, merged: Path, tmp_path: Path) -> None:
    assert same_weights(load(tiny), load(merged))
    assert same_weights(load(tiny), load(with_settings(tmp_path / "named")))


def test_the_first_four_input_channels_are_the_bases_and_the_rest_the_adapters(tiny: Path) -> None:
    conv = load(tiny).conv_in.weight
    assert torch.equal(conv[:, :4], load_file(tiny / "unet/diffusion_pytorch_model.safetensors")["conv_in.weight"])
    adapter = load_file(tiny / "motion_adapter/diffusion_pytorch_model.safetensors")["conv_in.weight"]
    assert torch.equal(conv[:, 4:], adapter[:, 4:])


def test_a_place_may_be_in_the_folder_of_the_settings(tmp_path: Path) -> None:
    base = copied(tmp_path)
    (base / "motion_adapter").rename(tmp_path / "adapter")
    model = with_settings(tmp_path, base="./model", motion_adapter="./adapter")
    assert load(model).config.in_channels == 9


def test_a_model_may_be_at_a_url(tmp_path: Path) -> None:
    with_settings(tmp_path / "named")
    assert capabilities(f"file://{tmp_path}/named", None).max_num_frames == 32


def test_a_vae_of_its_own_is_taken_instead_of_the_bases(tiny: Path, tmp_path: Path) -> None:
    own = copied(tmp_path) / "vae"
    weights = load_file(own / "diffusion_pytorch_model.safetensors")
    vae = load_vae(model_files(tiny), dtype=torch.float32, device=CPU)
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1
    vae.save_pretrained(own)
    loaded = load_vae(model_files(with_settings(tmp_path / "named", vae=str(own))), dtype=torch.float32, device=CPU)
    assert torch.allclose(loaded.decoder.conv_out.bias, weights["decoder.conv_out.bias"] + 1)


def test_the_vae_is_in_float32_where_the_unet_is_in_float16(tiny: Path) -> None:
    assert load_vae(model_files(tiny), dtype=torch.float16, device=CPU).dtype == torch.float32
    assert load_vae(model_files(tiny), dtype=torch.bfloat16, device=CPU).dtype == torch.bfloat16


def test_free_u_is_set_for_the_whole_model(tmp_path: Path) -> None:
    model = with_settings(tmp_path / "named", free_u={"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4})
    assert {block.b1 for block in load(model).up_blocks} == {1.2}


def test_half_weights_are_read_where_there_are_no_others(tiny: Path, tmp_path: Path) -> None:
    model = copied(tmp_path)
    for part in ("unet", "motion_adapter"):
        file = model / part / "diffusion_pytorch_model.safetensors"
        file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert same_weights(load(model), load(tiny))


def test_a_text_encoder_in_half_precision_is_read_where_there_is_no_other(tiny: Path, tmp_path: Path) -> None:
    def encoded(source: Path) -> torch.Tensor:
        return TextEncoder(source, dtype=torch.float32, device=CPU).encode("a cat")

    model = copied(tmp_path)
    file = model / "text_encoder" / "model.safetensors"
    halved = {name: tensor.half() for name, tensor in load_file(file).items()}
    save_file(halved, file.with_name("model.fp16.safetensors"), metadata={"format": "pt"})
    assert torch.equal(encoded(model), encoded(tiny))  # the others are there, and taken
    file.unlink()
    assert not torch.equal(encoded(model), encoded(tiny))
    assert torch.allclose(encoded(model), encoded(tiny), atol=0.02)


def test_each_part_needs_its_own_folders_only(tmp_path: Path) -> None:
    model = copied(tmp_path)
    for file in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        (model / file).unlink()
    assert load(model).config.in_channels == 9


def test_an_adapter_of_animate_diff_is_refused_without_its_weights(tiny: Path, tmp_path: Path) -> None:
    tiny_adapter(conv_in_channels=None).save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"plain/config.json: conv_in_channels=None: must be 9"):
        capabilities(with_settings(tmp_path / "named", motion_adapter=str(tmp_path / "plain")), None)


def test_a_merged_unet_of_animate_diff_is_refused(merged: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(merged, tmp_path / "merged"))
    change(model / "unet" / "config.json", in_channels=4)
    with pytest.raises(CheckpointError, match=r"unet/config.json: in_channels=4: must be 9"):
        capabilities(model, None)


def test_a_base_for_inpainting_is_refused(tmp_path: Path) -> None:
    model = copied(tmp_path)
    change(model / "unet" / "config.json", in_channels=9)
    with pytest.raises(CheckpointError, match=r"in_channels=9: must be 4 in a base model; one for inpainting"):
        capabilities(model, None)


def test_a_base_without_an_adapter_says_where_one_was_looked_for(tmp_path: Path) -> None:
    model = copied(tmp_path)
    shutil.rmtree(model / "motion_adapter")
    change(model / "model_index.json", _class_name="PIAPipeline")
    with pytest.raises(CheckpointError, match="no motion adapter: looked for motion_adapter/"):
        capabilities(model, None)


def test_an_adapter_of_other_sizes_is_refused(tmp_path: Path) -> None:
    import diffusers

    diffusers.MotionAdapter(
        block_out_channels=(8, 8, 8),
        motion_layers_per_block=2,
        motion_norm_num_groups=2,
        motion_num_attention_heads=4,
        conv_in_channels=9,
    ).save_pretrained(tmp_path / "larger")
    with pytest.raises(CheckpointError, match=r"larger: does not fit the UNet of .*different number of blocks"):
        load(with_settings(tmp_path / "named", motion_adapter=str(tmp_path / "larger")))


def test_weights_that_are_missing_or_broken_are_refused_by_folder(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = copied(tmp_path)
    file = model / "motion_adapter" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({name: tensor for name, tensor in weights.items() if name != "conv_in.weight"}, file)
    with pytest.raises(CheckpointError, match=r"motion_adapter: .*conv_in.weight"):
        load(model)
    file.write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="motion_adapter: cannot be loaded"):
        load(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": "x"}, r"pyramid_serve.json: adapter: Extra inputs are not permitted"),
        ({"num_inference_steps": 0}, "num_inference_steps: Input should be greater than or equal to 1"),
        ({"personalised": "yes"}, "personalised: Input should be a valid boolean"),
        ({"free_u": {"s1": 1}}, r"free_u.s2: Field required; free_u.b1: Field required"),
        ({"base": "./nowhere"}, "no such folder"),
    ],
)
def test_settings_that_are_wrong_are_refused_by_name(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        capabilities(with_settings(tmp_path / "named", **settings), None)


@pytest.mark.parametrize(
    ("part", "changed", "message"),
    [
        ("unet", {"_class_name": "UNet3D"}, "_class_name='UNet3D': must be UNet2DConditionModel or UNetMotionModel"),
        ("unet", {"sample_size": 10**9}, "sample_size=1000000000: must be a whole number from 1 to 1024"),
        ("vae", {"block_out_channels": 8}, "block_out_channels=8: must be a list"),
        ("motion_adapter", {"motion_max_seq_length": None}, "motion_max_seq_length=None: must be a whole number"),
        ("motion_adapter", {"motion_max_seq_length": 4}, "motion_max_seq_length=4: must be at least 8"),
    ],
)
def test_configs_that_cannot_be_are_refused_by_key(
    tmp_path: Path, part: str, changed: dict[str, Any], message: str
) -> None:
    model = copied(tmp_path)
    change(model / part / "config.json", **changed)
    with pytest.raises(CheckpointError, match=message):
        capabilities(model, None)


def test_there_are_no_variants(tiny: Path) -> None:
    with pytest.raises(CheckpointError, match="variant='768p': a model of PIA has no variants"):
        capabilities(tiny, "768p")


def test_what_a_model_can_make_is_read_from_its_configs(tiny: Path) -> None:
    able = capabilities(tiny, None)
    assert (able.latent_factor, able.side_multiple, able.long_edge, able.max_num_frames) == (2, 4, 16, 32)
    assert (able.max_clip_skip, able.timestep_spacing, able.dtype) == (3, None, None)
    assert json.loads((tiny / "scheduler/scheduler_config.json").read_text())["beta_schedule"] == "scaled_linear"


def test_a_vae_of_another_kind_is_refused(tmp_path: Path) -> None:
    model = copied(tmp_path)
    change(model / "vae" / "config.json", latent_channels=16)
    with pytest.raises(CheckpointError, match="latent_channels=16: must be 4"):
        capabilities(model, None)


def test_a_settings_file_may_name_the_base_alone(tmp_path: Path) -> None:
    (tmp_path / "pyramid_serve.json").write_text(json.dumps({"base": str(CHECKPOINT), "motion_adaptor": "x"}))
    assert family_of(tmp_path).name == "pia"
    with pytest.raises(CheckpointError, match="motion_adaptor"):
        capabilities(tmp_path, None)
    (tmp_path / "pyramid_serve.json").write_text(json.dumps({"base": str(CHECKPOINT), "long_edge": 32}))
    assert capabilities(tmp_path, None).long_edge == 32
