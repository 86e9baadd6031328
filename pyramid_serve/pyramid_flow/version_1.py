"""Records of version 1, whose ``spec`` was Pyramid Flow's own."""

from collections.abc import Mapping
from typing import Any

from pyramid_serve.pyramid_flow.planning import NAME, units_of
from pyramid_serve.pyramid_flow.request_fields import ShownFields
from pyramid_serve.pyramid_flow.shapes import FRAMES_PER_SECOND

_KEPT = ("model", "prompt", "prompt_suffix", "negative_prompt", "seconds", "width", "height", "seed")


def plan_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the plan that a ``spec`` of version 1 stands for.

    Raises ``ValueError`` or ``KeyError`` if it is not such a spec.
    """
    has_picture = bool(spec.get("has_picture", False))
    # A spec has the guidance of the other units even where linear guidance replaces it.
    is_linear = spec.get("linear_guidance_alpha") is not None
    settings = ShownFields.model_validate({**spec, **({"video_guidance_scale": None} if is_linear else {})})
    units = units_of(spec["width"], spec["height"], spec["num_latent_frames"], settings, has_picture=has_picture)
    return {
        "family": NAME,
        **{name: spec[name] for name in _KEPT},
        "fps": FRAMES_PER_SECOND,
        "has_picture": has_picture,
        "units": [run.model_dump() for run in units],
        "settings": settings.model_dump(mode="json"),
    }
