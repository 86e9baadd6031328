"""Metrics that keep what they are told, in place of those of Ray."""

from collections.abc import Mapping
from typing import Any

Labels = frozenset[tuple[str, str]]


def labels(**values: str) -> Labels:
    return frozenset(values.items())


class Told:
    """The metrics that a test made, by name with the kind of each, and everything that they were told: by name and
    labels, the values in their order.
    """

    def __init__(self) -> None:
        self.values: dict[tuple[str, Labels], list[float]] = {}
        self.kinds: dict[str, str] = {}

    def add(self, name: str, tag_keys: tuple[str, ...], value: float, tags: Mapping[str, str] | None) -> None:
        assert set(tags or {}) == set(tag_keys), f"{name}: {tags}, declared are {tag_keys}"
        self.values.setdefault((name, frozenset((tags or {}).items())), []).append(value)

    def of(self, name: str, **values: str) -> list[float]:
        return self.values.get((name, labels(**values)), [])

    def labels_of(self, name: str) -> set[Labels]:
        return {labels for told, labels in self.values if told == name}


def kept_metric(told: Told, kind: str, method: str) -> type:
    """A class in place of one of Ray's metrics, ``Counter`` for example, which keeps what its one method is told."""

    class Kept:
        def __init__(self, name: str, *, tag_keys: tuple[str, ...] = (), **_: Any) -> None:
            self._name, self._tag_keys = name, tag_keys
            told.kinds[name] = kind

    def tell(self: Any, value: float = 1.0, tags: Mapping[str, str] | None = None) -> None:
        told.add(self._name, self._tag_keys, value, tags)

    setattr(Kept, method, tell)
    return Kept
