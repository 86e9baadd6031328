import pytest

from deployments.http.strict_json import RepeatedNameError, load_json


def test_valid_json_is_loaded() -> None:
    assert load_json('{"a": [1, 2.5, null, true, "b"], "c": {"a": {}}}') == {
        "a": [1, 2.5, None, True, "b"],
        "c": {"a": {}},
    }


def test_a_name_given_twice_in_an_object_is_refused_at_any_depth() -> None:
    with pytest.raises(RepeatedNameError) as caught:
        load_json('{"a": {"b": 1, "b": 1}}')
    assert caught.value.name == "b"


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": -Infinity}', "{", "", "'a'"])
def test_what_is_no_standard_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        load_json(text)
