"""What a failed video tells its client."""

import pytest

from deployments.orchestrator.deployment import _code_of, _describe
from pyramid_serve.api import RequestError
from pyramid_serve.errors import InputError, NonFiniteError


def test_what_the_user_can_change_is_told_by_its_first_line() -> None:
    assert _describe(InputError("picture: not a readable image\nmore")) == "picture: not a readable image"
    assert _describe(NonFiniteError("unit 1: frames: NaN")) == "unit 1: frames: NaN"


@pytest.mark.parametrize("error", [ValueError("/srv/model: 10.0.0.7"), RuntimeError("/srv/model: 10.0.0.7")])
def test_other_errors_name_no_path_and_no_host(error: Exception) -> None:
    assert _describe(error) == f"an error of this server ({type(error).__name__}), which its log tells"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("picture: x"), "invalid_input"),
        (RequestError("size: x", param="size"), "invalid_input"),
        (NonFiniteError("x"), "non_finite"),
        (ValueError("x"), "server_error"),
        (LookupError("x"), "server_error"),
    ],
)
def test_only_what_the_user_can_change_is_blamed_on_the_user(error: Exception, code: str) -> None:
    assert _code_of(error) == code
