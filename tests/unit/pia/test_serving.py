"""The three parts, and the whole model of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyramid_serve.api.plans import Plan
from pyramid_serve.checkpoints.sources import CheckpointError
from pyramid_serve.errors import NonFiniteError
from pyramid_serve.families import PartSource, UnitInput
from pyramid_serve.pia.family import FAMILY, DenoiseOptions
from pyramid_serve.pia.sampler import UNetRow
from pyramid_serve.pia.serving import Decoding, Denoising, TextEncoding
from pyramid_serve.pia.unet import _predict_at_once, predict
from pyramid_serve.pia.whole import load_pipeline
from pyramid_serve.pipeline import PartsPipeline
from tests.unit.pia.golden import picture
from tests.unit.pia.models_at_hand import change, copied, plan_of

SHAPES = ((8, 4, 8), (16, 4, 8), (8, 8, 4), (8, 8, 8))
Run = Callable[[Sequence[Plan]], list[Tensor]]


@pytest.fixture(scope="module")
def pipeline(tiny: Path) -> PartsPipeline:
    return load_pipeline(tiny, variant=None, dtype="float32", device="cpu")


def unit_input(pipeline: PartsPipeline, plan: Plan) -> UnitInput:
    prompt, negative = pipeline.text.encode([plan.full_prompt, plan.negative_prompt])
    condition = pipeline.decode.encode_picture(picture(), height=plan.height, width=plan.width)
    return UnitInput(plan, 0, prompt.tensors, negative.tensors, condition, ())


@pytest.fixture(scope="module")
def run(pipeline: PartsPipeline) -> Run:
    """Make the latents of plans side by side: each turn is one forward of whatever rows may share it."""

    def run_together(plans: Sequence[Plan]) -> list[Tensor]:
        units = [pipeline.denoise.steps(unit_input(pipeline, plan)) for plan in plans]
        latents: dict[int, Tensor] = {}
        with torch.inference_mode():
            waiting = {number: next(unit) for number, unit in enumerate(units)}
            while waiting:
                key = pipeline.denoise.packs_with(next(iter(waiting.values()))[0])
                packed = {n: rows for n, rows in waiting.items() if pipeline.denoise.packs_with(rows[0]) == key}
                responses = iter(pipeline.denoise.forward([row for rows in packed.values() for row in rows]))
                for number, rows in packed.items():
                    try:
                        waiting[number] = units[number].send([next(responses) for _ in rows])
                    except StopIteration as finished:
                        latents[number] = finished.value
                        del waiting[number]
        return [latents[number] for number in range(len(plans))]

    return run_together


def test_a_video_has_the_same_bits_alone_and_packed_with_any_others(run: Run) -> None:
    plans = [
        plan_of(num_inference_steps=3, seed=1),
        plan_of(num_inference_steps=2, seed=2, scheduler="euler", guidance_scale=1, mode="loop"),
        plan_of(num_inference_steps=2, seed=3, scheduler="lcm", free_init={"num_iters": 2}),
        plan_of(num_inference_steps=4, seed=4, scheduler="dpm++", strength=0.5, prompt="a dog"),
        plan_of(num_inference_steps=2, seed=5, num_frames=8),
    ]
    together = run(plans)
    for plan, latents in zip(plans, together, strict=True):
        assert latents.shape == plan.unit(0).latent_shape
        assert torch.equal(run([plan])[0], latents)


def test_another_seed_makes_another_video(run: Run) -> None:
    assert not torch.equal(*run([plan_of(num_inference_steps=1, seed=1), plan_of(num_inference_steps=1, seed=2)]))


def test_each_setting_of_a_request_reaches_the_sampler(run: Run) -> None:
    plain: dict[str, Any] = {"num_inference_steps": 2, "scheduler": "ddim"}
    changed: list[dict[str, Any]] = [
        {"motion": "large"},
        {"mode": "loop"},
        {"scheduler": "pndm"},
        {"strength": 0.5},
        {"guidance_scale": 2},
        {"clip_skip": 1},
        {"negative_prompt": "blue"},
        {"free_init": {"num_iters": 2}},
        {"free_init": {"num_iters": 2, "method": "gaussian"}},
    ]
    made = run([plan_of(**plain), *(plan_of(**{**plain, **fields}) for fields in changed)])
    assert len({latents.numpy().tobytes() for latents in made}) == len(changed) + 1


def test_rows_that_a_gpu_computes_at_once_are_those_one_by_one(pipeline: PartsPipeline) -> None:
    """Each with its own latents, timestep and prompt."""
    unet = pipeline.denoise._unet  # type: ignore[attr-defined]
    torch.manual_seed(0)
    width = unet.config.cross_attention_dim
    rows = [
        UNetRow(torch.randn(9, 8, 4, 8), torch.tensor(timestep), torch.randn(7, width))
        for timestep in (999.0, 500.0, 3.0)
    ]
    with torch.inference_mode():
        at_once = _predict_at_once(unet, rows)
        for together, alone in zip(at_once, predict(unet, rows, one_by_one=True), strict=True):
            assert alone.std() > 1e-3
            torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    different = [UNetRow(torch.zeros(9, *shape), rows[0].timestep, rows[0].prompt_embeds) for shape in SHAPES]
    assert len({pipeline.denoise.packs_with(row) for row in different}) == len(SHAPES)


def test_a_seed_is_all_that_noise_comes_from(tmp_path: Path) -> None:
    """Also for a base whose scheduler would draw noise of its own at each step."""
    model = copied(tmp_path)
    config = model / "scheduler" / "scheduler_config.json"
    change(config, algorithm_type="sde-dpmsolver++", thresholding=True, rescale_betas_zero_snr=True)
    frames = []
    for _ in range(2):
        pipe = load_pipeline(model, variant=None, dtype="float32", device="cpu")
        frames += list(pipe.stream(plan_of(model, scheduler="dpm++", num_inference_steps=3), picture=picture()))
    assert torch.equal(*frames)
    assert frames[0].float().std() > 1


@pytest.mark.parametrize("broken", [{"timestep_spacing": "some"}, {"beta_start": "some", "timestep_spacing": "none"}])
def test_a_scheduler_that_cannot_be_made_is_refused_on_loading(broken: dict[str, str], tmp_path: Path) -> None:
    model = copied(tmp_path)
    change(model / "scheduler" / "scheduler_config.json", **broken)
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json: cannot be used for"):
        load_pipeline(model, variant=None, dtype="float32", device="cpu")


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 1.0}, {"scheduler": "pndm", "strength": 0.5}])
def test_the_steps_that_a_plan_of_capacity_counts_are_those_made(
    pipeline: PartsPipeline, settings: dict[str, Any]
) -> None:
    plan = plan_of(num_inference_steps=4, **settings)
    made = []
    steps = pipeline.denoise.steps(unit_input(pipeline, plan))
    with torch.inference_mode():
        rows = next(steps)
        while True:
            made.append(tuple(row.num_tokens for row in rows))
            try:
                rows = steps.send(pipeline.denoise.forward(rows))
            except StopIteration:
                break
    (run,) = FAMILY.step_runs(plan, 0, num_text_tokens=77)
    assert made == [run.sequence_tokens] * run.num_steps


def test_progress_counts_every_iteration_of_free_init(pipeline: PartsPipeline) -> None:
    plan = plan_of(num_inference_steps=2, free_init={"num_iters": 2, "use_fast_sampling": True}, scheduler="pndm")
    told: list[int] = []
    (frames,) = pipeline.stream(plan, picture=picture(), progress=told.append)
    assert len(told) == plan.num_steps == 1 + 3
    assert (frames.shape, frames.dtype) == ((16, 8, 16, 3), torch.uint8)


def test_a_picture_is_fitted_and_cropped_and_never_stretched(pipeline: PartsPipeline) -> None:
    wide = picture().resize((64, 8))
    fitted = pipeline.decode.encode_picture(wide, height=8, width=16)
    cropped = pipeline.decode.encode_picture(wide.crop((24, 0, 40, 8)), height=8, width=16)
    assert fitted.keys() == cropped.keys() and all(torch.equal(fitted[name], cropped[name]) for name in fitted)
    assert fitted["picture_mean"].shape == (4, 4, 8)


def test_a_video_without_a_picture_is_refused(pipeline: PartsPipeline) -> None:
    given = unit_input(pipeline, plan_of())
    without = UnitInput(given.plan, 0, given.prompt, given.negative_prompt, None, ())
    with pytest.raises(ValueError, match="picture: is missing"):
        next(pipeline.denoise.steps(without))


def test_latents_of_another_shape_are_refused(pipeline: PartsPipeline) -> None:
    with pytest.raises(ValueError, match=r"latents: shape \(3, 1, 4, 4\), must be \(4, F, h, w\)"):
        pipeline.decode.request(torch.zeros(3, 1, 4, 4), None)


def test_latents_that_are_not_finite_are_reported_by_place(pipeline: PartsPipeline) -> None:
    with pytest.raises(NonFiniteError, match="latents: NaN among the values"):
        pipeline.decode.forward([pipeline.decode.request(torch.full((4, 1, 4, 4), float("nan")), None)])


def test_frames_do_not_depend_on_how_many_are_decoded(pipeline: PartsPipeline) -> None:
    latents = torch.randn(4, 3, 4, 8)
    whole, first = pipeline.decode.forward(
        [pipeline.decode.request(latents, None), pipeline.decode.request(latents[:, :1], None)]
    )
    assert torch.equal(whole.frames[:1], first.frames)


def test_a_prompt_that_is_too_long_says_where_it_was_cut(pipeline: PartsPipeline) -> None:
    cut, whole = pipeline.text.encode(["a" * 100, "a cat"])
    assert (cut.truncated_at, whole.truncated_at) == (75, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_parts_compute_in_other_dtypes(tiny: Path, dtype: torch.dtype) -> None:
    source = PartSource(tiny, None, dtype, torch.device("cpu"), DenoiseOptions())
    parts = PartsPipeline(TextEncoding(source), Denoising(source), Decoding(source), "")
    (frames,) = parts.stream(plan_of(num_inference_steps=1, num_frames=8), picture=picture())
    assert frames.shape == (8, 8, 16, 3)
    assert (parts.text.dtype, parts.denoise.dtype) == (dtype, dtype)


def test_the_parts_warm_up_at_a_size_or_at_the_smallest(pipeline: PartsPipeline) -> None:
    for size in (None, (16, 8)):
        pipeline.denoise.warm_up(size)
        assert pipeline.decode.warm_up(size) == 0


def test_what_the_model_computes_in_is_told(pipeline: PartsPipeline) -> None:
    assert pipeline.description == "float32 on cpu: it was asked for"
