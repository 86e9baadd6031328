"""The ``config.json`` of a part as typed fields, checked before anything is built from them.

A checkpoint may come from anyone: without limits, a size of 10^9 would be allocated or looped over.
"""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from pyramid_serve.checkpoints.naming import name_some

Parsed = TypeVar("Parsed", bound=BaseModel)

MAX_COUNT = 1024
Layers = Annotated[int, Field(strict=True, ge=1, le=256)]
"""How many layers there are, in the model or in a block of it. Known models have at most 32."""
Count = Annotated[int, Field(strict=True, ge=1, le=MAX_COUNT)]
"""How many heads, groups or positions on a side there are. Known models have at most 192."""
Features = Annotated[int, Field(strict=True, ge=1, le=2**20)]
"""The size of a vector, or of a vocabulary. Known models have at most 49,408."""
Flag = Annotated[bool, Field(strict=True)]


def parse_config(model: type[Parsed], config: Mapping[str, Any]) -> Parsed:
    """The fields of a ``config.json``. Raises ``ValueError`` of one line that names each key that is wrong.

    Keys that the model does not have are left out, except ``quantization_config``: weights that are quantised are not
    what the other keys say they are.
    """
    if config.get("quantization_config") is not None:
        raise ValueError("quantization_config: quantised weights are not taken")
    try:
        return model.model_validate(config)
    except ValidationError as error:
        raise ValueError(name_some([_line(problem) for problem in error.errors()], "; ")) from None


def _line(problem: Any) -> str:
    key = ".".join(map(str, problem["loc"]))
    message: str = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{key} is missing"
    if not key:
        return message
    return f"{key}={problem['input']!r:.60}: {message[0].lower()}{message[1:]}"
