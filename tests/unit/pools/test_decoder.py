"""The Decoder deployment in this process, with the family of noise."""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from deployments.errors import DeviceFailedError
from deployments.pools.decoder import Decoder, DecoderConfig
from deployments.pools.tensors import to_wire
from deployments.pools.wire import DecodeJob
from pyramid_serve.families import Decoded
from tests.families.noise import Decode, DecodeRequest, NoiseFamily
from tests.unit.media.pictures_at_hand import file_of, gradient

pytestmark = pytest.mark.asyncio


class HeldDecode(Decode):
    """Notes the brightness of each unit that it decodes, and goes on when it is let to."""

    def __init__(self) -> None:
        self.decoded: list[int] = []
        self.may_go_on = threading.Event()

    def forward(self, requests: Sequence[DecodeRequest]) -> list[Decoded[None]]:
        self.decoded += [round(10 * float(request.latents.max())) for request in requests]
        self.may_go_on.wait(10)
        return super().forward(requests)


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> HeldDecode:
    part = HeldDecode()
    monkeypatch.setattr(NoiseFamily, "load_decode", lambda *_: part)
    monkeypatch.setattr("deployments.pools.decoder.replica_name", lambda: "decoder")
    monkeypatch.setattr("deployments.pools.decoder.configure_logging", lambda _: None)
    monkeypatch.setattr("deployments.pools.model_config.end_process_soon", lambda: None)
    monkeypatch.setattr("deployments.pools.model_config.os.nice", lambda _: 0)  # it would last for all tests
    return part


def decoder_of(folder: Path, *, max_turn_s: float | None = None) -> Decoder:
    (folder / "noise.json").write_text("{}")
    family = "tests.families.noise:FAMILY"
    return Decoder(DecoderConfig(source=str(folder), family=family, max_batch_size=1, max_turn_s=max_turn_s))


def job_of(number: int, *, submitted_at: float) -> DecodeJob:
    """A unit of the brightness ``number``."""
    return DecodeJob(f"video_{number}", 0, to_wire(torch.full((3, 1, 8, 8), number / 10)), submitted_at)


async def until_decoding(part: HeldDecode) -> None:
    async with asyncio.timeout(10):
        while not part.decoded:
            await asyncio.sleep(0.01)


async def test_units_of_older_videos_go_first_however_late_they_are_asked_for(part: HeldDecode, tmp_path: Path) -> None:
    decoder = decoder_of(tmp_path)
    calls = [asyncio.create_task(decoder.decode_unit(job_of(1, submitted_at=0)))]
    await until_decoding(part)
    for number, submitted_at in ((4, 40.0), (3, 30.0), (2, 20.0)):
        calls.append(asyncio.create_task(decoder.decode_unit(job_of(number, submitted_at=submitted_at))))
        await asyncio.sleep(0)
    part.may_go_on.set()
    await asyncio.gather(*calls)
    assert part.decoded == [1, 2, 3, 4]


async def test_when_its_device_hangs_pictures_and_units_are_refused_and_it_is_unhealthy(
    part: HeldDecode, tmp_path: Path
) -> None:
    decoder = decoder_of(tmp_path, max_turn_s=0.2)
    await decoder.check_health()
    decoding = asyncio.create_task(decoder.decode_unit(job_of(1, submitted_at=0)))
    await until_decoding(part)
    picture = file_of(gradient(), "PNG")
    waiting = [decoder.encode_picture(picture, 48, 64), decoder.forget("video_1")]
    for error in await asyncio.wait_for(asyncio.gather(decoding, *waiting, return_exceptions=True), 5):
        assert isinstance(error, DeviceFailedError)
    for call in (decoder.check_health(), decoder.encode_picture(picture, 48, 64), decoder.forget("video_1")):
        with pytest.raises(DeviceFailedError, match="hangs"):
            await call
    part.may_go_on.set()
