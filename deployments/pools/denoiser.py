"""The Denoiser deployment: latents of one unit of one video a call, many videos' steps in one forward."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from typing import Any

from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from deployments.pools.engine import Engine
from deployments.pools.model_config import ModelConfig, reported_if_not_finite
from deployments.pools.tensors import all_from_wire, from_wire, to_wire
from deployments.pools.unit_states import StatePace, StateTaker, seal, unseal, work_of
from deployments.pools.wire import UnitJob, UnitProgress, UnitResult
from deployments.telemetry.forwards import Forward, ReplicaStats, replica_stats
from deployments.telemetry.logs import configure_logging
from deployments.telemetry.replicas import CallMetrics, ForwardMetrics, StateMetrics, replica_name
from pyramid_serve.families import DenoisePart, UnitInput, UnitState

logger = logging.getLogger(__name__)

PROGRESS_INTERVAL_S = 0.5


class DenoiserConfig(ModelConfig):
    token_budget: PositiveInt = 32_768
    """Tokens of one forward, text and history among them; a unit with guidance counts both its sequences."""
    max_slots: PositiveInt | None = None
    """Units of one forward. None: as many as the budget holds."""
    warm_up_size: tuple[PositiveInt, PositiveInt] | None = None
    """(width, height) in pixels of the unit made before the replica is ready. None: the smallest there is."""
    state_interval_s: NonNegativeFloat = 5.0
    """Seconds after which the state of a unit is handed out, so that it goes on there if this replica is lost. It is
    longer where states would take over a hundredth of the time. 0: never. Not all families have states of units.
    """


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
        self._config = config
        self._has_states = family.state_version is not None
        self._part = family.load_denoise(config.part_source(family.denoise_options))
        self._computed = config.computed_as("denoiser", self._part.dtype)
        with reported_if_not_finite():
            self._part.warm_up(config.warm_up_size)
        self._calls, self._states, metrics = CallMetrics(), StateMetrics(), ForwardMetrics()
        self._engine: Engine[Any, Any] = Engine(
            self._part.forward,
            token_budget=config.token_budget,
            max_slots=config.max_slots,
            packs_with=self._part.packs_with,
            on_forward=metrics.record,
            on_out_of_memory=metrics.out_of_memory,
            thread=config.compute_thread("denoiser"),
        )
        self._pace = StatePace(config.state_interval_s, lambda: self._engine.stats().num_present)

    async def denoise_unit(self, job: UnitJob) -> AsyncGenerator[UnitProgress | UnitResult, None]:
        """Call with ``stream=True``: progress when the unit is first taken into a forward and then at most every half
        second, some of it with a state, and last the result. A caller that goes away takes the unit out of the engine
        before its next step.

        A state that does not fit the job is left aside, and the unit is made from its start. Raises ``ValueError`` for
        a unit that the plan does not have, and a history that does not fit it.
        """
        check_job(job)
        num_steps = job.plan.unit(job.unit).num_steps
        forwards: list[Forward] = []
        has_begun = asyncio.Event()
        with self._calls.of("denoise_unit"):
            work = work_of(job.plan, job.unit, self._config)
            state = await asyncio.to_thread(self._state_of, job, work)
            first_step = 0 if state is None else state.num_steps
            taker = StateTaker(self._pace) if self._has_states and self._config.state_interval_s else None
            latents = asyncio.ensure_future(
                self._engine.run(
                    unit_steps(job, self._part, state=state, taker=taker),
                    submitted_at=job.submitted_at,
                    on_start=has_begun.set,
                    on_step=forwards.append,
                )
            )
            begun = asyncio.ensure_future(has_begun.wait())
            try:
                await asyncio.wait([latents, begun], return_when=asyncio.FIRST_COMPLETED)
                if has_begun.is_set():
                    yield UnitProgress(first_step, num_steps)
                while not (await asyncio.wait([latents], timeout=PROGRESS_INTERVAL_S))[0]:
                    taken = None if taker is None else taker.pop()
                    sealed = None if taken is None else await asyncio.to_thread(seal, taken, work)
                    yield UnitProgress(first_step + len(forwards), num_steps, sealed)
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

    def _state_of(self, job: UnitJob, work: bytes) -> UnitState | None:
        """Where to go on with a unit."""
        if job.state is None or not self._has_states:
            return None
        try:
            state = unseal(job.state, work)
        except ValueError as error:
            logger.warning("unit %d is made from its start: %s", job.unit, error, extra={"video_id": job.video_id})
            self._states.refused()
            return None
        num_steps = job.plan.unit(job.unit).num_steps
        logger.info(
            "unit %d goes on from step %d of %d", job.unit, state.num_steps, num_steps, extra={"video_id": job.video_id}
        )
        self._states.restored(state.num_steps)
        return state

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


def unit_steps(
    job: UnitJob, part: DenoisePart, *, state: UnitState | None = None, taker: StateTaker | None = None
) -> Generator[Sequence[Any], Sequence[Any], Tensor]:
    """The steps of a job, those before ``state`` left out.

    A generator, so everything happens where it is driven, reading the job's tensors too: on the engine's thread.
    """
    given = UnitInput(
        plan=job.plan,
        unit=job.unit,
        prompt=all_from_wire(job.prompt.tensors),
        negative_prompt=all_from_wire(job.negative_prompt.tensors),
        picture=None if job.picture is None else all_from_wire(job.picture),
        history=[from_wire(latents) for latents in job.history],
        state=state,
        on_step=None if taker is None else taker.after_step,
    )
    return (yield from part.steps(given))
