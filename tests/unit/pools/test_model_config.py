from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from deployments.pools.decoder import DecoderConfig
from deployments.pools.denoiser import DenoiserConfig
from deployments.pools.model_config import auto_threads
from deployments.pools.text_encoder import TextEncoderConfig
from pyramid_serve.precision import suitable_dtype

CONFIGS = [DenoiserConfig, DecoderConfig, TextEncoderConfig]


@pytest.mark.parametrize("config", CONFIGS)
def test_an_unknown_setting_is_an_error_that_names_it(config: type[DenoiserConfig]) -> None:
    with pytest.raises(ValidationError, match="token_buget"):
        config.model_validate({"source": "somewhere", "token_buget": 1})


@pytest.mark.parametrize("config", CONFIGS)
def test_the_dtype_follows_the_device_unless_given(config: type[DenoiserConfig], miniflux: Path) -> None:
    source = str(miniflux)
    assert config(source=source, device="cpu").precision.dtype == suitable_dtype(torch.device("cpu")).dtype
    assert config(source=source, device="cuda").precision.dtype == torch.bfloat16
    assert config(source=source, device="cpu", dtype="bfloat16").precision.dtype == torch.bfloat16


def test_the_options_of_a_part_are_checked_by_its_family(miniflux: Path) -> None:
    config = DenoiserConfig(source=str(miniflux), options={"attention": "dense"})
    assert config.part_source(config.model_family.denoise_options).options.attention == "dense"
    with pytest.raises(ValidationError, match="tiling"):
        DenoiserConfig(source=str(miniflux), options={"tiling": 64}).part_source(config.model_family.denoise_options)


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="token_budget"):
        DenoiserConfig(source="somewhere", token_budget=0)


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (3, 2), (5, 4), (64, 4)])
def test_auto_threads_leave_a_core_to_the_other_pools(
    cores: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.pools.model_config.usable_cores", lambda: cores)
    assert auto_threads() == threads
