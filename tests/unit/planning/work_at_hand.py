"""Stage times and videos of round numbers."""

from dataclasses import replace

from deployments.planning.stage_times import StageTimes, StepWork, UnitWork, VideoWork

TIMES = StageTimes(
    source="a test",
    num_text_tokens=0,
    forward_floor_s=0.0,
    forward_fixed_s=0.0,
    unit_s=0.0,
    token_s=0.0,
    token_squared_s=0.0,
    decode_fixed_s=0.0,
    first_pixel_s=0.0,
    pixel_s=0.0,
    memory_move_s=0.0,
    encode_s=0.0,
    save_fixed_s=0.0,
    save_pixel_s=0.0,
    begin_s=0.0,
    handover_s=0.0,
    join_s=0.0,
)


def video(
    num_units: int = 3,
    *,
    num_steps: int = 2,
    step_s: float = 0.5,
    decode_s: float = 0.25,
    save_s: float = 0.125,
    num_tokens: int = 100,
) -> VideoWork:
    """Each unit takes ``num_steps`` steps of ``step_s``."""
    unit = UnitWork((StepWork(num_steps, num_tokens, step_s),), decode_s, save_s)
    return VideoWork("video", 1.0, (unit,) * num_units)


def times(**fields: float) -> StageTimes:
    return replace(TIMES, **fields)
