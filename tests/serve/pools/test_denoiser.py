import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deployments.errors import DeviceFailedError
from deployments.pools.denoiser import Denoiser, DenoiserConfig
from deployments.pools.tensors import all_to_wire, from_wire, to_wire
from deployments.pools.wire import EncodedPrompt, UnitJob, UnitProgress, UnitResult
from deployments.rpc.retry import retried
from deployments.telemetry.forwards import ReplicaStats
from pyramid_serve.api import Plan, RequestLimits, VideoRequest
from pyramid_serve.pyramid_flow.attention import block_attention
from pyramid_serve.pyramid_flow.noise import SeededNoise
from pyramid_serve.pyramid_flow.pack import ClipSequence, PromptEmbeds
from pyramid_serve.pyramid_flow.parts import Transformer, load_transformer
from pyramid_serve.pyramid_flow.planning import settings_of, units_of
from pyramid_serve.pyramid_flow.request_fields import ShownFields
from pyramid_serve.pyramid_flow.sampler import denoise_unit, run_units
from pyramid_serve.pyramid_flow.shapes import LatentShape
from tests.families.noise import Capabilities as NoiseCapabilities
from tests.families.noise import RequestFields as NoiseFields
from tests.serve.conftest import deployed, quick

pytestmark = pytest.mark.asyncio

Handle = Any
WIDTH, HEIGHT, NUM_UNITS = 128, 64, 5
SHAPE = LatentShape.of_pixels(height=HEIGHT, width=WIDTH, num_latent_frames=NUM_UNITS)


@pytest.fixture(scope="module")
def denoiser(local_ray: None, miniflux: Path) -> Iterator[Handle]:
    application = quick(Denoiser, max_ongoing_requests=16).bind(DenoiserConfig(source=str(miniflux), dtype="float32"))
    with deployed(application, "denoiser") as handle:
        yield handle


@pytest.fixture(scope="module")
def transformer(miniflux: Path) -> Transformer:
    return load_transformer(miniflux)


def prompt_of(seed: int) -> PromptEmbeds:
    generator = torch.Generator().manual_seed(seed)
    return PromptEmbeds(torch.randn(5 + seed, 32, generator=generator), torch.randn(48, generator=generator))


def history_of(seed: int, num_units: int) -> Tensor:
    return torch.randn(16, num_units, *SHAPE.size_at(2), generator=torch.Generator().manual_seed(seed))


def plan_of(seed: int, num_steps: int) -> Plan:
    steps = (num_steps,) * 3
    settings = ShownFields(
        num_inference_steps=steps, video_num_inference_steps=steps, guidance_scale=7.0, video_guidance_scale=5.0
    )
    return Plan(
        family="pyramid_flow",
        model="mini",
        prompt="",
        prompt_suffix="",
        negative_prompt="",
        seconds="1",
        width=WIDTH,
        height=HEIGHT,
        fps=24,
        seed=seed,
        units=units_of(WIDTH, HEIGHT, NUM_UNITS, settings, has_picture=False),
        settings=settings.model_dump(),
    )


def encoded(prompt: PromptEmbeds) -> EncodedPrompt:
    tensors = {"prompt_embeds": prompt.prompt_embeds, "pooled_prompt_embeds": prompt.pooled_prompt_embeds}
    return EncodedPrompt(all_to_wire(tensors))


def job_of(seed: int, *, unit: int = 0, num_steps: int = 3) -> UnitJob:
    return UnitJob(
        video_id=f"video_{seed}",
        unit=unit,
        plan=plan_of(seed, num_steps),
        prompt=encoded(prompt_of(seed)),
        negative_prompt=encoded(prompt_of(100)),
        history=tuple(to_wire(latents) for latents in history_of(seed, unit).split(1, dim=1)) if unit else (),
        submitted_at=time.time(),
    )


def predict_by(transformer: Transformer, sequences: Sequence[ClipSequence]) -> list[Tensor]:
    with torch.inference_mode():
        return transformer(sequences, attention=block_attention)


def by_the_library(transformer: Transformer, job: UnitJob) -> Tensor:
    seed = job.plan.seed
    steps = denoise_unit(
        prompt_of(seed),
        prompt_of(100),
        history_of(seed, job.unit),
        settings=settings_of(job.plan).sampling,
        noise=SeededNoise(seed, SHAPE),
    )
    return run_units(lambda sequences: predict_by(transformer, sequences), [steps])[0]


async def messages_of(denoiser: Handle, job: UnitJob) -> list[UnitProgress | UnitResult]:
    return [message async for message in denoiser.options(stream=True).denoise_unit.remote(job)]


async def result_of(denoiser: Handle, job: UnitJob) -> UnitResult:
    result = (await messages_of(denoiser, job))[-1]
    assert isinstance(result, UnitResult)
    return result


@pytest.mark.parametrize("unit", [0, 3])
async def test_a_unit_is_that_of_the_library(denoiser: Handle, transformer: Transformer, unit: int) -> None:
    job = job_of(1, unit=unit)
    result = await result_of(denoiser, job)
    latents = from_wire(result.latents)
    assert latents.dtype == torch.float32
    assert torch.equal(latents, by_the_library(transformer, job))
    assert result.num_steps == 9
    assert result.mean_slots == 1
    assert result.started < result.ended
    assert result.replica


async def test_eight_units_at_once_share_forwards_and_come_out_as_alone(
    denoiser: Handle, transformer: Transformer
) -> None:
    before: ReplicaStats = await denoiser.stats.remote()
    jobs = [job_of(seed, unit=seed % 4, num_steps=40) for seed in range(8)]
    results = await asyncio.gather(*(result_of(denoiser, job) for job in jobs))
    after: ReplicaStats = await denoiser.stats.remote()
    mean_pack = (after.num_slots - before.num_slots) / (after.num_forwards - before.num_forwards)
    assert after.num_slots - before.num_slots == 8 * 120
    assert mean_pack >= 4
    for job, result in zip(jobs, results, strict=True):
        assert result.mean_slots > 1
        assert torch.equal(from_wire(result.latents), by_the_library(transformer, job))


async def test_progress_begins_at_step_0_grows_and_ends_with_the_result(denoiser: Handle) -> None:
    *progress, result = await messages_of(denoiser, job_of(1, num_steps=120))
    assert isinstance(result, UnitResult)
    steps = [message.step for message in progress if isinstance(message, UnitProgress)]
    assert steps[0] == 0
    assert len(steps) > 1
    assert steps == sorted(steps)
    assert result.num_steps == 360


async def test_a_caller_that_leaves_frees_its_slot(denoiser: Handle) -> None:
    responses = [denoiser.options(stream=True).denoise_unit.remote(job_of(seed, num_steps=1000)) for seed in range(3)]
    for response in responses:
        assert await anext(response) == UnitProgress(0, 3000)
    at_work: ReplicaStats = await denoiser.stats.remote()
    assert at_work.num_present == 3
    for response in responses:
        response.cancel()
    deadline = time.monotonic() + 5
    while (await denoiser.stats.remote()).num_present:
        assert time.monotonic() < deadline, "the slots are still there"
        await asyncio.sleep(0.01)
    freed: ReplicaStats = await denoiser.stats.remote()
    await asyncio.sleep(0.2)
    assert (await denoiser.stats.remote()).num_forwards <= freed.num_forwards + 1


async def test_a_replica_answers_while_it_computes(denoiser: Handle) -> None:
    response = denoiser.options(stream=True).denoise_unit.remote(job_of(1, num_steps=1000))
    await anext(response)
    stats: list[ReplicaStats] = [await denoiser.stats.remote() for _ in range(10)]
    assert all(one.num_present == 1 for one in stats)  # a loop that is held up answers when the unit is done
    response.cancel()


async def test_a_history_that_does_not_fit_is_refused(denoiser: Handle) -> None:
    job = job_of(1, unit=2)
    with pytest.raises(ValueError, match="history: 2 units, must be 1 for unit 1"):
        await result_of(denoiser, UnitJob(**{**vars(job), "unit": 1}))


async def test_latents_of_another_shape_are_refused(denoiser: Handle) -> None:
    misfit = (to_wire(torch.zeros(16, 1, 8, 16)), to_wire(torch.zeros(16, 1, 8, 8)))
    with pytest.raises(ValueError, match=r"unit 1 is float32 \(16, 1, 8, 8\), must be float32 \(16, 1, 8, 16\)"):
        await result_of(denoiser, UnitJob(**{**vars(job_of(1, unit=2)), "history": misfit}))


async def test_a_unit_past_the_end_is_refused(denoiser: Handle) -> None:
    with pytest.raises(ValueError, match="unit=5: must be from 0 to 4"):
        await result_of(denoiser, job_of(1, unit=5))


async def test_another_unit_goes_on_when_one_fails(denoiser: Handle, transformer: Transformer) -> None:
    good, bad = job_of(1, num_steps=20), job_of(2, num_steps=20)
    misfit = PromptEmbeds(torch.randn(4, 33), torch.randn(48))
    bad = UnitJob(**{**vars(bad), "prompt": encoded(misfit)})
    result, error = await asyncio.gather(result_of(denoiser, good), result_of(denoiser, bad), return_exceptions=True)
    assert isinstance(error, RuntimeError)
    assert isinstance(result, UnitResult)
    assert torch.equal(from_wire(result.latents), by_the_library(transformer, good))


async def test_a_replica_whose_device_hangs_says_so_and_is_replaced(local_ray: None, tmp_path: Path) -> None:
    (tmp_path / "noise.json").write_text("{}")
    config = DenoiserConfig(source=str(tmp_path), family="tests.families.stopping:FAMILY", max_turn_s=0.5)
    family = config.model_family
    request = VideoRequest(prompt="noise", seed=1)
    plan = family.plan(request, NoiseFields(), model="noise", capabilities=NoiseCapabilities(), limits=RequestLimits())
    job = replace(job_of(1), plan=plan, prompt=EncodedPrompt({}), negative_prompt=EncodedPrompt({}))
    application = quick(Denoiser, health_check_period_s=0.5, graceful_shutdown_timeout_s=600.0).bind(config)
    with deployed(application, "stopping") as stopping:
        first = await asyncio.gather(*(result_of(stopping, job) for _ in range(2)), return_exceptions=True)
        assert all(isinstance(error, DeviceFailedError) for error in first)
        async with asyncio.timeout(60):
            result = await retried(lambda: result_of(stopping, job), on_retry=lambda _: None)
        assert from_wire(result.latents).shape == plan.unit(0).latent_shape


@pytest.mark.parametrize("variant", ["miniflux", "mmdit"])
async def test_the_warm_up_runs_for_every_variant(variant: str, request: pytest.FixtureRequest) -> None:
    config = DenoiserConfig(source=str(request.getfixturevalue(variant)), dtype="bfloat16")
    part = config.model_family.load_denoise(config.part_source(config.model_family.denoise_options))
    part.warm_up((128, 64))
    part.warm_up(None)
