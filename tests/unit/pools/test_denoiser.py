"""The Denoiser deployment in this process, with PIA: units that go on from a state, and decoding in its own pool."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.pools.decoder import Decoder, DecoderConfig
from deployments.pools.denoiser import Denoiser, DenoiserConfig
from deployments.pools.tensors import all_to_wire, from_wire
from deployments.pools.wire import DecodeJob, DecodeResult, EncodedPrompt, UnitJob, UnitProgress, UnitResult
from pyramid_serve.api import RequestLimits, VideoRequest
from pyramid_serve.media.pictures import read_picture
from pyramid_serve.pia.whole import load_pipeline
from tests.families.noise import Capabilities as NoiseCapabilities
from tests.families.noise import NoiseFamily
from tests.families.noise import RequestFields as NoiseFields
from tests.unit.metrics_at_hand import Told
from tests.unit.pia.golden import CHECKPOINT, picture
from tests.unit.pia.models_at_hand import picture_file, plan_of

pytestmark = pytest.mark.asyncio

NUM_STEPS = 30


@pytest.fixture(autouse=True)
def _in_this_process(told: Told, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for pool in ("denoiser", "decoder"):
        monkeypatch.setattr(f"deployments.pools.{pool}.replica_name", lambda name=pool: name)
        monkeypatch.setattr(f"deployments.pools.{pool}.configure_logging", lambda _: None)
    monkeypatch.setattr("deployments.pools.denoiser.PROGRESS_INTERVAL_S", 0.005)
    monkeypatch.setattr("deployments.pools.model_config.os.nice", lambda _: 0)  # it would last for all tests
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def denoiser_of(**settings: Any) -> Denoiser:
    fields = {"state_interval_s": 1e-6, "num_threads": 1, **settings}
    return Denoiser(DenoiserConfig(source=str(CHECKPOINT), dtype="float32", device="cpu", **fields))


@pytest.fixture(scope="module")
def job() -> UnitJob:
    plan = plan_of(num_inference_steps=NUM_STEPS // 2, num_frames=8, guidance_scale=1, free_init={"num_iters": 2})
    pipeline = load_pipeline(CHECKPOINT, variant=None, dtype="float32", device="cpu")
    prompt, negative = (EncodedPrompt(all_to_wire(each.tensors)) for each in pipeline.text.encode(["a cat", ""]))
    condition = pipeline.decode.encode_picture(picture(), height=plan.height, width=plan.width)
    return UnitJob("video_1", 0, plan, prompt, negative, (), time.time(), all_to_wire(condition))


async def made(denoiser: Denoiser, job: UnitJob) -> tuple[list[UnitProgress], UnitResult]:
    *progress, result = [item async for item in denoiser.denoise_unit(job)]
    assert isinstance(result, UnitResult)
    return [item for item in progress if isinstance(item, UnitProgress)], result


async def test_a_unit_goes_on_in_another_replica_from_any_state_with_the_same_bits(job: UnitJob, told: Told) -> None:
    progress, whole = await made(denoiser_of(), job)
    states = [item.state for item in progress if item.state is not None]
    assert len(states) > 3
    assert progress[0] == UnitProgress(0, NUM_STEPS)
    another = denoiser_of()
    for state in (states[0], states[len(states) // 2]):  # the last one may be that of the last step
        before = (await another.stats()).num_slots
        again, result = await made(another, replace(job, state=state))
        first_step = again[0].step
        assert [item.step for item in again] == sorted(item.step for item in again)
        assert first_step > 0 and (await another.stats()).num_slots - before == NUM_STEPS - first_step
        assert torch.equal(from_wire(result.latents), from_wire(whole.latents)) and result.num_steps == NUM_STEPS
        assert told.of("pyramid_serve_steps_restored")[-1] == first_step
    assert told.of("pyramid_serve_unit_states", outcome="restored") == [1, 1]


async def test_a_state_that_is_refused_costs_the_unit_its_first_steps_only(
    job: UnitJob, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    denoiser = denoiser_of(state_interval_s=0)
    _, whole = await made(denoiser, job)
    progress, result = await made(denoiser, replace(job, state=b"no state"))
    assert progress[0].step == 0
    assert torch.equal(from_wire(result.latents), from_wire(whole.latents))
    assert told.of("pyramid_serve_unit_states", outcome="refused") == [1]
    assert "unit 0 is made from its start: state: damaged, or of another plan, model or release" in caplog.messages


async def test_no_states_are_handed_out_where_they_are_switched_off(job: UnitJob) -> None:
    progress, _ = await made(denoiser_of(state_interval_s=0), job)
    assert len(progress) > 3 and not any(item.state for item in progress)


async def test_a_family_whose_units_have_no_states_is_given_none(
    tmp_path: Path, told: Told, job: UnitJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "noise.json").write_text("{}")
    monkeypatch.setattr("tests.families.noise.SECONDS_A_STEP", {"noise": 0.02})
    config = DenoiserConfig(source=str(tmp_path), family="tests.families.noise:FAMILY", state_interval_s=1e-6)
    plan = NoiseFamily().plan(
        VideoRequest(prompt="noise", seed=1),
        NoiseFields(),
        model="noise",
        capabilities=NoiseCapabilities(),
        limits=RequestLimits(),
    )
    nothing = EncodedPrompt({})
    job = replace(job, plan=plan, prompt=nothing, negative_prompt=nothing, picture=None, state=b"of an earlier release")
    progress, _ = await made(Denoiser(config), job)
    assert progress[0].step == 0 and len(progress) > 1 and not any(item.state for item in progress)
    assert told.of("pyramid_serve_unit_states", outcome="refused") == []


async def test_a_video_of_two_pools_has_the_frames_of_the_library(job: UnitJob) -> None:
    decoder = Decoder(DecoderConfig(source=str(CHECKPOINT), dtype="float32", device="cpu", num_threads=1))
    pipeline = load_pipeline(CHECKPOINT, variant=None, dtype="float32", device="cpu")
    given = picture_file(32, 16)
    (expected,) = pipeline.stream(job.plan, picture=read_picture(given))
    condition = await decoder.encode_picture(given, job.plan.height, job.plan.width)
    _, made_here = await made(denoiser_of(), replace(job, picture=condition))
    result = await decoder.decode_unit(DecodeJob("video_1", 0, made_here.latents, time.time(), is_last=True))
    assert isinstance(result, DecodeResult) and not result.keeps_memory
    assert torch.equal(torch.from_numpy(result.frames), expected)
    assert (await decoder.stats()).num_memories == 0
