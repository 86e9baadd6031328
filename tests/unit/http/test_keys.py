"""Keys: only a whole key passes, and a wrong one waits."""

import asyncio
import logging
import time

import pytest
from pydantic import ValidationError

from deployments.config import AppConfig
from deployments.http.config import HttpConfig
from deployments.http.errors import ApiError
from deployments.http.keys import WRONG_KEY_PAUSE_S, Keys


def answer(keys: Keys, authorization: str) -> int:
    """The status with which a request with this header is answered."""
    try:
        asyncio.run(keys.check(authorization, address="192.0.2.7"))
    except ApiError as error:
        return error.status
    return 200


@pytest.mark.parametrize("authorization", ["", "Bearer", "Bearer ", "Bearer  ", "bearer\t", "secret", "Basic secret"])
def test_no_key_never_passes(authorization: str) -> None:
    assert answer(Keys(["secret"]), authorization) == 401


def test_a_bearer_without_a_key_does_not_pass_even_where_a_key_is_empty() -> None:
    assert answer(Keys([""]), "Bearer ") == 401


@pytest.mark.parametrize("authorization", ["Bearer secret", "bearer secret", "Bearer  secret ", "BEARER other"])
def test_each_key_passes_at_once(authorization: str) -> None:
    started = time.monotonic()
    assert answer(Keys(["secret", "other"]), authorization) == 200
    assert time.monotonic() - started < WRONG_KEY_PAUSE_S


def test_without_keys_everything_passes() -> None:
    assert answer(Keys([]), "") == 200


def test_a_wrong_key_waits_and_is_logged_with_the_address_alone(caplog: pytest.LogCaptureFixture) -> None:
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert answer(Keys(["secret"]), "Bearer guessed") == 401
    assert time.monotonic() - started >= WRONG_KEY_PAUSE_S
    assert [record.getMessage() for record in caplog.records] == ["a wrong API key from 192.0.2.7"]


def test_no_more_than_a_hundred_wrong_keys_wait() -> None:
    keys = Keys(["secret"])

    async def guess() -> float:
        started = time.monotonic()
        with pytest.raises(ApiError):
            await keys.check("Bearer guessed", address="192.0.2.7")
        return time.monotonic() - started

    async def guess_often() -> list[float]:
        return await asyncio.gather(*(guess() for _ in range(130)))

    waited = asyncio.run(guess_often())
    assert sum(seconds >= WRONG_KEY_PAUSE_S for seconds in waited) == 100


@pytest.mark.parametrize("key", ["", " ", " secret", "secret\n", "schlüssel", "a\x00b"], ids=repr)
def test_a_key_that_no_request_could_match_is_refused_at_the_start_and_not_told(key: str) -> None:
    with pytest.raises(
        ValidationError, match="must be printable ASCII characters, without spaces around them"
    ) as caught:
        AppConfig.model_validate({"models": [{}], "ingress": {"settings": {"api_keys": ["right", key]}}})
    assert "api_keys.1" in str(caught.value)
    assert not key.strip() or key.strip() not in str(caught.value)
    with pytest.raises(ValidationError):
        HttpConfig(api_keys=(key,))
