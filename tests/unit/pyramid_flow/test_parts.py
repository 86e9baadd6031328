import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
import torch

from pyramid_serve.checkpoints.sources import CheckpointError
from pyramid_serve.pyramid_flow.flux import Flux
from pyramid_serve.pyramid_flow.mmdit import MMDiT
from pyramid_serve.pyramid_flow.pack import ClipSequence, PromptEmbeds
from pyramid_serve.pyramid_flow.parts import LatentScale, latent_scale_of, load_transformer, load_vae
from pyramid_serve.pyramid_flow.pipeline import PyramidFlow


def test_the_class_name_tells_the_variant(mmdit: Path, miniflux: Path) -> None:
    assert isinstance(load_transformer(mmdit), MMDiT)
    assert isinstance(load_transformer(miniflux, "384p"), Flux)


def test_a_fused_transformer_takes_other_weights_and_has_those_of_the_file(mmdit: Path) -> None:
    fused, plain = (cast(MMDiT, load_transformer(mmdit, fused=fused)) for fused in (True, False))
    state = plain.state_dict()
    assert all(torch.equal(state[name], value) for name, value in fused.state_dict().items())
    doubled = {name: 2 * value for name, value in state.items()}
    for model in (fused, plain):
        model.load_state_dict(doubled)
    sequence = ClipSequence(
        PromptEmbeds(torch.randn(5, plain.config.text_features), torch.randn(plain.config.pooled_features)),
        (torch.randn(16, 1, 8, 8),),
        500.0,
    )
    with torch.inference_mode():
        assert torch.allclose(fused([sequence])[0], plain([sequence])[0], atol=1e-5)


def test_what_cannot_be_had_together_is_refused(mmdit: Path) -> None:
    with pytest.raises(ValueError, match="compiled='blocks': cannot be had with batch_invariant"):
        PyramidFlow.from_pretrained(mmdit, compiled="blocks", batch_invariant=True)
    with pytest.raises(ValueError, match="compiled='blocks': cannot be had with offload='model'"):
        PyramidFlow.from_pretrained(mmdit, compiled="blocks", offload="model")


def test_an_unknown_class_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "diffusion_transformer_384p").mkdir()
    (tmp_path / "diffusion_transformer_384p" / "config.json").write_text('{"_class_name": "UNet"}')
    with pytest.raises(CheckpointError, match=r"'UNet': must be one of PyramidDiffusionMMDiT, PyramidFluxTransformer"):
        load_transformer(tmp_path)


def test_parts_load_in_the_dtype_asked_for(miniflux: Path) -> None:
    assert load_vae(miniflux, dtype=torch.bfloat16).dtype == torch.bfloat16
    model = load_transformer(miniflux, dtype=torch.float16)
    assert isinstance(model, Flux)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert not any(p.requires_grad for p in model.parameters())


def test_a_denoiser_loads_neither_text_encoders_nor_transformers(miniflux: Path) -> None:
    program = (
        "import sys\n"
        "from pyramid_serve.pyramid_flow.parts import load_transformer\n"
        f"load_transformer({str(miniflux)!r})\n"
        "assert not {'transformers', 'ray', 'diffusers'} & set(sys.modules), set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_scales_are_those_of_the_facts_and_invert(mmdit: Path, miniflux: Path) -> None:
    assert latent_scale_of(mmdit) == LatentScale(0.1490, 1 / 1.8415)
    assert latent_scale_of(miniflux) == LatentScale(-0.04, 1 / 1.8726)
    latents = torch.randn(2, 16, 3, 4, 4)
    scale = latent_scale_of(miniflux)
    assert torch.allclose(scale.from_vae(scale.to_vae(latents)), latents, atol=1e-6)
    assert torch.allclose(scale.to_vae(latents)[:, :, 0], latents[:, :, 0] * 1.8726 - 0.04, atol=1e-6)
    assert torch.allclose(scale.to_vae(latents)[:, :, 1:], latents[:, :, 1:] * 3.0986 - 0.2343, atol=1e-6)


def test_scaling_unit_by_unit_equals_scaling_the_whole(miniflux: Path) -> None:
    scale, latents = latent_scale_of(miniflux), torch.randn(1, 16, 4, 2, 2)
    units = [scale.to_vae(unit, first_unit=i) for i, unit in enumerate(latents.split(1, dim=2))]
    assert torch.equal(torch.cat(units, dim=2), scale.to_vae(latents))
