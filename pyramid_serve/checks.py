"""Checks of the numbers that are given to the library."""

import contextlib
import numbers


def whole_number(name: str, value: object, *, least: int, most: int | None = None) -> int:
    """The value as an ``int``; NumPy's integers are taken too.

    Raises ``ValueError`` for a value of any other type, ``True`` and ``2.0`` among them, and for one out of range.
    """
    if not isinstance(value, bool) and isinstance(value, numbers.Integral):
        number = int(value)
        if number >= least and (most is None or number <= most):
            return number
    allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise ValueError(f"{name}={value!r:.60}: must be a whole number {allowed}")


def whole_multiple(name: str, value: object, *, of: int) -> int:
    """Pixels as an ``int``, like ``whole_number``; ``ValueError`` unless they are a positive multiple of ``of``."""
    if not isinstance(value, bool) and isinstance(value, numbers.Integral):
        number = int(value)
        if number > 0 and number % of == 0:
            return number
    raise ValueError(f"{name}={value!r:.60}: must be a positive multiple of {of} pixels")


def real_number(name: str, value: object, *, least: float, most: float) -> float:
    """The value as a ``float``; integers and NumPy's numbers are taken too.

    Raises ``ValueError`` for a value of any other type, ``True`` among them, for one out of range, and for NaN.
    """
    if not isinstance(value, bool) and isinstance(value, numbers.Real):
        with contextlib.suppress(OverflowError):  # of an integer that no float holds
            number = float(value)
            if least <= number <= most:
                return number
    raise ValueError(f"{name}={value!r:.60}: must be a number between {least:g} and {most:g}")
