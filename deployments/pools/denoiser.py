"""The Denoiser deployment: latents of one unit of one video a call, many videos' steps in one forward."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import torch
from pydantic import PositiveInt
from ray import serve
from torch import Tensor

from deployments.pools.engine import Engine, Forward
from deployments.pools.model_config import ModelConfig, reported_if_not_finite
from deployments.pools.wire import ReplicaStats, UnitJob, UnitProgress, UnitResult, from_wire, prompt_from_wire, to_wire
from deployments.telemetry.logs import configure_logging
from deployments.telemetry.replicas import CallMetrics, ForwardMetrics, replica_name, replica_stats
from pyramid_serve.checkpoints import read_config, transformer_folder
from pyramid_serve.pyramid_flow.attention import AttentionName, attention_by_name, fastest_on
from pyramid_serve.pyramid_flow.noise import SeededNoise
from pyramid_serve.pyramid_flow.pack import ClipSequence, PromptEmbeds
from pyramid_serve.pyramid_flow.parts import load_transformer
from pyramid_serve.pyramid_flow.sampler import SamplingSettings, UnitSteps, denoise_unit, run_units
from pyramid_serve.pyramid_flow.shapes import LATENT_CHANNELS, NUM_STAGES, SIZE_MULTIPLE, LatentShape

PROGRESS_INTERVAL_S = 0.5


class DenoiserConfig(ModelConfig):
    attention: AttentionName | None = None
    """None: "flex" on CUDA, else "blocks"."""
    token_budget: PositiveInt = 32_768
    """Tokens of one forward, text and history among them; a unit with guidance counts both its sequences."""
    max_slots: PositiveInt | None = None
    """Units of one forward. None: as many as the budget holds."""
    warm_up_size: tuple[PositiveInt, PositiveInt] | None = None
    """(width, height) in pixels of the unit made before the replica is ready. None: the smallest there is."""

    @property
    def attention_name(self) -> AttentionName:
        return self.attention or fastest_on(self.torch_device)


@serve.deployment
class Denoiser:
    """Holds the transformer and one engine; keeps nothing of a video between calls.

    A unit comes out the same whatever shared its forwards, to float tolerance: in float32 within about 1e-5 of latents
    that go up to 6, for a matrix product sums in another order when it has more rows.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        """Loads the transformer and makes a unit with it, so the first call finds everything compiled."""
        self._replica = replica_name()
        configure_logging(self._replica)
        config.set_up_torch()
        self._computed = config.computed_as("denoiser")
        self._device = config.torch_device
        self._attention = attention_by_name(config.attention_name)
        self._transformer = load_transformer(
            config.source, config.variant, dtype=config.torch_dtype, device=self._device
        )
        with reported_if_not_finite():
            run_units(self._predict, [warm_up_steps(config)])
        self._calls = CallMetrics()
        self._engine: Engine[ClipSequence, Tensor] = Engine(
            self._predict,
            token_budget=config.token_budget,
            max_slots=config.max_slots,
            on_forward=ForwardMetrics().record,
            name="denoiser",
        )

    async def denoise_unit(self, job: UnitJob) -> AsyncGenerator[UnitProgress | UnitResult, None]:
        """Call with ``stream=True``: progress when the unit is first taken into a forward and then at most every half
        second, and last the result. A caller that goes away takes the unit out of the engine before its next step.

        Raises ``ValueError`` for a history that does not fit the unit or the shape.
        """
        check_job(job)
        num_steps = job.sampling.num_steps_of(job.unit)
        forwards: list[Forward] = []
        has_begun = asyncio.Event()
        with self._calls.of("denoise_unit"):
            latents = asyncio.ensure_future(
                self._engine.run(
                    unit_steps(job, self._device),
                    submitted_at=job.submitted_at,
                    on_start=has_begun.set,
                    on_step=forwards.append,
                )
            )
            begun = asyncio.ensure_future(has_begun.wait())
            try:
                await asyncio.wait([latents, begun], return_when=asyncio.FIRST_COMPLETED)
                if has_begun.is_set():
                    yield UnitProgress(0, num_steps)
                while not (await asyncio.wait([latents], timeout=PROGRESS_INTERVAL_S))[0]:
                    yield UnitProgress(len(forwards), num_steps)
                yield UnitResult(
                    latents=to_wire(await latents),
                    started=forwards[0].started,
                    ended=forwards[-1].ended,
                    replica=self._replica,
                    computed=self._computed,
                    num_steps=num_steps,
                    mean_slots=sum(f.num_slots for f in forwards) / len(forwards),
                    mean_tokens=sum(f.num_tokens for f in forwards) / len(forwards),
                )
            finally:
                begun.cancel()
                latents.cancel()

    async def stats(self) -> ReplicaStats:
        return replica_stats(self._replica, self._engine.stats())

    async def check_health(self) -> None:
        self._engine.check()

    def _predict(self, sequences: Sequence[ClipSequence]) -> list[Tensor]:
        with torch.inference_mode():
            predictions = self._transformer(sequences, attention=self._attention)
        if self._device.type == "cuda":
            # Without it the thread runs ahead of the device, and a step's time, errors and cancelling come late.
            torch.cuda.synchronize(self._device)
        return predictions


def check_job(job: UnitJob) -> None:
    """``ValueError`` unless the history is that of the unit, of a video of this shape."""
    expected = (LATENT_CHANNELS, job.unit, *job.shape.size_at(NUM_STAGES - 1))
    if job.history.shape != expected or job.history.dtype != "float32":
        raise ValueError(
            f"history: {job.history.dtype} {job.history.shape}, must be float32 {expected} for unit {job.unit}"
        )
    if not 0 <= job.unit < job.shape.num_latent_frames:
        raise ValueError(f"unit={job.unit}: must be from 0 to {job.shape.num_latent_frames - 1}")


def unit_steps(job: UnitJob, device: torch.device) -> UnitSteps:
    """The steps of a job, its tensors brought to the device with the first and the latents to the CPU after the last.

    A generator, so all of that happens where it is driven: on the engine's thread.
    """
    latents = yield from denoise_unit(
        prompt_from_wire(job.prompt, device),
        prompt_from_wire(job.negative_prompt, device),
        from_wire(job.history, device),
        settings=job.sampling,
        noise=SeededNoise(job.seed, job.shape),
    )
    return latents.cpu()


def warm_up_steps(config: DenoiserConfig) -> UnitSteps:
    """The unit 2 of a video, one step a stage, with guidance: every kind of clip that there is."""
    width, height = config.warm_up_size or (SIZE_MULTIPLE, SIZE_MULTIPLE)
    shape = LatentShape.of_pixels(height=height, width=width, num_latent_frames=3)
    prompt = _blank_prompt(read_config(transformer_folder(config.source, config.variant)), config)
    return denoise_unit(
        prompt,
        prompt,
        torch.zeros(LATENT_CHANNELS, 2, *shape.size_at(NUM_STAGES - 1), device=config.torch_device),
        settings=SamplingSettings(num_inference_steps=(1, 1, 1), video_num_inference_steps=(1, 1, 1)),
        noise=SeededNoise(0, shape),
    )


def _blank_prompt(transformer: Mapping[str, Any], config: DenoiserConfig) -> PromptEmbeds:
    """An embedding of the sizes that the transformer's ``config.json`` tells."""
    embeds = PromptEmbeds(
        torch.zeros(8, transformer["joint_attention_dim"]), torch.zeros(transformer["pooled_projection_dim"])
    )
    return embeds.to(config.torch_device, config.torch_dtype)
