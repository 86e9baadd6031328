"""Stage times out of what ``pyramid-serve bench -o`` wrote."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from deployments.planning.stage_times import StageTimes
from pyramid_serve.api import Plan
from pyramid_serve.families import Family


def read_bench(path: Path) -> dict[str, Any]:
    """The figures of a bench. Raises ``ValueError`` for a file without stage times."""
    try:
        report: Any = json.loads(path.read_text())
        _ = report["plan"], [(level["stages"], level["pools"]["Denoiser"]) for level in report["levels"]]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not the JSON that pyramid-serve bench of this release writes with -o") from None
    if any("Decoder" not in level["pools"] for level in report["levels"]):
        raise ValueError(f"{path}: of an app that decodes in the denoiser's replicas, which is not planned for")
    found: dict[str, Any] = report
    return found


def times_of_bench(report: Mapping[str, Any], family: Family, *, source: str) -> StageTimes:
    """The times that explain a bench, by least squares.

    The level with the fewest videos at once gives what a unit takes by its tokens. The one with the most says how much
    of that is of the forward, and so is shared by a pack: less than nothing where a pack takes longer than its units
    alone, as on a machine whose cores all pools share. With one level it is nothing. Levels in between have no part.
    """
    levels = sorted(report["levels"], key=lambda level: level["concurrency"])
    first, last = levels[0], levels[-1]
    plan, stages = Plan.model_validate(report["plan"]), first["stages"]
    num_text_tokens = _num_text_tokens(first["pools"]["Denoiser"], plan, family)
    steps, tokens, seconds = [], [], []
    for unit, measured in enumerate(stages["denoise"]):
        runs = family.step_runs(plan, unit, num_text_tokens=num_text_tokens)
        steps.append(float(sum(run.num_steps for run in runs)))
        tokens.append(float(sum(run.num_steps * sum(run.sequence_tokens) for run in runs)))
        seconds.append(measured)
    step_s, token_s = _least_squares(steps, tokens, seconds)
    forward_s = _shared_by_a_pack(
        last, "Denoiser", num_slots=last["concurrency"] * sum(steps), alone_s=last["concurrency"] * sum(seconds)
    )
    decodes = stages["decode"]
    decode_fixed_s = _shared_by_a_pack(
        last, "Decoder", num_slots=last["concurrency"] * len(decodes), alone_s=last["concurrency"] * sum(decodes)
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
        encode_s=stages["encode"],
        save_fixed_s=0.0,
        save_pixel_s=sum(stages["save"]) / sum(pixels),
        begin_s=stages["begin"],
        handover_s=stages["handover"],
        join_s=stages["join"],
    )


def _num_text_tokens(denoiser: Mapping[str, float], plan: Plan, family: Family) -> int:
    """Of each sequence: what is in the forwards beside the pictures' tokens."""
    runs = [run for unit in range(plan.num_units) for run in family.step_runs(plan, unit, num_text_tokens=0)]
    num_steps = sum(run.num_steps for run in runs)
    num_image_tokens = sum(run.num_steps * sum(run.sequence_tokens) for run in runs)
    num_sequences = sum(run.num_steps * len(run.sequence_tokens) for run in runs)
    num_tokens = num_steps * denoiser["mean_tokens"] / denoiser["mean_pack"]
    return max(round((num_tokens - num_image_tokens) / num_sequences), 0)


def _shared_by_a_pack(level: Mapping[str, Any], pool: str, *, num_slots: float, alone_s: float) -> float:
    """Seconds of a forward that do not depend on its slots: what was saved, by each slot that shared a forward."""
    use = level["pools"][pool]
    num_saved = num_slots - num_slots / use["mean_pack"]
    busy_s = use["busy_share"] * level["wall"] * use["num_replicas"]
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
