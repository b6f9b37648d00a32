"""Numbers as a user writes them, of any kind that says what it is, and as messages quote and count them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

__all__ = ["as_tuple", "counted", "fixed", "integer", "is_number", "number", "plain", "switch"]


def counted(number: float, thing: str, form: str = "") -> str:
    """Return a number with its thing, ``1 image`` or ``2 images``; ``form`` is that of the number, as for format()."""
    if number != 1:
        thing += "es" if thing.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{number:{form}} {thing}"


def fixed(number: float, digits: int) -> str:
    """Return a number with so many digits after the point; what rounds to zero has no sign."""
    return f"{round(number, digits) + 0.0:.{digits}f}"


def plain(value: Any) -> Any:
    """Turn a NumPy number or an array or tensor of no dimension into Python's number; anything else stays."""
    if getattr(value, "ndim", None) != 0 or not hasattr(value, "item"):
        return value
    found = value.item()
    if isinstance(found, float) and value.dtype.itemsize == 4 and math.isfinite(found):
        return float(f"{found:.7g}")  # a float32 that stands for 0.7 is a little less, and would keep a token less
    return found


def is_number(value: Any) -> bool:
    """Return whether a value is one number, of Python's, NumPy's or a tensor of no dimension; truth values are none."""
    value = plain(value)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def integer(name: str, value: Any, least: int = 0) -> int:
    """Return an integer option, or raise TypeError / ValueError with its name."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def number(name: str, value: Any) -> float:
    """Return a finite number, or raise TypeError / ValueError with its name."""
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(found):
        raise ValueError(f"{name} must be finite, got {found}")
    return float(found)


def switch(name: str, value: Any) -> bool:
    """Return a truth value, or raise TypeError with its name."""
    found = plain(value)
    if not isinstance(found, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return found


def as_tuple(name: str, values: Any, what: str = "a number or a sequence of numbers") -> tuple[Any, ...]:
    """Return the entries of a sequence, or of an array or tensor of one dimension, or raise TypeError."""
    if getattr(values, "ndim", None) == 1 and hasattr(values, "tolist"):
        return tuple(plain(value) for value in values)
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be {what}, got {values!r}")
    return tuple(plain(value) for value in values)
