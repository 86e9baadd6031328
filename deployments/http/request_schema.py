"""What the OpenAPI document says about a request for a video. ``pyramid_serve.api`` checks it, not this schema."""

from deployments.http.answer_schema import Schema
from deployments.http.body import JSON_TYPE
from deployments.http.forms import FORM_TYPE
from deployments.videos.videos import ServedModel
from pyramid_serve.api import (
    MAX_GUIDANCE,
    MAX_METADATA_KEY_CHARACTERS,
    MAX_METADATA_PAIRS,
    MAX_METADATA_VALUE_CHARACTERS,
    MAX_SEED,
    MAX_SIDE,
    MAX_USER_CHARACTERS,
    longest_of,
)
from pyramid_serve.pyramid_flow.sampler import LinearGuidance
from pyramid_serve.pyramid_flow.shapes import FRAMES_PER_SECOND, NUM_STAGES, SIZE_MULTIPLE, num_frames_of, seconds_of

MAX_KEY_CHARACTERS = 255
"""Of an Idempotency-Key."""

IDEMPOTENCY_KEY: Schema = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": MAX_KEY_CHARACTERS},
    "description": "The same key again gives the same video, and 400 where the request is another.",
}

_GUIDANCE = {"type": "number", "minimum": 0, "maximum": MAX_GUIDANCE}
_TEXT_RULE = "No control characters but newline and tab."
_PICTURE_FILE = {
    "type": "string",
    "format": "binary",
    "description": "A picture that the video begins with: PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF or HEIC.",
}
_PICTURE_URL = {
    "type": "object",
    "properties": {"image_url": {"type": "string", "pattern": "^data:image/[a-z+.-]+;base64,"}},
    "required": ["image_url"],
    "additionalProperties": False,
    "description": "A picture that the video begins with, as a base64 data URL. Nothing is fetched from elsewhere.",
}


def create_body(model: ServedModel) -> Schema:
    """The request body of a video made with this model, in the form of OpenAPI."""
    return {
        "required": True,
        "content": {
            JSON_TYPE: {
                "schema": _request_schema(model, _PICTURE_URL),
                "examples": {
                    "prompt": {"summary": "A prompt alone", "value": {"prompt": "a red ball rolls to the left"}},
                    "settings": {
                        "summary": "Everything that decides the video",
                        "value": {
                            "prompt": "a red ball rolls to the left",
                            "seconds": "2",
                            "seed": 7,
                            "num_inference_steps": [4, 4, 4],
                            "video_num_inference_steps": 2,
                            "guidance_scale": 7.0,
                            "video_guidance_scale": 5.0,
                        },
                    },
                },
            },
            FORM_TYPE: {"schema": _request_schema(model, _PICTURE_FILE)},
        },
    }


def _request_schema(model: ServedModel, input_reference: Schema) -> Schema:
    return {
        "type": "object",
        "required": ["prompt"],
        "additionalProperties": False,
        "properties": {
            "prompt": {**_text_schema(model, _TEXT_RULE), "minLength": 1, "pattern": r"\S"},
            "model": {"type": "string", "enum": [model.name]},
            **_length_schemas(model),
            **_size_schemas(model),
            "input_reference": input_reference,
            "negative_prompt": _text_schema(model, f"What the video is not to show. {_TEXT_RULE}"),
            "prompt_suffix": _text_schema(model, "Added to the prompt; the model's own unless given."),
            "seed": {
                "type": "integer",
                "minimum": -1,
                "maximum": MAX_SEED,
                "description": "The same seed gives the same video; drawn and told unless given, and for -1.",
            },
            "num_inference_steps": _steps_schema(model, "Of the first unit."),
            "video_num_inference_steps": _steps_schema(model, "Of the other units."),
            "guidance_scale": {**_GUIDANCE, "description": "Of the first unit."},
            "video_guidance_scale": {**_GUIDANCE, "description": "Of the other units."},
            **_linear_guidance_schemas(),
            "user": {
                "type": "string",
                "maxLength": MAX_USER_CHARACTERS,
                "description": "Whom the video is for. Kept and given back.",
            },
            "metadata": {
                "type": "object",
                "maxProperties": MAX_METADATA_PAIRS,
                "propertyNames": {"minLength": 1, "maxLength": MAX_METADATA_KEY_CHARACTERS},
                "additionalProperties": {"type": "string", "maxLength": MAX_METADATA_VALUE_CHARACTERS},
                "description": "Notes of the client. Kept and given back. In a form: fields like metadata[key], or one "
                "field with a JSON object.",
            },
        },
    }


def _text_schema(model: ServedModel, description: str) -> Schema:
    return {"type": "string", "maxLength": model.limits.max_prompt_characters, "description": description}


def _length_schemas(model: ServedModel) -> dict[str, Schema]:
    longest = longest_of(model.capabilities, model.limits)
    num_frames, seconds = num_frames_of(longest), round(seconds_of(longest), 3)
    return {
        "seconds": {
            "description": f"Length, at most {seconds:g}; brought to the nearest that the model makes.",
            "anyOf": [
                {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?$"},
                {"type": "number", "exclusiveMinimum": 0, "maximum": seconds},
            ],
        },
        "num_frames": {
            "description": "The length in frames, instead of seconds; brought to the nearest that the model makes.",
            "type": "integer",
            "minimum": 1,
            "maximum": num_frames,
        },
        "fps": {
            "description": "Frames a second; the model makes no other number.",
            "type": "integer",
            "enum": [FRAMES_PER_SECOND],
        },
    }


def _size_schemas(model: ServedModel) -> dict[str, Schema]:
    sizes = model.capabilities.sizes
    size: Schema = {"type": "string", "description": "WIDTHxHEIGHT in pixels."}
    width: Schema = {"type": "integer", "description": "Pixels; with height, instead of size."}
    height: Schema = {"type": "integer", "description": "Pixels; with width, instead of size."}
    if sizes is None:
        size["pattern"] = "^[1-9][0-9]{0,4}[xX*][1-9][0-9]{0,4}$"
        size["description"] += f" Width times height is at most {model.limits.max_pixels}."
        for side in (width, height):
            side["minimum"] = side["multipleOf"] = SIZE_MULTIPLE
            side["maximum"] = model.capabilities.max_side or MAX_SIDE
    else:
        size["enum"] = [f"{width}x{height}" for width, height in sizes]
        width["enum"] = sorted({width for width, _ in sizes})
        height["enum"] = sorted({height for _, height in sizes})
    return {"size": size, "width": width, "height": height}


def _steps_schema(model: ServedModel, which: str) -> Schema:
    number = {"type": "integer", "minimum": 1, "maximum": model.limits.max_num_inference_steps}
    return {
        "description": f"{which} Denoising steps: one number, or one for each of the {NUM_STAGES} stages.",
        "oneOf": [number, {"type": "array", "items": number, "minItems": NUM_STAGES, "maxItems": NUM_STAGES}],
    }


def _linear_guidance_schemas() -> dict[str, Schema]:
    default = LinearGuidance()
    return {
        "linear_guidance_alpha": {
            **_GUIDANCE,
            "description": "Guidance falls by so much with each unit, instead of being video_guidance_scale. "
            f"{default.alpha:g} where only linear_guidance_minimum is given.",
        },
        "linear_guidance_minimum": {
            **_GUIDANCE,
            "description": "Where linear guidance stops falling. "
            f"{default.minimum:g} where only linear_guidance_alpha is given.",
        },
    }
