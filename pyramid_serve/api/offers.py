"""What a model makes on a server, as its clients are told."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

OFFER_NAMES = frozenset((
    "id", "object", "created", "owned_by", "family", "sizes", "size_multiple", "default_size", "fps",
    "max_seconds", "max_num_frames", "default_seconds", "needs_input_reference", "example_prompts", "request_fields",
))  # fmt: skip
"""The keys of every model object, which no field of a family may have."""


@dataclass(frozen=True)
class Offer:
    """What a model makes within the limits of a server. Sizes are (width, height) in pixels."""

    default_size: tuple[int, int]
    fps: int
    """Frames a second of every video."""
    default_num_frames: int
    max_num_frames: int
    sizes: tuple[tuple[int, int], ...] | None = None
    """None: every size whose sides are multiples of ``side_multiple``."""
    side_multiple: int = 1
    """Pixels."""
    max_side: int | None = None
    """The largest width or height in pixels. None: the server's limit on pixels alone counts."""
    needs_picture: bool = False
    """Whether every request must have a picture."""
    example_prompts: tuple[str, ...] = ()
    """What the model can do, for those who try it."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What the family's own request fields are where a request leaves them out."""
    field_schemas: Mapping[str, Any] = field(default_factory=dict)
    """The JSON schema of each of the family's own request fields, within the limits."""

    @property
    def fields_with_several_values(self) -> frozenset[str]:
        """The family's own fields that may be lists."""
        return frozenset(name for name, schema in self.field_schemas.items() if _may_be_a_list(schema))

    @property
    def default_seconds(self) -> float:
        return self.default_num_frames / self.fps

    @property
    def max_seconds(self) -> float:
        return self.max_num_frames / self.fps


def field_schemas_of(fields: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of each field of a model, without the null that stands for a field that is left out."""
    schema = fields.model_json_schema()
    kinds = schema.get("$defs", {})
    return {name: _without_null(_inlined(field, kinds)) for name, field in schema.get("properties", {}).items()}


def _inlined(schema: Any, kinds: Mapping[str, Any]) -> Any:
    """A schema in which every reference to one of the named kinds is the kind itself."""
    if isinstance(schema, list):
        return [_inlined(item, kinds) for item in schema]
    if not isinstance(schema, dict):
        return schema
    rest = {key: _inlined(value, kinds) for key, value in schema.items() if key != "$ref"}
    if "$ref" not in schema:
        return rest
    return {**_inlined(kinds[str(schema["$ref"]).rpartition("/")[2]], kinds), **rest}


def _may_be_a_list(schema: Mapping[str, Any]) -> bool:
    choices = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
    return schema.get("type") == "array" or any(map(_may_be_a_list, choices))


def _without_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in schema.items() if key not in ("title", "default")}
    choices = [choice for choice in kept.pop("anyOf", []) if choice != {"type": "null"}]
    if len(choices) == 1:
        return {**choices[0], **kept}
    return {**kept, "anyOf": choices} if choices else kept
