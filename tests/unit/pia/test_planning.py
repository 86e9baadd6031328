from pathlib import Path
from typing import Any

import pytest

from pyramid_serve.api.errors import RequestError
from pyramid_serve.api.limits import RequestLimits
from pyramid_serve.pia.family import FAMILY
from pyramid_serve.pia.planning import settings_of
from tests.unit.pia.models_at_hand import change, copied, picture_file, plan_of, with_settings


def test_a_video_is_one_unit_of_16_frames_at_8_fps() -> None:
    plan = plan_of()
    assert (plan.family, plan.num_units, plan.num_frames, plan.fps, plan.seconds) == ("pia", 1, 16, 8, "2")
    assert plan.unit(0).latent_shape == (4, 16, 4, 8)
    assert (plan.unit(0).num_steps, plan.is_conditioned_on_picture) == (25, True)


def test_what_is_left_out_is_the_models_own(tmp_path: Path) -> None:
    settings = {"num_inference_steps": 7, "guidance_scale": 3.5, "scheduler": "euler", "motion": "large"}
    plan = plan_of(with_settings(tmp_path / "m", negative_prompt="grey", prompt_suffix=", sharp", **settings))
    assert (plan.negative_prompt, plan.full_prompt) == ("grey", "a cat, sharp")
    assert settings.items() <= plan.settings.items()
    assert (plan.settings["mode"], plan.settings["strength"], plan.settings["free_init"]) == ("animate", 1.0, None)


def test_the_seed_is_drawn_where_none_is_given() -> None:
    assert plan_of(seed=None).seed != plan_of(seed=None).seed


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        ((16, 8), (16, 8)),
        ((1600, 900), (16, 8)),
        ((900, 1600), (8, 16)),
        ((50, 50), (16, 16)),
        ((1000, 10), (16, 4)),
    ],
)
def test_the_size_is_that_of_the_picture_brought_to_the_long_edge(
    picture: tuple[int, int], expected: tuple[int, int]
) -> None:
    plan = plan_of(input_reference=picture_file(*picture))
    assert (plan.width, plan.height) == expected


def test_a_picture_on_its_side_is_measured_upright() -> None:
    plan = plan_of(input_reference=picture_file(160, 80, orientation=6))
    assert (plan.width, plan.height) == (8, 16)


def test_a_size_that_is_asked_for_is_made_whatever_the_picture() -> None:
    plan = plan_of(size="24x20")
    assert (plan.width, plan.height, plan.unit(0).latent_shape) == (24, 20, (4, 16, 10, 12))


def test_the_long_edge_is_cut_to_the_limit_on_pixels(tmp_path: Path) -> None:
    plan = plan_of(with_settings(tmp_path / "m", long_edge=512), limits=RequestLimits(max_pixels=64 * 64))
    assert (plan.width, plan.height) == (64, 32)


@pytest.mark.parametrize(("seconds", "num_frames"), [(2, 16), (1.5, 12), (0.1, 8), (4, 32)])
def test_seconds_are_brought_to_the_nearest_number_of_frames(seconds: float, num_frames: int) -> None:
    assert plan_of(seconds=seconds).num_frames == num_frames


@pytest.mark.parametrize(
    ("fields", "num_steps"),
    [
        ({"num_inference_steps": 4}, 4),
        ({"num_inference_steps": 4, "scheduler": "pndm"}, 5),
        ({"num_inference_steps": 4, "strength": 0.5}, 2),
        ({"num_inference_steps": 4, "free_init": {}}, 12),
        ({"num_inference_steps": 6, "free_init": '{"use_fast_sampling": true}'}, 12),
        ({"num_inference_steps": 6, "free_init": {"use_fast_sampling": True}, "scheduler": "pndm"}, 15),
    ],
)
def test_the_steps_of_a_plan_are_all_that_are_made(fields: dict[str, Any], num_steps: int) -> None:
    assert plan_of(**fields).num_steps == num_steps


def test_a_motion_scale_is_a_mode_and_a_motion() -> None:
    settings = plan_of(motion_scale="5").settings
    assert (settings["mode"], settings["motion"]) == ("loop", "large")


def test_style_is_taken_where_the_base_is_said_to_have_one(tmp_path: Path) -> None:
    assert plan_of(with_settings(tmp_path / "m", personalised=True), mode="style").settings["mode"] == "style"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input_reference": None}, "input_reference", "input_reference: is required"),
        ({"input_reference": b"text"}, "input_reference", "input_reference: not a readable image: it is none of"),
        ({"mode": "walk"}, "mode", "mode='walk': input should be 'animate', 'loop' or 'style'"),
        ({"motion": "huge"}, "motion", "motion='huge': input should be 'small'"),
        ({"motion_scale": -1}, "motion_scale", "motion_scale=-1: input should be greater than or equal to 0"),
        ({"motion_scale": 9}, "motion_scale", "motion_scale=9: input should be less than or equal to 8"),
        ({"motion_scale": True}, "motion_scale", "motion_scale=True: must be a number"),
        ({"motion_scale": 1, "mode": "loop"}, "motion_scale", "motion_scale=1: contradicts mode=loop"),
        ({"motion_scale": 1, "motion": "small"}, "motion_scale", "motion_scale=1: contradicts motion=small"),
        ({"mode": "style"}, "mode", "mode=style: needs a model with a style of its own"),
        ({"motion_scale": 6}, "motion_scale", "motion_scale=6: needs a model with a style of its own"),
        ({"num_frames": 7}, "num_frames", "num_frames=7: must be from 8 to 32"),
        ({"num_frames": 33}, "num_frames", "num_frames=33: must be from 8 to 32"),
        ({"seconds": 5}, "seconds", r"seconds=5: 40 frames at 8 fps; at most 32 \(4 s\)"),
        ({"seconds": 2, "num_frames": 8}, "num_frames", "num_frames=8: contradicts seconds=2, which is 16 frames"),
        ({"fps": 24}, "fps", "fps=24: must be 8"),
        ({"size": "18x16"}, "size", "size=18x16: width and height must be positive multiples of 4"),
        ({"width": 16, "height": 6}, "width", "width=16, height=6: width and height must be"),
        ({"size": "4000x4000"}, "size", "size=4000x4000: 16000000 pixels, at most"),
        ({"num_inference_steps": 0}, "num_inference_steps", "num_inference_steps=0: input should be greater"),
        ({"num_inference_steps": 101}, "num_inference_steps", "num_inference_steps=101: at most 100"),
        (
            {"num_inference_steps": 51, "scheduler": "lcm"},
            "num_inference_steps",
            "num_inference_steps=51: at most 50 with scheduler=lcm",
        ),
        ({"scheduler": "heun"}, "scheduler", "scheduler='heun': input should be 'ddim'"),
        ({"guidance_scale": 101}, "guidance_scale", "guidance_scale=101: input should be less"),
        ({"strength": 0}, "strength", "strength=0: input should be greater than 0"),
        ({"strength": 1.1}, "strength", "strength=1.1: input should be less than or equal to 1"),
        ({"strength": 0.03}, "strength", "strength=0.03: leaves none of num_inference_steps=25; must be at least 0.04"),
        ({"strength": 0.5, "free_init": {}}, "strength", "strength=0.5: cannot be combined with free_init"),
        ({"free_init": {"num_iters": 6}}, "free_init", r"free_init\['num_iters'\]=6: input should be less"),
        ({"free_init": {"methods": "ideal"}}, "free_init", r"free_init\['methods'\]: unknown key"),
        ({"free_init": {}, "scheduler": "euler", "num_inference_steps": 1}, "scheduler", "scheduler=euler: cannot be"),
        (
            {"free_init": {"use_fast_sampling": True}, "scheduler": "euler", "num_inference_steps": 5},
            "scheduler",
            "scheduler=euler: cannot be combined with a free_init that makes the video in one step",
        ),
        (
            {"strength": 0.3, "num_inference_steps": 3},
            "strength",
            "strength=0.3: leaves none of num_inference_steps=3; must be at least 0.334",
        ),
        ({"free_init": "three"}, "free_init", "free_init='three': must be a JSON object"),
        ({"clip_skip": 4}, "clip_skip", "clip_skip=4: input should be less than or equal to 3"),
        ({"free_u": {}}, "free_u", "free_u: unknown field; known are"),
        ({"lora": "x"}, "lora", "lora: unknown field"),
    ],
)
def test_what_cannot_be_made_is_refused_by_name(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(RequestError, match=f"^{message}") as refused:
        plan_of(**fields)
    assert refused.value.param == param


@pytest.mark.parametrize("scheduler", ["euler", "dpm++"])
def test_free_init_is_refused_where_leading_steps_leave_out_the_last_timestep(tmp_path: Path, scheduler: str) -> None:
    assert plan_of(scheduler=scheduler, free_init={}).settings["scheduler"] == scheduler
    model = copied(tmp_path)
    change(model / "scheduler" / "scheduler_config.json", timestep_spacing="leading")
    assert plan_of(model, scheduler="ddim", free_init={}).settings["scheduler"] == "ddim"
    with pytest.raises(
        RequestError, match=rf"^scheduler={scheduler.replace('+', '.')}: cannot be combined with free_init"
    ):
        plan_of(model, scheduler=scheduler, free_init={})


@pytest.mark.parametrize("fields", [{"num_inference_steps": 6}, {"num_inference_steps": 1, "num_iters": 1}])
def test_euler_may_go_with_free_init_where_it_has_steps_enough(fields: dict[str, Any]) -> None:
    steps, num_iters = fields["num_inference_steps"], fields.get("num_iters", 3)
    free_init = {"use_fast_sampling": True, "num_iters": num_iters}
    assert plan_of(scheduler="euler", num_inference_steps=steps, free_init=free_init).settings["scheduler"] == "euler"


def test_there_are_fewer_steps_than_timesteps() -> None:
    limits = RequestLimits(max_num_inference_steps=1000)
    assert plan_of(limits=limits, num_inference_steps=999).num_steps == 999
    with pytest.raises(RequestError, match="num_inference_steps=1000: at most 999"):
        plan_of(limits=limits, num_inference_steps=1000)


def test_a_default_of_too_many_steps_for_lcm_is_cut(tmp_path: Path) -> None:
    model = with_settings(tmp_path / "m", num_inference_steps=60)
    assert plan_of(model, scheduler="lcm").settings["num_inference_steps"] == 50


def test_clip_skip_is_bounded_by_the_layers_that_there_are(tmp_path: Path) -> None:
    model = copied(tmp_path)
    change(model / "text_encoder" / "config.json", num_hidden_layers=2)
    with pytest.raises(RequestError, match="clip_skip=3: at most 2"):
        plan_of(model, clip_skip=3)


def test_a_plan_of_another_family_is_not_read() -> None:
    with pytest.raises(ValueError, match="family='noise': must be 'pia'"):
        settings_of(plan_of().model_copy(update={"family": "noise"}))


def test_the_offer_tells_defaults_and_what_each_field_may_be(tmp_path: Path) -> None:
    able = FAMILY.capabilities(with_settings(tmp_path / "m"), None)
    offer = FAMILY.offer(able, RequestLimits(max_num_inference_steps=20))
    assert (offer.default_size, offer.fps, offer.default_num_frames, offer.max_num_frames) == ((16, 16), 8, 16, 32)
    assert (offer.side_multiple, offer.sizes, offer.max_seconds) == (4, None, 4)
    assert offer.defaults["num_inference_steps"] == offer.field_schemas["num_inference_steps"]["maximum"] == 20
    assert offer.field_schemas["mode"]["enum"] == ["animate", "loop", "style"]
    assert offer.field_schemas["free_init"]["properties"]["num_iters"]["maximum"] == 5
    assert offer.fields_with_several_values == frozenset()
