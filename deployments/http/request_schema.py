"""What the OpenAPI document says about a request for a video: pydantic's schema, narrowed to what is offered."""

from collections.abc import Sequence

from deployments.http.answer_schema import Schema
from deployments.http.body import JSON_TYPE
from deployments.http.forms import FORM_TYPE
from pyramid_serve.api.offers import Offer, field_schemas_of
from pyramid_serve.api.requests import MAX_METADATA_PAIRS, MAX_SEED, VideoRequest
from pyramid_serve.served_model import ServedModel, ServedModels

MAX_KEY_CHARACTERS = 255
"""Of an Idempotency-Key."""

IDEMPOTENCY_KEY: Schema = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": MAX_KEY_CHARACTERS},
    "description": "The same key again gives the same video, and 400 where the request is another.",
}

_PICTURE_FILE = {
    "type": "string",
    "format": "binary",
    "description": "A picture that the video is made from: PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF or HEIC.",
}
_PICTURE_URL = {
    "type": "object",
    "properties": {"image_url": {"type": "string", "pattern": "^data:image/[a-z+.-]+;base64,"}},
    "required": ["image_url"],
    "additionalProperties": False,
    "description": "A picture that the video is made from, as a base64 data URL. Nothing is fetched from elsewhere.",
}


def create_body(models: ServedModels) -> Schema:
    """The request body of a video made with one of these models, in the form of OpenAPI."""
    first = models.models[0]
    example = {"prompt": "a red ball rolls to the left"}
    everything = {**example, "seconds": f"{first.offer.default_seconds:.3g}", "seed": 7, **first.offer.defaults}
    return {
        "required": True,
        "content": {
            JSON_TYPE: {
                "schema": _any_of([_request_schema(model, _PICTURE_URL) for model in models.models]),
                "examples": {
                    "prompt": {"summary": "A prompt alone", "value": example},
                    "settings": {"summary": "Everything that decides the video", "value": everything},
                },
            },
            FORM_TYPE: {"schema": _any_of([_request_schema(model, _PICTURE_FILE) for model in models.models])},
        },
    }


def remix_body() -> Schema:
    """The request body of a remix, in the form of OpenAPI. The model's limit on the prompt is not known here."""
    common = _common_fields()
    common["seed"]["description"] = "That of the video unless given; drawn for -1."
    schema = {
        "type": "object",
        "required": ["prompt"],
        "additionalProperties": False,
        "properties": {name: common[name] for name in ("prompt", "seed", "user", "metadata")},
    }
    return {"required": True, "content": {kind: {"schema": schema} for kind in (JSON_TYPE, FORM_TYPE)}}


def _common_fields() -> Schema:
    """The fields of every request, with the bounds that pydantic does not tell."""
    fields = field_schemas_of(VideoRequest)
    fields["prompt"] |= {"minLength": 1, "pattern": r"\S"}
    fields["seed"]["maximum"] = MAX_SEED
    fields["metadata"]["maxProperties"] = MAX_METADATA_PAIRS
    fields["metadata"]["description"] += " In a form: fields like metadata[key], or one field with a JSON object."
    return fields


def _any_of(schemas: Sequence[Schema]) -> Schema:
    return schemas[0] if len(schemas) == 1 else {"anyOf": list(schemas)}


def _request_schema(model: ServedModel, input_reference: Schema) -> Schema:
    common = _common_fields()
    for name in ("prompt", "negative_prompt", "prompt_suffix"):
        common[name]["maxLength"] = model.limits.max_prompt_characters
    common["model"]["enum"] = [model.name]
    common["input_reference"] = input_reference
    _narrow_length(common, model.offer)
    _narrow_size(common, model.offer, max_pixels=model.limits.max_pixels)
    return {
        "type": "object",
        "required": ["prompt"],
        "additionalProperties": False,
        "properties": {**common, **model.offer.field_schemas},
    }


def _narrow_length(fields: Schema, offer: Offer) -> None:
    longest = round(offer.max_seconds, 3)
    fields["seconds"] = {
        "description": f"Length, at most {longest:g}, brought to the nearest that the model makes.",
        "anyOf": [
            {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?$"},
            {"type": "number", "exclusiveMinimum": 0, "maximum": longest},
        ],
    }
    fields["num_frames"]["maximum"] = offer.max_num_frames
    fields["fps"] |= {"type": "integer", "enum": [offer.fps]}


def _narrow_size(fields: Schema, offer: Offer, *, max_pixels: int) -> None:
    size, width, height = (fields[name] for name in ("size", "width", "height"))
    if offer.sizes is None:
        size["pattern"] = "^[1-9][0-9]{0,4}[xX*][1-9][0-9]{0,4}$"
        size["description"] += f" Width times height is at most {max_pixels}."
        for side in (width, height):
            side["minimum"] = side["multipleOf"] = offer.side_multiple
            side["maximum"] = offer.max_side or side["maximum"]
    else:
        size["enum"] = [f"{width}x{height}" for width, height in offer.sizes]
        width["enum"] = sorted({width for width, _ in offer.sizes})
        height["enum"] = sorted({height for _, height in offer.sizes})
