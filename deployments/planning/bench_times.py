"""Stage times out of what ``pyramid-serve bench -o`` wrote."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deployments.planning.stage_times import StageTimes
from pyramid_serve.api import Plan
from pyramid_serve.families import Family

_FROZEN = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)
_Number = Annotated[float, Field(strict=True, ge=0, le=1e9, allow_inf_nan=False)]
_Seconds = Annotated[float, Field(strict=True, ge=0, le=1e7, allow_inf_nan=False)]
_Count = Annotated[int, Field(strict=True, ge=1, le=100_000)]
_MAX_SIDE = 100_000
"""Pixels."""


class PoolUse(BaseModel):
    """What one deployment did during a level, as ``local.bench.PoolUse``."""

    model_config = _FROZEN

    num_replicas: _Count
    busy_share: Annotated[float, Field(strict=True, ge=0, le=100, allow_inf_nan=False)]
    """Of the time of all replicas; a little more than 1 where they began before the level."""
    mean_pack: _Number
    """Units of one forward. 0: there was no forward."""
    mean_tokens: _Number


class Stages(BaseModel):
    """How long each stage took in seconds, as ``telemetry.timelines.StageSeconds``."""

    model_config = _FROZEN

    begin: _Seconds
    encode: _Seconds
    denoise: tuple[_Seconds, ...]
    """Of each unit, as ``decode`` and ``save``."""
    decode: tuple[_Seconds, ...]
    save: tuple[_Seconds, ...]
    handover: _Seconds
    join: _Seconds


class Level(BaseModel):
    """The figures of one number of videos at once, as ``local.bench.Level``. Times are in seconds."""

    model_config = _FROZEN

    concurrency: _Count
    wall: Annotated[_Seconds, Field(gt=0)]
    videos_per_minute: Annotated[_Number, Field(gt=0)]
    latency_p95: Annotated[_Seconds, Field(gt=0)]
    time_to_first_frame: _Seconds
    pools: dict[str, PoolUse]
    stages: Stages

    @model_validator(mode="after")
    def _check_pools(self) -> Self:
        if "Denoiser" not in self.pools:
            raise ValueError("pools: must have a Denoiser")
        if "Decoder" not in self.pools:
            raise ValueError("of an app that decodes in the denoiser's replicas, which is not planned for")
        for name in ("Denoiser", "Decoder"):
            if self.pools[name].mean_pack < 1:
                raise ValueError(f"pools.{name}.mean_pack={self.pools[name].mean_pack:g}: must be at least 1")
        return self


class Bench(BaseModel):
    """What is read of the file that ``pyramid-serve bench -o`` writes."""

    model_config = _FROZEN

    plan: Plan
    """Of each of its videos."""
    levels: Annotated[tuple[Level, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        plan = self.plan
        if not (0 < plan.width <= _MAX_SIDE and 0 < plan.height <= _MAX_SIDE):
            raise ValueError(f"plan: of {plan.size} pixels, but sides are from 1 to {_MAX_SIDE}")
        for index, level in enumerate(self.levels):
            for name in ("denoise", "decode", "save"):
                times: tuple[float, ...] = getattr(level.stages, name)
                if len(times) != plan.num_units:
                    raise ValueError(
                        f"levels.{index}.stages.{name}: {len(times)} times, but the plan has {plan.num_units} units"
                    )
            if not sum(level.stages.denoise) or not sum(level.stages.decode):
                raise ValueError(f"levels.{index}.stages: denoising and decoding must take some time")
        return self


def read_bench(path: Path) -> Bench:
    """The figures of a bench. Raises ``ValueError`` for a file without stage times that can be used."""
    try:
        return Bench.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        message = problem["msg"].removeprefix("Value error, ")
        raise ValueError(
            f"{path}: not the JSON that pyramid-serve bench of this release writes with -o: {where}: {message}"
        ) from None


def check_model(bench: Bench, family: Family, *, names: Sequence[str], source: str) -> None:
    """Raise ``ValueError`` for a bench of another model than the one with one of these public names."""
    plan = bench.plan
    if plan.family != family.name:
        raise ValueError(f"--bench {source}: of the family {plan.family}, but --model is of {family.name}")
    if plan.model not in names:
        raise ValueError(f"--bench {source}: of the model {plan.model}, but --model is {' or '.join(names)}")


def times_of_bench(bench: Bench, family: Family, *, source: str) -> StageTimes:
    """The times that explain a bench, by least squares.

    The level with the fewest videos at once gives what a unit takes by its tokens. The one with the most says how much
    of that is of the forward, and so is shared by a pack: less than nothing where a pack takes longer than its units
    alone, as on a machine whose cores all pools share. With one level it is nothing. Levels in between have no part.

    Raises ``ValueError`` for a bench whose plan the family did not make, or that has no denoising step.
    """
    levels = sorted(bench.levels, key=lambda level: level.concurrency)
    first, last = levels[0], levels[-1]
    plan, stages = bench.plan, first.stages
    try:
        num_text_tokens = _num_text_tokens(first.pools["Denoiser"], plan, family)
        all_runs = [family.step_runs(plan, unit, num_text_tokens=num_text_tokens) for unit in range(plan.num_units)]
    except (ValidationError, ArithmeticError, LookupError, TypeError, ValueError):
        raise ValueError(f"{source}: its plan is not one that the family {family.title} makes") from None
    steps = [float(sum(run.num_steps for run in runs)) for runs in all_runs]
    tokens = [float(sum(run.num_steps * sum(run.sequence_tokens) for run in runs)) for runs in all_runs]
    seconds = stages.denoise
    step_s, token_s = _least_squares(steps, tokens, seconds)
    forward_s = _shared_by_a_pack(
        last, "Denoiser", num_slots=last.concurrency * sum(steps), alone_s=last.concurrency * sum(seconds)
    )
    decodes = stages.decode
    decode_fixed_s = _shared_by_a_pack(
        last, "Decoder", num_slots=last.concurrency * len(decodes), alone_s=last.concurrency * sum(decodes)
    )
    decode_fixed_s = min(decode_fixed_s, *decodes)
    pixels = [plan.unit(unit).num_frames * plan.width * plan.height for unit in range(plan.num_units)]
    later = slice(min(1, len(decodes) - 1), None)
    return StageTimes(
        source=source,
        num_text_tokens=num_text_tokens,
        forward_floor_s=0.0,
        forward_fixed_s=forward_s,
        unit_s=step_s - forward_s,
        token_s=token_s,
        token_squared_s=0.0,
        decode_fixed_s=decode_fixed_s,
        first_pixel_s=(decodes[0] - decode_fixed_s) / pixels[0],
        pixel_s=(mean(decodes[later]) - decode_fixed_s) / mean(pixels[later]),
        memory_move_s=0.0,
        encode_s=stages.encode,
        save_fixed_s=0.0,
        save_pixel_s=sum(stages.save) / sum(pixels),
        begin_s=stages.begin,
        handover_s=stages.handover,
        join_s=stages.join,
    )


def _num_text_tokens(denoiser: PoolUse, plan: Plan, family: Family) -> int:
    """Of each sequence: what is in the forwards beside the pictures' tokens."""
    runs = [run for unit in range(plan.num_units) for run in family.step_runs(plan, unit, num_text_tokens=0)]
    num_steps = sum(run.num_steps for run in runs)
    num_image_tokens = sum(run.num_steps * sum(run.sequence_tokens) for run in runs)
    num_sequences = sum(run.num_steps * len(run.sequence_tokens) for run in runs)
    num_tokens = num_steps * denoiser.mean_tokens / denoiser.mean_pack
    return max(round((num_tokens - num_image_tokens) / num_sequences), 0)


def _shared_by_a_pack(level: Level, pool: str, *, num_slots: float, alone_s: float) -> float:
    """Seconds of a forward that do not depend on its slots: what was saved, by each slot that shared a forward."""
    use = level.pools[pool]
    num_saved = num_slots - num_slots / use.mean_pack
    busy_s = use.busy_share * level.wall * use.num_replicas
    return (alone_s - busy_s) / num_saved if num_saved >= 1 else 0.0


def _least_squares(steps: Sequence[float], tokens: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """The seconds of a step and of a token that come nearest to those of the units; neither is negative."""
    a, b, c = (
        sum(x * y for x, y in zip(left, right, strict=True))
        for left, right in ((steps, steps), (steps, tokens), (tokens, tokens))
    )
    by_steps = sum(x * y for x, y in zip(steps, seconds, strict=True))
    by_tokens = sum(x * y for x, y in zip(tokens, seconds, strict=True))
    determinant = a * c - b * b
    if determinant > 1e-9 * a * c:
        step_s = (by_steps * c - by_tokens * b) / determinant
        token_s = (by_tokens * a - by_steps * b) / determinant
        if step_s >= 0 and token_s >= 0:
            return step_s, token_s
        if token_s < 0:
            return by_steps / a, 0.0
    return 0.0, by_tokens / c
