from typing import Any

import pytest
import torch

from pyramid_serve.api import MODEL_NOT_FOUND, RequestError, RequestLimits, VideoRecord, VideoRequest, parse_request
from pyramid_serve.pyramid_flow.capabilities import Capabilities
from pyramid_serve.pyramid_flow.family import FAMILY
from pyramid_serve.pyramid_flow.noise import SeededNoise
from pyramid_serve.pyramid_flow.planning import latent_shape_of, settings_of
from pyramid_serve.pyramid_flow.sampler import denoise_unit
from pyramid_serve.pyramid_flow.settings import LinearGuidance
from pyramid_serve.served_model import ServedModel
from tests.unit.api.plans_at_hand import CAPABILITIES, MODEL, plan_of, record_of, refusal_of
from tests.unit.pyramid_flow.transformers_at_hand import random_prompt


def test_form_fields_mean_what_json_does() -> None:
    form = {
        "prompt": "a",
        "seconds": "4",
        "seed": "7",
        "num_inference_steps": "20",
        "video_num_inference_steps": "[1, 2, 3]",
        "guidance_scale": "6.5",
    }
    as_json = {
        "prompt": "a",
        "seconds": 4,
        "seed": 7,
        "num_inference_steps": 20,
        "video_num_inference_steps": [1, 2, 3],
        "guidance_scale": 6.5,
    }
    seconds = {"seconds": "4"}  # only tells how it was asked for
    assert MODEL.plan(parse_request(form)) == MODEL.plan(parse_request(as_json)).model_copy(update=seconds)
    assert settings_of(record_of(num_inference_steps="1,2,3").plan).num_inference_steps == (1, 2, 3)
    assert settings_of(record_of(num_inference_steps=["5"]).plan).num_inference_steps == (5, 5, 5)


def test_width_and_height_are_a_size() -> None:
    for fields in ({"width": 384, "height": "640"}, {"width": "384", "height": 640, "size": "384*640"}):
        plan = record_of(**fields).plan
        assert (plan.width, plan.height) == (384, 640)


@pytest.mark.parametrize(
    ("num_frames", "made"), [(1, 1), (16, 17), (48, 49), ("49", 49), (50, 49), (81, 81), (120, 121), (121, 121)]
)
def test_a_number_of_frames_is_brought_to_the_nearest_that_can_be_made(num_frames: int | str, made: int) -> None:
    plan = record_of(num_frames=num_frames, fps="24").plan
    assert plan.num_frames == made
    assert float(plan.seconds) == pytest.approx(made / 24, abs=0.01)


def test_a_length_may_be_said_in_both_ways() -> None:
    plan = record_of(seconds=2, num_frames=48, fps=24).plan
    assert (plan.num_frames, plan.seconds) == (49, "2")


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"size": "640x384", "width": 384, "height": 640}, ("size=640x384", "width=384", "height=640")),
        ({"width": 640}, ("width=640", "height")),
        ({"height": 640}, ("height=640", "width")),
        ({"seconds": 4, "num_frames": 49}, ("seconds=4", "num_frames=49")),
        ({"linear_guidance_alpha": 0.5, "video_guidance_scale": 5}, ("linear_guidance_alpha=0.5", "video_guidance_sc")),
        ({"linear_guidance_minimum": 2, "video_guidance_scale": 0}, ("linear_guidance_minimum=2", "video_guidance_sc")),
    ],
)
def test_a_contradiction_names_both_fields(fields: dict[str, Any], names: tuple[str, ...]) -> None:
    error = refusal_of(**fields)
    assert error.param in (*fields, "width", "height")
    for name in names:
        assert str(error).count(name) == 1


def test_what_cannot_be_made_is_named_as_it_was_asked_for() -> None:
    error = refusal_of(width=128, height=128)
    assert (error.param, str(error)) == ("width", "width=128, height=128: this model makes 640x384, 384x640")
    error = refusal_of(num_frames=161)
    assert (error.param, str(error)) == ("num_frames", "num_frames=161: at most 121 (5.04 s) are made here")


def test_what_is_left_out_is_the_models_choice() -> None:
    plan = MODEL.plan(VideoRequest(prompt="a red ball"))
    assert (plan.width, plan.height, plan.num_units, plan.seconds) == (640, 384, 8, "2.38")
    assert plan.full_prompt == "a red ball" + CAPABILITIES.prompt_suffix
    assert plan.negative_prompt == CAPABILITIES.negative_prompt
    assert settings_of(plan).num_inference_steps == (20, 20, 20) and settings_of(plan).video_num_inference_steps == (
        10,
        10,
        10,
    )
    assert (settings_of(plan).guidance_scale, settings_of(plan).video_guidance_scale) == (7.0, 5.0)


def test_a_seed_is_drawn_where_none_is_given() -> None:
    seeds = {MODEL.plan(VideoRequest(prompt="a")).seed for _ in range(4)}
    assert len(seeds) > 1
    assert MODEL.plan(VideoRequest(prompt="a", seed=0)).seed == 0


@pytest.mark.parametrize("seed", [-1, "-1"])
def test_a_seed_of_minus_one_is_drawn(seed: int | str) -> None:
    seeds = {record_of(seed=seed).plan.seed for _ in range(4)}
    assert len(seeds) > 1
    assert min(seeds) >= 0


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1])
def test_seeds_have_64_bits(seed: int) -> None:
    record = record_of(seed=str(seed))
    assert record.plan.seed == seed
    assert VideoRecord.model_validate_json(record.model_dump_json()) == record


def test_linear_guidance_falls_from_unit_to_unit() -> None:
    plan = record_of(guidance_scale=7, linear_guidance_alpha="1.5", linear_guidance_minimum=3).plan
    assert [settings_of(plan).sampling.guidance_of(unit) for unit in range(4)] == [7, 5.5, 4, 3]
    assert settings_of(record_of(linear_guidance_alpha=1).plan).sampling.linear_guidance == LinearGuidance(1, 2)
    assert settings_of(record_of(linear_guidance_minimum=1).plan).sampling.linear_guidance == LinearGuidance(0.5, 1)
    assert settings_of(record_of().plan).sampling.linear_guidance is None


def test_the_video_object_tells_which_guidance_is_used() -> None:
    linear = record_of(linear_guidance_alpha=1).public()
    names = ("video_guidance_scale", "linear_guidance_alpha", "linear_guidance_minimum")
    assert [linear[name] for name in names] == [None, 1, 2]
    assert [record_of().public()[name] for name in names] == [5, None, None]


def test_empty_texts_are_not_the_models_own() -> None:
    plan = MODEL.plan(VideoRequest(prompt="a", prompt_suffix="", negative_prompt=""))
    assert (plan.full_prompt, plan.negative_prompt) == ("a", "")


def test_guidance_with_a_picture_is_its_own() -> None:
    plan = MODEL.plan(VideoRequest(prompt="a", input_reference=b"png"))
    assert plan.has_picture and settings_of(plan).video_guidance_scale == CAPABILITIES.image_video_guidance_scale


@pytest.mark.parametrize(("seconds", "num_frames"), [("4", 97), (1, 25), (0.01, 1), (5, 121), ("2.4", 57)])
def test_a_length_is_brought_to_the_nearest_that_can_be_made(seconds: str | float, num_frames: int) -> None:
    plan = MODEL.plan(parse_request({"prompt": "a", "seconds": seconds}))
    assert plan.num_frames == num_frames
    assert plan.seconds == str(seconds)


def test_a_size_the_model_was_not_trained_for_is_refused_with_those_it_was() -> None:
    error = refusal_of(size="128x128")
    assert error.param == "size" and "640x384, 384x640" in str(error)


def test_a_length_the_model_was_not_trained_for_is_refused_with_the_longest() -> None:
    error = refusal_of(seconds=10)
    assert error.param == "seconds" and "at most 121 (5.04 s)" in str(error)


def test_where_the_model_sets_no_bound_the_limits_do() -> None:
    anything = Capabilities()
    assert refusal_of(anything, size="99968x99968").param == "size"
    assert refusal_of(anything, seconds=3600).param == "seconds"
    assert refusal_of(anything, size="100x64").param == "size"
    limits = RequestLimits(max_num_inference_steps=5, max_prompt_characters=3, max_picture_bytes=2)
    for param, value in (("num_inference_steps", 6), ("negative_prompt", "four"), ("input_reference", b"png")):
        with pytest.raises(RequestError, match=f"^{param}") as caught:
            ServedModel("mini", FAMILY, anything, limits).plan(parse_request({"prompt": "a", param: value}))
        assert caught.value.param == param


def test_what_is_not_asked_for_keeps_to_the_limits_too() -> None:
    request = parse_request({"prompt": "a red ball"})
    limits = RequestLimits(max_num_latent_frames=3, max_num_inference_steps=4)
    plan = ServedModel("mini", FAMILY, CAPABILITIES, limits).plan(request)
    assert (plan.num_units, settings_of(plan).num_inference_steps) == (3, (4, 4, 4))
    with pytest.raises(RequestError, match="size=640x384: 245760 pixels, at most 4096"):
        ServedModel("mini", FAMILY, CAPABILITIES, RequestLimits(max_pixels=4096)).plan(request)


def test_another_model_is_refused_with_the_one_there_is() -> None:
    error = refusal_of(model="sora-2")
    assert error.param == "model" and "'mini'" in str(error)
    assert error.code == MODEL_NOT_FOUND
    assert refusal_of(size="128x128").code is None


def test_a_picture_for_a_single_frame_is_refused() -> None:
    assert refusal_of(seconds=0.01, input_reference=b"png").param == "input_reference"


def test_steps_count_over_stages_and_units_without_a_given_picture() -> None:
    assert record_of(num_inference_steps=2, video_num_inference_steps=1, seconds=1).plan.num_steps == 6 + 3 * 3
    assert record_of(video_num_inference_steps=1, seconds=1, input_reference=b"png").plan.num_steps == 3 * 3


@pytest.mark.parametrize("fields", [{}, {"guidance_scale": 1.0, "video_guidance_scale": 1.0}])
def test_step_runs_are_the_tokens_that_the_sampler_asks_for(fields: dict[str, Any]) -> None:
    plan = plan_of(num_inference_steps=[3, 2, 1], video_num_inference_steps=[1, 2, 1], **fields)
    for unit in range(plan.num_units):
        history = torch.zeros(16, unit, *latent_shape_of(plan).size_at(2))
        prompt = random_prompt(5)
        steps = denoise_unit(
            prompt, prompt, history, settings=settings_of(plan).sampling, noise=SeededNoise(0, latent_shape_of(plan))
        )
        made: list[tuple[int, ...]] = []
        try:
            sequences = next(steps)
            while True:
                made.append(tuple(sequence.num_tokens for sequence in sequences))
                sequences = steps.send([torch.zeros_like(sequence.clips[-1]) for sequence in sequences])
        except StopIteration:
            pass
        runs = FAMILY.step_runs(plan, unit, num_text_tokens=5)
        assert [run.sequence_tokens for run in runs for _ in range(run.num_steps)] == made


def test_a_unit_that_is_a_picture_has_no_steps() -> None:
    plan = plan_of(input_reference=b"picture")
    assert FAMILY.step_runs(plan, 0, num_text_tokens=5) == []
    assert FAMILY.step_runs(plan, 1, num_text_tokens=5)
