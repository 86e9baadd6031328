"""Errors that came over a handle."""

import json

from fastapi import Request
from ray.exceptions import RayTaskError

from deployments.http.errors import _on_request_error
from pyramid_serve.api import RequestError


def test_the_message_of_an_error_from_another_replica_has_no_traceback() -> None:
    there = RayTaskError("submit", "Traceback ... File /secret/place", RequestError("seed: too large", param="seed"))
    answer = _on_request_error(Request({"type": "http"}), there.as_instanceof_cause())
    assert answer.status_code == 400
    assert json.loads(bytes(answer.body))["error"]["message"] == "seed: too large"
