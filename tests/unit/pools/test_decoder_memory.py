"""What the decoder keeps between calls, and that a unit comes out the same whatever was kept and whoever shared."""

import asyncio
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deployments.pools.decoder import DecoderConfig, check_job, decode_steps
from deployments.pools.decoder_memories import MemoryStore
from deployments.pools.engine import Engine
from deployments.pools.tensors import to_wire
from deployments.pools.wire import DecodeJob
from deployments.telemetry.forwards import Forward
from pyramid_serve.families import Decoded, DecodePart
from pyramid_serve.pyramid_flow.autoencoder import CausalVideoVAE, DecoderMemory
from pyramid_serve.pyramid_flow.codec import decode_unit
from pyramid_serve.pyramid_flow.parts import LatentScale, latent_scale_of, load_vae


def memory_of(num_bytes: int) -> DecoderMemory:
    return DecoderMemory(((torch.zeros(1, num_bytes, dtype=torch.uint8),),))


def keep(store: MemoryStore, video_id: str, unit: int, num_bytes: int = 100) -> None:
    with store.lease(video_id, unit - 1) as lease:
        store.keep(lease, video_id, unit, memory_of(num_bytes))


def kept(store: MemoryStore, video_id: str, unit: int) -> bool:
    with store.lease(video_id, unit) as lease:
        return lease.memory is not None


def test_a_memory_is_found_by_its_video_and_unit_alone() -> None:
    store = MemoryStore(device_budget_bytes=1000, host_budget_bytes=0)
    keep(store, "a", 3)
    assert kept(store, "a", 3)
    assert not kept(store, "a", 2)
    assert not kept(store, "b", 3)


def test_a_newer_unit_takes_the_place_of_the_older() -> None:
    store = MemoryStore(device_budget_bytes=1000, host_budget_bytes=0)
    keep(store, "a", 1)
    keep(store, "a", 2)
    assert not kept(store, "a", 1)
    assert store.device_bytes == 100


def test_the_least_recently_used_go_to_the_host_and_then_away() -> None:
    store = MemoryStore(device_budget_bytes=200, host_budget_bytes=100)
    keep(store, "a", 1)
    keep(store, "b", 1)
    assert kept(store, "a", 1)  # now b is the least recently used
    keep(store, "c", 1)
    assert (store.device_bytes, store.host_bytes) == (200, 100)
    keep(store, "d", 1)
    assert (store.device_bytes, store.host_bytes) == (200, 100)
    assert [video for video in "abcd" if kept(store, video, 1)] == ["a", "c", "d"]


def test_without_a_host_budget_what_is_over_is_dropped() -> None:
    store = MemoryStore(device_budget_bytes=200, host_budget_bytes=0)
    for video in "abc":
        keep(store, video, 1)
    assert [video for video in "abc" if kept(store, video, 1)] == ["b", "c"]
    assert store.host_bytes == 0


def test_a_memory_larger_than_all_budgets_is_not_kept() -> None:
    store = MemoryStore(device_budget_bytes=50, host_budget_bytes=50)
    keep(store, "a", 1)
    assert len(store) == 0


def test_a_memory_under_lease_stays() -> None:
    store = MemoryStore(device_budget_bytes=100, host_budget_bytes=0)
    keep(store, "a", 1)
    with store.lease("a", 1) as lease:
        keep(store, "b", 1)
        keep(store, "c", 1)
        assert lease.memory is not None
        assert kept(store, "a", 1)
    assert store.device_bytes <= 100


def test_forgetting_frees_and_what_is_at_work_keeps_nothing() -> None:
    store = MemoryStore(device_budget_bytes=1000, host_budget_bytes=1000)
    keep(store, "a", 1)
    keep(store, "b", 1)
    with store.lease("a", 1) as lease:
        store.forget("a")
        store.keep(lease, "a", 2, memory_of(100))
    store.forget("never seen")
    assert len(store) == 1
    keep(store, "a", 2)
    assert kept(store, "a", 2)


# --- with a real autoencoder ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae(miniflux: Path) -> CausalVideoVAE:
    return load_vae(miniflux)


@pytest.fixture(scope="module")
def scale(miniflux: Path) -> LatentScale:
    return latent_scale_of(miniflux)


@pytest.fixture(scope="module")
def part(miniflux: Path) -> DecodePart:
    config = DecoderConfig(source=str(miniflux), dtype="float32", device="cpu")
    return config.model_family.load_decode(config.part_source(config.model_family.decode_options))


@pytest.fixture(scope="module")
def latents() -> Tensor:
    """Three units of three videos: (3, 16, 3, 8, 8)."""
    return torch.randn(3, 16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def alone(vae: CausalVideoVAE, scale: LatentScale, latents: Tensor) -> list[list[Tensor]]:
    """Frames of each video, unit by unit, as the library's loop decodes them."""

    def decode(video: Tensor) -> Iterator[Tensor]:
        memory = None
        for unit in video.split(1, dim=1):
            with torch.inference_mode():
                frames, memory = decode_unit(vae, scale, unit[None], memory)
            yield frames[0]

    return [list(decode(video)) for video in latents]


class Decoding:
    """The decoder's engine and its memories, with no deployment around them."""

    def __init__(self, part: DecodePart, latents: Tensor, *, memory_bytes: int = 2**30) -> None:
        self.batches: list[int] = []
        self.memories = MemoryStore(device_budget_bytes=memory_bytes, host_budget_bytes=0)
        self._part = part
        self._latents = latents

        def forward(requests: Sequence[Any]) -> Sequence[Decoded[Any]]:
            self.batches.append(len(requests))
            return part.forward(requests)

        self._engine: Engine[Any, Any] = Engine(forward, packs_with=part.packs_with)

    async def decode(
        self, video: int, unit: int, *, with_earlier: bool = False, is_last: bool = False
    ) -> tuple[Tensor | None, int]:
        """Frames of a unit, and how many forwards it took."""
        forwards: list[Forward] = []
        units = [to_wire(latents) for latents in self._latents[video].split(1, dim=1)]
        earlier = tuple(units[:unit]) if with_earlier else None
        job = DecodeJob(str(video), unit, units[unit], 0.0, earlier=earlier, is_last=is_last)
        steps = decode_steps(job, self.memories, self._part, in_order=True)
        frames = await self._engine.run(steps, submitted_at=unit, on_step=forwards.append)
        return frames, len(forwards)


def assert_same_frames(frames: Tensor | None, expected: Tensor) -> None:
    assert frames is not None
    assert torch.equal(frames, expected)


@pytest.mark.asyncio
async def test_units_decoded_together_come_out_as_alone(
    part: DecodePart, latents: Tensor, alone: list[list[Tensor]]
) -> None:
    decoding = Decoding(part, latents)
    for unit in range(3):
        together = await asyncio.gather(*(decoding.decode(video, unit) for video in range(3)))
        for video, (frames, num_forwards) in enumerate(together):
            assert num_forwards == 1
            assert_same_frames(frames, alone[video][unit])
    assert max(decoding.batches) >= 2


@pytest.mark.asyncio
async def test_nothing_is_kept_of_a_video_after_its_last_unit(
    part: DecodePart, latents: Tensor, alone: list[list[Tensor]]
) -> None:
    decoding = Decoding(part, latents)
    for unit in range(3):
        frames, _ = await decoding.decode(0, unit, is_last=unit == 2)
        assert_same_frames(frames, alone[0][unit])
        assert len(decoding.memories) == (1 if unit < 2 else 0)


@pytest.mark.asyncio
async def test_a_lost_memory_is_made_again_from_the_latents(
    part: DecodePart, latents: Tensor, alone: list[list[Tensor]]
) -> None:
    decoding = Decoding(part, latents, memory_bytes=0)
    await decoding.decode(0, 0)
    assert (await decoding.decode(0, 1))[0] is None
    rebuilt, fresh = await asyncio.gather(decoding.decode(0, 2, with_earlier=True), decoding.decode(1, 0))
    assert rebuilt[1] == 3
    assert_same_frames(rebuilt[0], alone[0][2])
    assert_same_frames(fresh[0], alone[1][0])


@pytest.mark.asyncio
async def test_a_unit_asked_for_again_is_made_again(
    part: DecodePart, latents: Tensor, alone: list[list[Tensor]]
) -> None:
    decoding = Decoding(part, latents)
    await decoding.decode(0, 0)
    await decoding.decode(0, 1)
    frames, num_forwards = await decoding.decode(0, 1, with_earlier=True)
    assert num_forwards == 2
    assert_same_frames(frames, alone[0][1])
    frames, num_forwards = await decoding.decode(0, 2)
    assert num_forwards == 1
    assert_same_frames(frames, alone[0][2])


@pytest.mark.parametrize("shape", [(16, 2, 8, 8), (1, 16, 1, 8, 8), (4, 1, 8, 8)])
def test_latents_of_another_shape_are_refused(part: DecodePart, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"latents: shape {re.escape(str(shape))}, must be \(16, 1, H, W\)"):
        part.request(torch.zeros(shape), None)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (DecodeJob("a", -1, to_wire(torch.zeros(16, 1, 8, 8)), 0.0), "unit=-1"),
        (
            DecodeJob("a", 2, to_wire(torch.zeros(16, 1, 8, 8)), 0.0, (to_wire(torch.zeros(16, 1, 8, 8)),)),
            "earlier: 1 units, must be 2 for unit 2",
        ),
        (
            DecodeJob("a", 1, to_wire(torch.zeros(16, 1, 8, 8)), 0.0, (to_wire(torch.zeros(16, 1, 8, 4)),)),
            r"earlier: shape \(16, 1, 8, 4\), must be \(16, 1, 8, 8\)",
        ),
    ],
)
def test_a_job_that_does_not_fit_is_refused(job: DecodeJob, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_job(job)
