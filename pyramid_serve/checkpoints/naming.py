"""How messages name the files and folders of a checkpoint."""

from collections.abc import Sequence

_MAX_NAMED = 10


def name_some(names: Sequence[str], separator: str = ", ") -> str:
    """The first ten names, and how many more there are."""
    more = f"{separator}and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return separator.join(names[:_MAX_NAMED]) + more


def there(present: Sequence[str]) -> str:
    """The end of a message about something that is missing: what there is instead."""
    return f"; there are {name_some(sorted(present))}" if present else "; it is empty"
