import json
import pickle
from typing import Any

import pytest

from pyramid_serve.api import (
    MODEL_NOT_FOUND,
    RequestError,
    RequestLimits,
    Status,
    VideoError,
    VideoRecord,
    VideoRequest,
    created_at_of,
    is_video_id,
    new_record,
    new_video_id,
    parse_request,
    resolve,
)
from pyramid_serve.checkpoints import Capabilities
from pyramid_serve.pyramid_flow.sampler import LinearGuidance

CAPABILITIES = Capabilities(sizes=((640, 384), (384, 640)), max_num_latent_frames=16, default_num_latent_frames=8)
CONTRACT_KEYS = [
    *("id", "object", "model", "status", "progress", "created_at", "completed_at", "expires_at", "prompt", "size"),
    *("seconds", "remixed_from_video_id", "error"),
]


def refusal_of(capabilities: Capabilities = CAPABILITIES, **fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        resolve(parse_request({"prompt": "a red ball", **fields}), capabilities, "mini")
    return caught.value


def record_of(**fields: Any) -> VideoRecord:
    return new_record(resolve(parse_request({"prompt": "a red ball", **fields}), CAPABILITIES, "mini"))


# --- requests ---


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("prompt", "  "),
        ("prompt", 3),
        ("prompt", "\ud800"),
        ("prompt", "nul \0"),
        ("prompt", None),
        ("model", 3),
        ("seconds", "soon"),
        ("seconds", 0),
        ("seconds", -1),
        ("seconds", float("nan")),
        ("seconds", "inf"),
        ("seconds", True),
        ("seconds", 10**9),
        ("size", "640"),
        ("size", "640*384*2"),
        ("size", "640 x 384"),
        ("width", 640.5),
        ("width", True),
        ("height", "tall"),
        ("num_frames", 0),
        ("num_frames", True),
        ("num_frames", 10**9),
        ("size", "0x384"),
        ("size", "-640x384"),
        ("size", "640x384 "),
        ("size", 640),
        ("size", "9999999999x1"),
        ("seed", -2),
        ("seed", 2**64),
        ("seed", 1.5),
        ("seed", True),
        ("num_inference_steps", 0),
        ("num_inference_steps", [1, 2]),
        ("num_inference_steps", [1, 2, 0]),
        ("num_inference_steps", [1, 2, True]),
        ("num_inference_steps", "many"),
        ("num_inference_steps", "[" * 100_000),
        ("num_inference_steps", "9" * 5000),
        ("num_inference_steps", 2.5),
        ("num_inference_steps", True),
        ("num_inference_steps", {}),
        ("video_num_inference_steps", "1,2"),
        ("video_num_inference_steps", 1001),
        ("guidance_scale", -0.1),
        ("guidance_scale", 101),
        ("guidance_scale", "nan"),
        ("video_guidance_scale", "strong"),
        ("negative_prompt", 3),
        ("negative_prompt", "\udfff"),
        ("prompt_suffix", []),
        ("input_reference", 3),
        ("fps", 30),
        ("fps", "nan"),
        ("fps", True),
        ("user", 3),
        ("user", "u" * 513),
        ("metadata", "text"),
        ("metadata", {"a": 1}),
        ("metadata", {"k" * 65: "a"}),
        ("metadata", {"a": "v" * 513}),
        ("metadata", {str(number): "" for number in range(17)}),
        ("linear_guidance_alpha", -1),
        ("linear_guidance_minimum", 101),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(param: str, value: object) -> None:
    error = refusal_of(**{param: value})
    assert error.param == param
    assert str(error).startswith(param)
    assert "\n" not in str(error)


def test_a_missing_prompt_is_named() -> None:
    with pytest.raises(RequestError, match=r"^prompt: is required") as caught:
        parse_request({})
    assert caught.value.param == "prompt"


def test_a_refusal_comes_through_pickle_whole() -> None:
    error = pickle.loads(pickle.dumps(RequestError("model: no", param="model", code="model_not_found")))
    assert (str(error), error.param, error.code) == ("model: no", "model", "model_not_found")


@pytest.mark.parametrize("name", ["prompt", "negative_prompt", "prompt_suffix", "model", "user"])
def test_text_has_no_control_characters(name: str) -> None:
    for code in (*range(9), 0x0B, 0x0C, 0x0D, *range(0x0E, 0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), 0x2069):
        error = refusal_of(**{name: f"ab{chr(code)}c"})
        assert error.param == name
        assert f"has U+{code:04X} at character 3" in str(error)
        assert chr(code) not in str(error)


def test_text_may_have_lines_tabs_and_any_script() -> None:
    text = "line\n\ttab\r\n日本語 größer 👩\u200d🚀 e\u0301"
    assert parse_request({"prompt": text, "user": text, "metadata": {text: text}}).prompt == text


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
    assert parse_request(form) == parse_request(as_json)
    assert parse_request({"prompt": "a", "num_inference_steps": "1,2,3"}).num_inference_steps == (1, 2, 3)
    assert parse_request({"prompt": "a", "num_inference_steps": ["5"]}).num_inference_steps == (5, 5, 5)


# --- other names of the same ---


@pytest.mark.parametrize("size", ["640x384", "640X384", "640*384"])
def test_a_size_is_written_in_several_ways(size: str) -> None:
    assert parse_request({"prompt": "a", "size": size}).size == "640x384"


def test_width_and_height_are_a_size() -> None:
    for fields in ({"width": 384, "height": "640"}, {"width": "384", "height": 640, "size": "384*640"}):
        spec = record_of(**fields).spec
        assert (spec.width, spec.height) == (384, 640)


@pytest.mark.parametrize(
    ("num_frames", "made"), [(1, 1), (16, 17), (48, 49), ("49", 49), (50, 49), (81, 81), (120, 121), (121, 121)]
)
def test_a_number_of_frames_is_brought_to_the_nearest_that_can_be_made(num_frames: int | str, made: int) -> None:
    spec = record_of(num_frames=num_frames, fps="24").spec
    assert spec.num_frames == made
    assert float(spec.seconds) == pytest.approx(made / 24, abs=0.01)


def test_a_length_may_be_said_in_both_ways() -> None:
    spec = record_of(seconds=2, num_frames=48, fps=24).spec
    assert (spec.num_frames, spec.seconds) == (49, "2")


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


# --- resolve ---


def test_what_is_left_out_is_the_models_choice() -> None:
    spec = resolve(VideoRequest(prompt="a red ball"), CAPABILITIES, "mini")
    assert (spec.width, spec.height, spec.num_latent_frames, spec.seconds) == (640, 384, 8, "2.38")
    assert spec.full_prompt == "a red ball" + CAPABILITIES.prompt_suffix
    assert spec.negative_prompt == CAPABILITIES.negative_prompt
    assert spec.num_inference_steps == (20, 20, 20) and spec.video_num_inference_steps == (10, 10, 10)
    assert (spec.guidance_scale, spec.video_guidance_scale) == (7.0, 5.0)


def test_a_seed_is_drawn_where_none_is_given() -> None:
    seeds = {resolve(VideoRequest(prompt="a"), CAPABILITIES, "mini").seed for _ in range(4)}
    assert len(seeds) > 1
    assert resolve(VideoRequest(prompt="a", seed=0), CAPABILITIES, "mini").seed == 0


@pytest.mark.parametrize("seed", [-1, "-1"])
def test_a_seed_of_minus_one_is_drawn(seed: int | str) -> None:
    seeds = {record_of(seed=seed).spec.seed for _ in range(4)}
    assert len(seeds) > 1
    assert min(seeds) >= 0


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1])
def test_seeds_have_64_bits(seed: int) -> None:
    record = record_of(seed=str(seed))
    assert record.spec.seed == seed
    assert VideoRecord.model_validate_json(record.model_dump_json()) == record


def test_linear_guidance_falls_from_unit_to_unit() -> None:
    spec = record_of(guidance_scale=7, linear_guidance_alpha="1.5", linear_guidance_minimum=3).spec
    assert [spec.sampling.guidance_of(unit) for unit in range(4)] == [7, 5.5, 4, 3]
    assert record_of(linear_guidance_alpha=1).spec.sampling.linear_guidance == LinearGuidance(1, 2)
    assert record_of(linear_guidance_minimum=1).spec.sampling.linear_guidance == LinearGuidance(0.5, 1)
    assert record_of().spec.sampling.linear_guidance is None


def test_the_video_object_tells_which_guidance_is_used() -> None:
    linear = record_of(linear_guidance_alpha=1).public()
    names = ("video_guidance_scale", "linear_guidance_alpha", "linear_guidance_minimum")
    assert [linear[name] for name in names] == [None, 1, 2]
    assert [record_of().public()[name] for name in names] == [5, None, None]


def test_empty_texts_are_not_the_models_own() -> None:
    spec = resolve(VideoRequest(prompt="a", prompt_suffix="", negative_prompt=""), CAPABILITIES, "mini")
    assert (spec.full_prompt, spec.negative_prompt) == ("a", "")


def test_guidance_with_a_picture_is_its_own() -> None:
    spec = resolve(VideoRequest(prompt="a", input_reference=b"png"), CAPABILITIES, "mini")
    assert spec.has_picture and spec.video_guidance_scale == CAPABILITIES.image_video_guidance_scale


@pytest.mark.parametrize(("seconds", "num_frames"), [("4", 97), (1, 25), (0.01, 1), (5, 121), ("2.4", 57)])
def test_a_length_is_brought_to_the_nearest_that_can_be_made(seconds: str | float, num_frames: int) -> None:
    spec = resolve(parse_request({"prompt": "a", "seconds": seconds}), CAPABILITIES, "mini")
    assert spec.num_frames == num_frames
    assert spec.seconds == str(seconds)


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
            resolve(parse_request({"prompt": "a", param: value}), anything, "mini", limits=limits)
        assert caught.value.param == param


def test_what_is_not_asked_for_keeps_to_the_limits_too() -> None:
    request = parse_request({"prompt": "a red ball"})
    limits = RequestLimits(max_num_latent_frames=3, max_num_inference_steps=4)
    spec = resolve(request, CAPABILITIES, "mini", limits=limits)
    assert (spec.num_latent_frames, spec.num_inference_steps) == (3, (4, 4, 4))
    with pytest.raises(RequestError, match="size=640x384: 245760 pixels, at most 4096"):
        resolve(request, CAPABILITIES, "mini", limits=RequestLimits(max_pixels=4096))


def test_another_model_is_refused_with_the_one_there_is() -> None:
    error = refusal_of(model="sora-2")
    assert error.param == "model" and "'mini'" in str(error)
    assert error.code == MODEL_NOT_FOUND
    assert refusal_of(size="128x128").code is None


def test_a_picture_for_a_single_frame_is_refused() -> None:
    assert refusal_of(seconds=0.01, input_reference=b"png").param == "input_reference"


def test_steps_count_over_stages_and_units_without_a_given_picture() -> None:
    assert record_of(num_inference_steps=2, video_num_inference_steps=1, seconds=1).spec.num_steps == 6 + 3 * 3
    assert record_of(video_num_inference_steps=1, seconds=1, input_reference=b"png").spec.num_steps == 3 * 3


# --- ids ---


def test_ids_have_one_form_and_sort_by_time() -> None:
    ids = [new_video_id(created_at) for created_at in (1e9, 1e9 + 0.002, 2e9)]
    assert ids == sorted(ids) and all(map(is_video_id, ids))
    assert created_at_of(ids[0]) == 1e9
    assert len({new_video_id(1e9) for _ in range(100)}) == 100


@pytest.mark.parametrize(
    "text", ["", "video_", "../../etc/passwd", "video_" + "0" * 31, "video_" + "0" * 33, "video_" + "G" * 32]
)
def test_anything_else_is_no_id(text: str) -> None:
    assert not is_video_id(text)
    assert not is_video_id(new_video_id() + "\n")
    with pytest.raises(RequestError):
        created_at_of(text)


# --- records ---


def test_the_video_object_begins_with_the_keys_of_the_contract() -> None:
    public = record_of(seconds="4").public()
    assert list(public)[:13] == CONTRACT_KEYS
    assert (public["object"], public["status"], public["progress"]) == ("video", "queued", 0)
    assert (public["seconds"], public["size"], public["num_frames"]) == ("4", "640x384", 97)
    assert "owner" not in public and "idempotency_key" not in public


def test_progress_is_100_only_at_the_end() -> None:
    record = record_of()
    assert record.changed(num_steps_done=record.spec.num_steps // 2).progress == 50
    assert record.changed(num_steps_done=record.spec.num_steps).progress == 99
    assert record.changed(status=Status.COMPLETED).progress == 100


def test_a_failed_video_has_no_completion_and_tells_why() -> None:
    error = VideoError(code="cancelled", message="no more")
    public = record_of().changed(status=Status.FAILED, error=error, completed_at=3.0).public()
    assert public["completed_at"] is None
    assert public["error"] == {"code": "cancelled", "message": "no more"}


def test_a_record_comes_through_json_whole() -> None:
    record = record_of()
    assert VideoRecord.model_validate_json(record.model_dump_json()) == record


def test_user_and_metadata_are_kept_and_given_back() -> None:
    spec = record_of().spec
    record = new_record(spec, user="me", metadata={"scene": "12"})
    public = VideoRecord.model_validate_json(record.model_dump_json()).public()
    assert (public["user"], public["metadata"]) == ("me", {"scene": "12"})
    public = record_of().public()
    assert (public["user"], public["metadata"]) == (None, None)


def test_records_of_before_are_still_read() -> None:
    record = record_of(seed=3).model_dump(mode="json")
    for name in ("user", "metadata"):
        del record[name]
    for name in ("linear_guidance_alpha", "linear_guidance_minimum"):
        del record["spec"][name]
    record["spec"]["prompt"] = "an \x1b[31m escape and \u202e"
    read = VideoRecord.model_validate_json(json.dumps(record))
    assert read.spec.prompt == record["spec"]["prompt"]
    assert (read.user, read.metadata, read.spec.sampling.linear_guidance) == (None, None, None)


def test_every_change_has_its_revision() -> None:
    record = record_of()
    assert record.changed(owner="a").changed(owner="b").revision == 2
