from typing import Any

import pytest
import torch

from pyramid_serve.pyramid_flow.autoencoder import CausalVideoVAE, DecoderMemory, Tiling, from_config
from pyramid_serve.pyramid_flow.causal_conv import Carry

CONFIG = {
    "encoder_out_channels": 16,
    "encoder_block_out_channels": [4, 4, 8, 8],
    "encoder_layers_per_block": [1, 1, 1, 1],
    "encoder_spatial_down_sample": [True, True, True, False],
    "encoder_temporal_down_sample": [True, True, True, False],
    "encoder_norm_num_groups": 2,
    "decoder_block_out_channels": [4, 4, 8, 8],
    "decoder_layers_per_block": [1, 2, 1, 1],
    "decoder_spatial_up_sample": [True, True, True, False],
    "decoder_temporal_up_sample": [True, True, True, False],
    "decoder_norm_num_groups": 2,
}


@pytest.fixture(scope="module")
def vae() -> CausalVideoVAE:
    torch.manual_seed(0)
    return from_config(CONFIG).eval().requires_grad_(False)


def decoded_in_one_chunk(vae: CausalVideoVAE, latents: torch.Tensor) -> torch.Tensor:
    """All latent frames through the network at once, which is what unit by unit must equal."""
    carry = Carry(None)
    return vae.decoder(vae.post_quant_conv(latents, carry), carry)


def test_streamed_decode_equals_the_whole(vae: CausalVideoVAE) -> None:
    latents = torch.randn(1, 16, 4, 8, 12)
    assert torch.allclose(vae.decode(latents), decoded_in_one_chunk(vae, latents), atol=1e-5)


def test_a_unit_gives_one_frame_first_and_eight_then(vae: CausalVideoVAE) -> None:
    shapes = [tuple(frames.shape) for frames in vae.decode_units(torch.randn(2, 16, 3, 4, 8))]
    assert shapes == [(2, 3, 1, 32, 64), (2, 3, 8, 32, 64), (2, 3, 8, 32, 64)]


@pytest.mark.parametrize("tiling", [None, Tiling(32)])
def test_stacked_videos_equal_each_alone_bit_for_bit(vae: CausalVideoVAE, tiling: Tiling | None) -> None:
    latents = torch.randn(3, 16, 3, 8, 12)
    alone = torch.cat([vae.decode(one[None], tiling=tiling) for one in latents])
    memories: list[DecoderMemory | None] = [None] * 3
    for t in range(3):
        memory = DecoderMemory.stack([m for m in memories if m]) if t else None
        frames, memory = vae.decode_unit(latents[:, :, t : t + 1], memory, tiling=tiling)
        memories = list(memory.unstack())
        first = 0 if t == 0 else 8 * t - 7
        assert torch.equal(frames, alone[:, :, first : first + frames.shape[2]])


def test_stacked_videos_in_bfloat16_equal_each_alone_bit_for_bit() -> None:
    torch.manual_seed(0)
    vae = from_config(CONFIG).to(torch.bfloat16).eval().requires_grad_(False)
    latents = torch.randn(3, 16, 2, 2, 2)
    alone = torch.cat([vae.decode(one[None]) for one in latents])
    assert torch.equal(vae.decode(latents), alone)


def test_a_memory_of_fewer_videos_is_refused(vae: CausalVideoVAE) -> None:
    latents = torch.randn(2, 16, 1, 4, 4)
    _, memory = vae.decode_unit(latents[:1], None)
    with pytest.raises(ValueError, match="memory: of 1 videos, but the latents are of 2"):
        vae.decode_unit(latents, memory)


def test_unstacked_memories_share_nothing(vae: CausalVideoVAE) -> None:
    _, memory = vae.decode_unit(torch.randn(2, 16, 1, 4, 4), None)
    first, second = memory.unstack()
    assert first.num_bytes + second.num_bytes == memory.num_bytes
    assert sum(x.untyped_storage().nbytes() for (x,) in first.layers) == first.num_bytes


def test_memory_may_lie_on_another_device(vae: CausalVideoVAE) -> None:
    latents, meta = torch.randn(1, 16, 1, 8, 8), torch.device("meta")
    _, memory = vae.decode_unit(latents, None)
    with meta:
        elsewhere = from_config(CONFIG)
    frames, after = elsewhere.decode_unit(latents.to(meta), memory)
    assert frames.shape == (1, 3, 8, 64, 64)
    assert {x.device for layer in after.layers for x in layer} == {meta}
    carry = Carry(None, keep_on=meta)
    joined = carry.prepend(latents, num_padding=2, num_kept=2)
    assert joined.device == latents.device
    assert carry.memory()[0][0].device == meta


def test_memory_does_not_grow_with_the_video(vae: CausalVideoVAE) -> None:
    memory, sizes = None, []
    for latents in torch.randn(1, 16, 6, 4, 4).split(1, dim=2):
        _, memory = vae.decode_unit(latents, memory)
        sizes.append(memory.num_bytes)
    assert len(set(sizes)) == 1


def test_decoding_leaves_nothing_on_the_module(vae: CausalVideoVAE) -> None:
    latents = torch.randn(1, 16, 2, 4, 4)
    before = vae.decode(latents)
    vae.decode_unit(torch.randn(1, 16, 1, 8, 8), None)
    assert torch.equal(vae.decode(latents), before)


def test_clip_encodes_to_the_moments_of_its_length(vae: CausalVideoVAE) -> None:
    moments = vae.encode(torch.rand(2, 3, 17, 32, 64) * 2 - 1)
    assert moments.mean.shape == moments.logvar.shape == (2, 16, 3, 4, 8)
    assert moments.mean.dtype == torch.float32


def test_the_first_frames_latent_does_not_depend_on_what_follows(vae: CausalVideoVAE) -> None:
    pixels = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    assert torch.allclose(vae.encode(pixels).mean[:, :, :1], vae.encode(pixels[:, :, :1]).mean, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 40), (72, 104)])
def test_tiles_are_as_large_as_the_whole(vae: CausalVideoVAE, height: int, width: int) -> None:
    pixels = torch.rand(1, 3, 1, height, width) * 2 - 1
    mean = vae.encode(pixels, tiling=Tiling(32)).mean
    assert mean.shape == (1, 16, 1, height // 8, width // 8)
    assert vae.decode(mean, tiling=Tiling(32)).shape == pixels.shape


def test_a_tile_that_holds_the_whole_changes_nothing(vae: CausalVideoVAE) -> None:
    latents = torch.randn(1, 16, 2, 4, 8)
    assert torch.equal(vae.decode(latents, tiling=Tiling(64)), vae.decode(latents))


@pytest.mark.parametrize("size", [0, 8, 100, -32, 64.0, True, "64", None, float("nan")])
def test_a_tile_of_a_wrong_size_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match=f"tiling={size!r}"):
        Tiling(size)


@pytest.mark.parametrize("shape", [(1, 3, 8, 32, 32), (1, 3, 1, 33, 32), (1, 4, 1, 32, 32), (3, 1, 32, 32)])
def test_wrong_pixels_are_refused(vae: CausalVideoVAE, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"num_frames|pixels"):
        vae.encode(torch.zeros(shape))


def test_wrong_latents_are_refused(vae: CausalVideoVAE) -> None:
    with pytest.raises(ValueError, match="latents"):
        vae.decode_unit(torch.zeros(1, 16, 2, 4, 4), None)


def test_memory_made_with_another_tiling_is_refused(vae: CausalVideoVAE) -> None:
    _, memory = vae.decode_unit(torch.zeros(1, 16, 1, 8, 8), None)
    with pytest.raises(ValueError, match="memory"):
        vae.decode_unit(torch.zeros(1, 16, 1, 8, 8), memory, tiling=Tiling(32))


def test_a_config_with_another_compression_is_refused() -> None:
    with pytest.raises(ValueError, match="decoder_temporal_up_sample: compresses 4 times"):
        from_config({**CONFIG, "decoder_temporal_up_sample": [True, True, False, False]})
