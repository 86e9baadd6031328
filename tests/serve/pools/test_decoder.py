import asyncio
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from deployments.pools.decoder import Decoder, DecoderConfig
from deployments.pools.tensors import from_wire, to_wire
from deployments.pools.wire import DecodeJob, DecodeResult, MemoryMissing
from deployments.telemetry.forwards import ReplicaStats
from pyramid_serve.media.tensors import fit_picture
from pyramid_serve.pyramid_flow.autoencoder import CausalVideoVAE
from pyramid_serve.pyramid_flow.codec import decode_unit, encode_picture
from pyramid_serve.pyramid_flow.parts import LatentScale, latent_scale_of, load_vae
from tests.serve.conftest import deployed, quick

pytestmark = pytest.mark.asyncio

Handle = Any


@pytest.fixture(scope="module")
def decoder(local_ray: None, miniflux: Path) -> Iterator[Handle]:
    config = DecoderConfig(source=str(miniflux), dtype="float32", max_batch_size=4)
    with deployed(quick(Decoder, max_ongoing_requests=16).bind(config), "decoder") as handle:
        yield handle


@pytest.fixture(scope="module")
def vae(miniflux: Path) -> CausalVideoVAE:
    return load_vae(miniflux)


@pytest.fixture(scope="module")
def scale(miniflux: Path) -> LatentScale:
    return latent_scale_of(miniflux)


@pytest.fixture(scope="module")
def latents() -> Tensor:
    """Three units: (16, 3, 8, 8)."""
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def frames(vae: CausalVideoVAE, scale: LatentScale, latents: Tensor) -> list[Tensor]:
    """What the library's loop decodes those to."""
    decoded, memory = [], None
    for unit in latents.split(1, dim=1):
        with torch.inference_mode():
            unit_frames, memory = decode_unit(vae, scale, unit[None], memory)
        decoded.append(unit_frames[0])
    return decoded


def job_of(video_id: str, latents: Tensor, unit: int, *, with_earlier: bool = False) -> DecodeJob:
    units = [to_wire(one) for one in latents.split(1, dim=1)]
    return DecodeJob(video_id, unit, units[unit], 0.0, earlier=tuple(units[:unit]) if with_earlier else None)


def assert_same_frames(result: DecodeResult, expected: Tensor) -> None:
    assert torch.equal(torch.from_numpy(result.frames.copy()), expected)


async def test_a_video_decoded_unit_by_unit_is_that_of_the_library(
    decoder: Handle, latents: Tensor, frames: list[Tensor]
) -> None:
    for unit, expected in enumerate(frames):
        result = await decoder.decode_unit.remote(job_of("whole", latents, unit))
        assert_same_frames(result, expected)
        assert (result.batch_size, result.rebuilt_units) == (1, 0)
        assert result.started < result.ended


async def test_a_memory_that_is_not_there_is_told_and_then_made_again(
    decoder: Handle, latents: Tensor, frames: list[Tensor]
) -> None:
    missing = await decoder.decode_unit.remote(job_of("stranger", latents, 2))
    assert isinstance(missing, MemoryMissing)
    assert (missing.video_id, missing.unit) == ("stranger", 2)
    result = await decoder.decode_unit.remote(job_of("stranger", latents, 2, with_earlier=True))
    assert result.rebuilt_units == 2
    assert_same_frames(result, frames[2])


async def test_units_of_several_videos_share_forwards(decoder: Handle, latents: Tensor, frames: list[Tensor]) -> None:
    videos = [f"shared_{number}" for number in range(6)]
    batch_sizes = []
    for unit, expected in enumerate(frames):
        jobs = [decoder.decode_unit.remote(job_of(video, latents, unit)) for video in videos]
        for result in await asyncio.gather(*jobs):
            assert_same_frames(result, expected)
            batch_sizes.append(result.batch_size)
    assert 2 <= max(batch_sizes) <= 4


async def test_a_forgotten_video_frees_its_memory(decoder: Handle, latents: Tensor) -> None:
    before: ReplicaStats = await decoder.stats.remote()
    await decoder.decode_unit.remote(job_of("forgotten", latents, 0))
    there: ReplicaStats = await decoder.stats.remote()
    assert there.num_memories == before.num_memories + 1
    assert there.memory_bytes > before.memory_bytes
    await decoder.forget.remote("forgotten")
    after: ReplicaStats = await decoder.stats.remote()
    assert (after.num_memories, after.memory_bytes) == (before.num_memories, before.memory_bytes)


async def test_a_caller_that_leaves_frees_its_slot(decoder: Handle) -> None:
    long = torch.randn(16, 40, 8, 8)
    response = decoder.decode_unit.remote(job_of("left", long, 39, with_earlier=True))
    deadline = time.monotonic() + 5
    while not (await decoder.stats.remote()).num_present:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    response.cancel()
    while (await decoder.stats.remote()).num_present:
        assert time.monotonic() < deadline, "the slot is still there"
        await asyncio.sleep(0.01)


async def test_a_picture_is_encoded_as_by_the_library(decoder: Handle, vae: CausalVideoVAE, scale: LatentScale) -> None:
    picture = Image.effect_mandelbrot((150, 100), (-2, -1, 1, 1), 50).convert("RGB")
    file = io.BytesIO()
    picture.save(file, format="PNG")
    tensors = await decoder.encode_picture.remote(file.getvalue(), height=64, width=128)
    latents = from_wire(tensors["latents"])
    with torch.inference_mode():
        expected = encode_picture(vae, scale, fit_picture(picture, height=64, width=128))
    assert torch.equal(latents, expected)


async def test_bytes_that_are_no_picture_are_refused(decoder: Handle) -> None:
    with pytest.raises(ValueError, match="picture: not a readable image"):
        await decoder.encode_picture.remote(b"not a picture", height=64, width=128)


async def test_latents_of_another_shape_are_refused(decoder: Handle) -> None:
    with pytest.raises(ValueError, match=r"latents: shape \(4, 1, 8, 8\)"):
        await decoder.decode_unit.remote(job_of("bad", torch.zeros(4, 1, 8, 8), 0))
