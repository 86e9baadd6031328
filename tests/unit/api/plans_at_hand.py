"""A model that makes plans, for tests."""

from typing import Any

import pytest

from pyramid_serve.api import Plan, RequestError, RequestLimits, VideoRecord, new_record, parse_request
from pyramid_serve.pyramid_flow.capabilities import Capabilities
from pyramid_serve.pyramid_flow.family import FAMILY
from pyramid_serve.served_model import ServedModel

CAPABILITIES = Capabilities(sizes=((640, 384), (384, 640)), max_num_latent_frames=16, default_num_latent_frames=8)
SMALL = Capabilities()
"""Makes every legal size."""
MODEL = ServedModel("mini", FAMILY, CAPABILITIES, RequestLimits())


def refusal_of(capabilities: Capabilities = CAPABILITIES, **fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        ServedModel("mini", FAMILY, capabilities, RequestLimits()).plan(
            parse_request({"prompt": "a red ball", **fields})
        )
    return caught.value


def plan_of(capabilities: Capabilities = CAPABILITIES, **fields: Any) -> Plan:
    model = ServedModel("mini", FAMILY, capabilities, RequestLimits())
    return model.plan(parse_request({"prompt": "a red ball", **fields}))


def record_of(**fields: Any) -> VideoRecord:
    return new_record(plan_of(**fields))
