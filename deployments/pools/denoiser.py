"""The Denoiser deployment: latents of one unit of one video a call, many videos' steps in one forward."""

import asyncio
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from typing import Any

from pydantic import PositiveInt
from torch import Tensor

from deployments.pools.engine import Engine
from deployments.pools.model_config import ModelConfig, reported_if_not_finite
from deployments.pools.tensors import all_from_wire, from_wire, to_wire
from deployments.pools.wire import UnitJob, UnitProgress, UnitResult
from deployments.telemetry.forwards import Forward, ReplicaStats, replica_stats
from deployments.telemetry.logs import configure_logging
from deployments.telemetry.replicas import CallMetrics, ForwardMetrics, replica_name
from pyramid_serve.families import DenoisePart, UnitInput

PROGRESS_INTERVAL_S = 0.5


class DenoiserConfig(ModelConfig):
    token_budget: PositiveInt = 32_768
    """Tokens of one forward, text and history among them; a unit with guidance counts both its sequences."""
    max_slots: PositiveInt | None = None
    """Units of one forward. None: as many as the budget holds."""
    warm_up_size: tuple[PositiveInt, PositiveInt] | None = None
    """(width, height) in pixels of the unit made before the replica is ready. None: the smallest there is."""


class Denoiser:
    """Holds the denoise part of a model and one engine; keeps nothing of a video between calls.

    On a CPU a unit comes out the same, bit for bit, whatever shared its forwards. On a GPU a product of the whole pack
    may sum up in another order when it has more rows.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        """Loads the part and runs it once, so that the first call finds everything compiled."""
        self._replica = replica_name()
        configure_logging(self._replica)
        config.set_up_torch()
        family = config.model_family
        self._part = family.load_denoise(config.part_source(family.denoise_options))
        self._computed = config.computed_as("denoiser", self._part.dtype)
        with reported_if_not_finite():
            self._part.warm_up(config.warm_up_size)
        self._calls, metrics = CallMetrics(), ForwardMetrics()
        self._engine: Engine[Any, Any] = Engine(
            self._part.forward,
            token_budget=config.token_budget,
            max_slots=config.max_slots,
            packs_with=self._part.packs_with,
            on_forward=metrics.record,
            on_out_of_memory=metrics.out_of_memory,
            thread=config.compute_thread("denoiser"),
        )

    async def denoise_unit(self, job: UnitJob) -> AsyncGenerator[UnitProgress | UnitResult, None]:
        """Call with ``stream=True``: progress when the unit is first taken into a forward and then at most every half
        second, and last the result. A caller that goes away takes the unit out of the engine before its next step.

        Raises ``ValueError`` for a unit that the plan does not have, and a history that does not fit it.
        """
        check_job(job)
        num_steps = job.plan.unit(job.unit).num_steps
        forwards: list[Forward] = []
        has_begun = asyncio.Event()
        with self._calls.of("denoise_unit"):
            latents = asyncio.ensure_future(
                self._engine.run(
                    unit_steps(job, self._part),
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
                made, now = to_wire(await latents), time.time()
                yield UnitResult(
                    latents=made,
                    started=forwards[0].started if forwards else now,  # a unit may take no step
                    ended=forwards[-1].ended if forwards else now,
                    replica=self._replica,
                    computed=self._computed,
                    num_steps=num_steps,
                    mean_slots=sum(f.num_slots for f in forwards) / max(len(forwards), 1),
                    mean_tokens=sum(f.num_tokens for f in forwards) / max(len(forwards), 1),
                )
            finally:
                begun.cancel()
                latents.cancel()

    async def stats(self) -> ReplicaStats:
        return replica_stats(self._replica, self._engine.stats())

    async def check_health(self) -> None:
        self._engine.check()


def check_job(job: UnitJob) -> None:
    """``ValueError`` unless the video has the unit, and the history is that of the units before it."""
    if not 0 <= job.unit < job.plan.num_units:
        raise ValueError(f"unit={job.unit}: must be from 0 to {job.plan.num_units - 1}")
    if len(job.history) != job.unit:
        raise ValueError(f"history: {len(job.history)} units, must be {job.unit} for unit {job.unit}")
    for unit, latents in enumerate(job.history):
        expected = job.plan.unit(unit).latent_shape
        if latents.shape != expected or latents.dtype != "float32":
            raise ValueError(f"history: unit {unit} is {latents.dtype} {latents.shape}, must be float32 {expected}")


def unit_steps(job: UnitJob, part: DenoisePart) -> Generator[Sequence[Any], Sequence[Any], Tensor]:
    """The steps of a job.

    A generator, so everything happens where it is driven, reading the job's tensors too: on the engine's thread.
    """
    given = UnitInput(
        plan=job.plan,
        unit=job.unit,
        prompt=all_from_wire(job.prompt.tensors),
        negative_prompt=all_from_wire(job.negative_prompt.tensors),
        picture=None if job.picture is None else all_from_wire(job.picture),
        history=[from_wire(latents) for latents in job.history],
    )
    return (yield from part.steps(given))
