"""What needs a CUDA device: attention and convolutions at full size, with random numbers in bfloat16."""

import json
from pathlib import Path

import pytest
import torch

from pyramid_serve.pyramid_flow.attention import Attention, block_attention, compiled_flex_attention, dense_attention
from pyramid_serve.pyramid_flow.autoencoder import CausalVideoVAE, from_config
from pyramid_serve.pyramid_flow.causal_conv import CausalConv3d
from pyramid_serve.pyramid_flow.compiled import compile_vae
from pyramid_serve.pyramid_flow.pack import SequenceShape, layout_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PUBLISHED = Path(__file__).parents[1] / "published"

# Text, history and the unit at 640x384 (a frame of 40 x 24 tokens at the full stage), of several videos, stages, units.
PACKS = [
    tuple(
        SequenceShape(num_text, ((unit, 6, 10), (1, 12, 20), (1, 24, 40)) if unit else ((1, 24, 40),))
        for num_text, unit in videos
    )
    for videos in (
        [(77, 14)],
        [(77, 14), (128, 14)],
        [(1, 0), (128, 3)],
        [(30, 7), (99, 0), (128, 1)],
        [(64, 2)] * 4,
        [(13, 5)],
        [(14, 6), (15, 7)],
        [(128, 29)],
        [(127, 9), (2, 10)],
        [(5, 1), (6, 0), (7, 12), (8, 0), (9, 4)],
    )
]


@pytest.mark.parametrize("attention", [compiled_flex_attention, block_attention])
@pytest.mark.parametrize(("num_heads", "head_size"), [(24, 64), (30, 64)])
@torch.inference_mode()
def test_fast_attention_equals_the_dense_one_at_full_size(attention: Attention, num_heads: int, head_size: int) -> None:
    """Element by element and not through a model, whose gates are so small at first that hardly any of it shows."""
    generator = torch.Generator("cuda").manual_seed(0)
    for shapes in PACKS:  # more lengths in one process than the compiler would take one by one
        layout = layout_of(shapes, torch.device("cuda"))
        size = (3, layout.num_tokens, num_heads, head_size)
        q, k, v = torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=generator).unbind(0)
        exact = dense_attention(q.float(), k.float(), v.float(), layout)
        torch.testing.assert_close(attention(q, k, v, layout).float(), exact, atol=2e-2, rtol=2e-2)


@torch.inference_mode()
def test_a_convolution_of_more_than_2_to_the_31_numbers_is_that_of_its_halves() -> None:
    """The decoder's last layers at 1280x768: 256 channels of 10 frames."""
    width, height = 1280, 768
    conv = CausalConv3d(256, 128).to("cuda", torch.bfloat16).conv
    x = torch.randn(1, 256, 10, height, width, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    whole, middle = conv(x), height // 2
    upper, lower = conv(x[..., : middle + 1, :])[..., :middle, :], conv(x[..., middle - 1 :, :])[..., 1:, :]
    torch.testing.assert_close(whole[..., :middle, :], upper, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(whole[..., middle:, :], lower, atol=2e-2, rtol=2e-2)


def vae_of_published_size() -> CausalVideoVAE:
    torch.manual_seed(0)
    config = json.loads((PUBLISHED / "causal_video_vae_config.json").read_text())
    with torch.device("cuda"):
        return from_config(config).bfloat16().eval()


@torch.inference_mode()
def test_a_compiled_decoder_gives_the_frames_of_the_plain_one() -> None:
    vae, latents = vae_of_published_size(), torch.randn(1, 16, 3, 48, 80, device="cuda")
    exact = vae.decode(latents)
    compile_vae(vae)
    torch.testing.assert_close(vae.decode(latents), exact, atol=3e-2, rtol=3e-2)


@torch.inference_mode()
def test_a_memory_that_was_in_host_memory_gives_the_same_bits() -> None:
    vae, latents = vae_of_published_size(), torch.randn(1, 16, 2, 48, 80, device="cuda")
    _, memory = vae.decode_unit(latents[:, :, :1], None)
    in_host_memory = memory.to("cpu")
    expected, _ = vae.decode_unit(latents[:, :, 1:], memory)  # while the copy goes on
    frames, _ = vae.decode_unit(latents[:, :, 1:], in_host_memory)
    assert torch.equal(frames, expected)
    for layer, own in zip(memory.layers, in_host_memory.layers, strict=True):
        assert all(map(torch.equal, (x.cpu() for x in layer), own))
