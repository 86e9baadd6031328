"""The TextEncoder deployment in this process, with the family of noise."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import DeviceFailedError
from deployments.pools.text_encoder import TextEncoder, TextEncoderConfig
from pyramid_serve.families import Encoded
from tests.families.noise import NoiseFamily, Text

pytestmark = pytest.mark.asyncio


class HeldText(Text):
    """Goes on with the prompt ``hang`` when it is let to."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()

    def encode(self, prompts: Sequence[str]) -> list[Encoded]:
        if "hang" in prompts:
            self.may_go_on.wait(10)
        return super().encode(prompts)


def each_alone(encode_batch: Callable[[list[str]], Awaitable[list[Any]]]) -> Callable[[str], Awaitable[Any]]:
    """What ``serve.batch`` makes, in batches of one prompt; it works in a replica only."""

    async def encode(prompt: str) -> Any:
        return (await encode_batch([prompt]))[0]

    return encode


async def test_when_its_device_hangs_prompts_are_refused_and_it_is_unhealthy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, failures = HeldText(), list[None]()
    monkeypatch.setattr(NoiseFamily, "load_text", lambda *_: part)
    monkeypatch.setattr("deployments.pools.text_encoder.serve.batch", lambda **_: each_alone)
    monkeypatch.setattr("deployments.pools.text_encoder.replica_name", lambda: "text_encoder")
    monkeypatch.setattr("deployments.pools.text_encoder.configure_logging", lambda _: None)
    monkeypatch.setattr("deployments.pools.model_config.end_process_soon", lambda: failures.append(None))
    monkeypatch.setattr("deployments.pools.model_config.os.nice", lambda _: 0)  # it would last for all tests
    (tmp_path / "noise.json").write_text("{}")
    config = TextEncoderConfig(source=str(tmp_path), family="tests.families.noise:FAMILY", max_turn_s=0.2)
    encoder = TextEncoder(config)
    assert (await encoder.encode("a ball")).tensors
    await encoder.check_health()
    hanging = asyncio.create_task(encoder.encode("hang"))
    await asyncio.sleep(0)  # so that the other prompt waits for it
    for error in await asyncio.wait_for(asyncio.gather(hanging, encoder.encode("b"), return_exceptions=True), 5):
        assert isinstance(error, DeviceFailedError)
    for call in (encoder.check_health(), encoder.encode("c")):
        with pytest.raises(DeviceFailedError, match="hangs"):
            await call
    assert failures == [None]
    part.may_go_on.set()
