"""JSON as the standard has it: no name twice in an object, no NaN and no infinity."""

import json
from typing import Any, NoReturn


class RepeatedNameError(ValueError):
    """An object has the same name twice."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def load_json(text: str) -> Any:
    """The value of a JSON text.

    Raises ``RepeatedNameError`` for an object with a name twice, another ``ValueError`` for a text that is not valid
    JSON, and ``RecursionError`` for one that is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_object_of_pairs, parse_constant=_refuse_constant)


def _object_of_pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields: dict[str, object] = {}
    for name, value in pairs:
        if name in fields:
            raise RepeatedNameError(name)
        fields[name] = value
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
