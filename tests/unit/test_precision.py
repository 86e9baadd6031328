"""Which dtype a device gets, and that numbers which are none are found."""

import logging
import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from pyramid_serve import precision
from pyramid_serve.errors import NonFiniteError
from pyramid_serve.precision import check_finite, choose_dtype, first_non_finite_layer, suitable_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def cpu_with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_library_has", lambda dtype: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


@pytest.fixture
def cpu_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_library_has", lambda dtype: False)


def test_a_cpu_with_bfloat16_instructions_gets_it(cpu_with_bfloat16: None) -> None:
    assert suitable_dtype(CPU).dtype == torch.bfloat16
    assert suitable_dtype(CPU, "bfloat16").dtype == torch.bfloat16
    assert suitable_dtype(CPU, "float16").dtype == torch.bfloat16


def test_a_checkpoint_that_prefers_float32_gets_it_on_any_cpu(cpu_with_bfloat16: None) -> None:
    assert suitable_dtype(CPU, "float32").dtype == torch.float32


@pytest.mark.parametrize("preferred", [None, "bfloat16", "float16", "float32"])
def test_a_cpu_without_bfloat16_gets_float32(cpu_without_bfloat16: None, preferred: precision.DTypeName | None) -> None:
    assert suitable_dtype(CPU, preferred).dtype == torch.float32


def test_avx512_alone_is_not_enough(cpu_with_bfloat16: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert suitable_dtype(CPU, "bfloat16").dtype == torch.float32


@pytest.mark.parametrize("machine", ["aarch64", "arm64"])
def test_arm_gets_float32(cpu_with_bfloat16: None, monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert suitable_dtype(CPU, "bfloat16").dtype == torch.float32


def test_torch_without_its_cpu_library_gets_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert suitable_dtype(CPU).dtype == torch.float32


def test_a_gpu_gets_what_the_checkpoint_prefers(cpu_without_bfloat16: None) -> None:
    assert suitable_dtype(CUDA).dtype == torch.bfloat16
    assert suitable_dtype(CUDA, "float16").dtype == torch.float16
    assert suitable_dtype(CUDA, "float32").dtype == torch.float32


def test_a_dtype_asked_for_that_is_slow_here_is_used_with_one_warning(
    cpu_without_bfloat16: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_dtype(CPU, asked="bfloat16", preferred="float32").dtype == torch.bfloat16
    (record,) = caplog.records
    assert "dtype=bfloat16 is slow here" in record.message


def test_a_dtype_asked_for_that_is_fast_here_is_used_without_a_word(
    cpu_with_bfloat16: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_dtype(CPU, asked=torch.bfloat16).dtype == torch.bfloat16
        assert choose_dtype(CPU, asked="float32", preferred="bfloat16").dtype == torch.float32
    assert not caplog.records


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype=int8: must be float32, bfloat16 or float16"):
        choose_dtype(CPU, asked=torch.int8)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the limit is one for x86")
def test_a_processor_limited_to_avx2_gets_float32() -> None:
    program = (
        "import torch; from pyramid_serve.precision import suitable_dtype; print(suitable_dtype(torch.device('cpu')))"
    )
    limited = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", program], env=limited, capture_output=True, text=True, check=True)
    assert "torch.float32" in done.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (float("-inf"), "infinity")]
)
def test_a_single_value_that_is_no_number_is_found(dtype: torch.dtype, value: float, kind: str) -> None:
    values = torch.randn(3, 5, 7).to(dtype)
    check_finite(values, "unit 2")
    values[1, 4, 3] = value
    with pytest.raises(NonFiniteError, match=f"unit 2: {kind}"):
        check_finite(values, "unit 2")


def test_nothing_is_finite() -> None:
    check_finite(torch.zeros(16, 0, 4, 4), "no unit yet")


def test_the_layer_at_which_it_begins_is_named() -> None:
    layers = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), nn.Linear(2, 2))
    x = torch.ones(1, 2)
    assert first_non_finite_layer(layers, lambda: layers(x)) is None
    with torch.no_grad():
        layers[1][1].bias.fill_(float("inf"))
    assert first_non_finite_layer(layers, lambda: layers(x)) == "1.1"
    assert not layers[1][1]._forward_hooks
