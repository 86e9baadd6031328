"""The VAE compiles between its convolutions, once for all sizes. On a CPU, which computes it plainly otherwise."""

import re
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from pyramid_serve.pyramid_flow.autoencoder import CausalVideoVAE, from_config
from pyramid_serve.pyramid_flow.causal_conv import Conv3d
from pyramid_serve.pyramid_flow.compiled import compile_vae
from pyramid_serve.pyramid_flow.vae_blocks import FrameGroupNorm
from tests.unit.pyramid_flow.test_autoencoder import CONFIG


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def vae() -> CausalVideoVAE:
    torch.manual_seed(0)
    return from_config(CONFIG).eval().requires_grad_(False)


@torch.inference_mode()
def test_one_compilation_serves_all_sizes_and_no_convolution_reorders_its_input(
    vae: CausalVideoVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [
        torch.randn(1, 16, 2, height, width) for height, width in ((5, 7), (8, 8), (16, 8))
    ]  # (5, 7): as warmed up
    exact = [vae.decode(latents) for latents in sizes]
    channels_last: dict[Conv3d, bool] = {}
    convolve = Conv3d.forward

    def watched(conv: Conv3d, x: torch.Tensor) -> torch.Tensor:
        channels_last[conv] = x.is_contiguous(memory_format=torch.channels_last_3d)
        return convolve(conv, x)

    monkeypatch.setattr(Conv3d, "forward", watched)
    compile_vae(vae, backend="eager")
    counters.clear()
    torch.testing.assert_close(vae.decode(sizes[0]), exact[0], atol=1e-5, rtol=1e-5)
    after_one_size = counters["stats"]["unique_graphs"]
    for latents, frames in zip(sizes[1:], exact[1:], strict=True):
        torch.testing.assert_close(vae.decode(latents), frames, atol=1e-5, rtol=1e-5)
    assert 0 < counters["stats"]["unique_graphs"] == after_one_size
    assert not counters["graph_break"]
    latents_as_they_come = vae.post_quant_conv.conv
    assert [conv for conv, is_last in channels_last.items() if not is_last] == [latents_as_they_come]
    assert len(channels_last) > 20


@pytest.mark.slow
@torch.inference_mode()
def test_a_compiled_encoder_gives_the_same_moments(vae: CausalVideoVAE) -> None:
    pixels = torch.rand(2, 3, 9, 32, 48) * 2 - 1
    exact = vae.encode(pixels)
    compile_vae(vae, backend="eager")
    torch.testing.assert_close(vae.encode(pixels), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler")
@pytest.mark.parametrize("num_frames", [1, 4])
@torch.inference_mode()
def test_norm_silu_and_the_frames_before_are_two_kernels(num_frames: int) -> None:
    """That of the statistics, and that which writes the next convolution's input."""
    norm = FrameGroupNorm(2, 8)
    x = torch.randn(1, 8, num_frames, 6, 10).contiguous(memory_format=torch.channels_last_3d)
    before = torch.randn(1, 8, 2, 6, 10).contiguous(memory_format=torch.channels_last_3d)
    compiled = torch.compile(norm.activated_after, dynamic=True, fullgraph=True)
    joined, (code,) = run_and_get_code(compiled, before, x)
    torch.testing.assert_close(joined, norm.activated_after(before, x))
    assert joined.is_contiguous(memory_format=torch.channels_last_3d)
    assert 1 <= len(set(re.findall(r"(cpp_fused_\w+) = async_compile", code))) <= 2
