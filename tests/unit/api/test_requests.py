import pickle

import pytest

from pyramid_serve.api import RequestError, parse_request
from tests.unit.api.plans_at_hand import refusal_of


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


@pytest.mark.parametrize("size", ["640x384", "640X384", "640*384"])
def test_a_size_is_written_in_several_ways(size: str) -> None:
    assert parse_request({"prompt": "a", "size": size}).size == "640x384"


def test_an_unknown_field_is_refused_with_those_that_are_known() -> None:
    error = refusal_of(num_steps=3)
    assert error.param == "num_steps"
    assert str(error).startswith("num_steps: unknown field; known are prompt, ")
    assert "num_inference_steps" in str(error)
