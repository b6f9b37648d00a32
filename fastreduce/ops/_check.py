"""Argument checks shared by the public functions; every message quotes the value that was given."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "check_bool",
    "check_count",
    "check_flag",
    "check_floating",
    "check_index",
    "check_number",
    "check_pair",
    "check_same",
    "check_scale",
    "check_shape",
]


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape as a plain tuple, for messages."""
    return tuple(tensor.shape)


def check_shape(name: str, tensor: Tensor, layout: str) -> None:
    """Raise unless ``tensor`` is a tensor with as many axes as ``layout`` names, for example ``"B H N D"``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor of shape ({layout.replace(' ', ', ')}), got {_named(tensor)}")
    if tensor.ndim != len(layout.split()):
        raise ValueError(f"{name} must have shape ({layout.replace(' ', ', ')}), got {shape_of(tensor)}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless the tensor holds floating-point numbers."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")


def check_index(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless the tensor holds int32 or int64 indices."""
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must hold int64 or int32 indices, got {tensor.dtype}")


def check_bool(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless the tensor holds truth values."""
    if tensor.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {tensor.dtype}")


def check_same(first: str, a: Tensor, second: str, b: Tensor, *, dtype: bool = False) -> None:
    """Raise unless both tensors are on one device (and, if asked, of one dtype)."""
    if not isinstance(b, Tensor):
        raise TypeError(f"{second} must be a tensor, got {_named(b)}")
    if a.device != b.device:
        raise ValueError(f"{first} is on {a.device} and {second} on {b.device}; they must be on one device")
    if dtype and a.dtype != b.dtype:
        raise TypeError(f"{first} is {a.dtype} and {second} {b.dtype}; they must have one dtype")


def check_pair(name: str, pair: Any, meaning: str) -> None:
    """Raise TypeError unless ``pair`` is a tuple or list of two."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name} must be a pair of {meaning}, got {_named(pair)}")


def check_count(name: str, value: Any, low: int, high: int) -> int:
    """Return ``value`` as an int; raise unless it is a whole number and ``low <= value <= high``.

    NumPy's integers count, and tensors and arrays without axes that hold one.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        value = _whole(name, value)
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {value}")
    return value


def check_number(name: str, value: Any, *, low: float = -math.inf, positive: bool = False) -> float:
    """Return ``value`` as a float; raise unless it is a real, finite number, at least ``low``, or positive.

    NumPy's numbers count, and tensors and arrays without axes that hold one.
    """
    number = float(value) if isinstance(value, (float, int)) and not isinstance(value, bool) else _real(name, value)
    # Comparisons trace, math.isfinite does not.
    if not (number > 0 if positive else number >= low) or not -math.inf < number < math.inf:
        bound = "positive and " if positive else "" if low == -math.inf else f"at least {low:g} and "
        raise ValueError(f"{name} must be {bound}finite, got {number}")
    return number


def check_flag(name: str, value: Any) -> bool:
    """Return ``value`` as a bool; raise TypeError unless it is one, Python's or NumPy's."""
    if isinstance(value, bool) or (_is_bool(value) and not isinstance(value, Tensor) and value.ndim == 0):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {_shown(value)}")


def check_scale(scale: Any, channels: int) -> float:
    """Return the factor on dot products as a float: ``channels ** -0.5`` for None."""
    return channels**-0.5 if scale is None else check_number("scale", scale)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def _whole(name: str, value: Any) -> int:
    if not _is_bool(value):
        try:
            return operator.index(value)
        except (TypeError, RuntimeError):  # a tensor of several numbers, or of fractions
            pass
    raise TypeError(f"{name} must be an integer, got {_shown(value)}")


def _real(name: str, value: Any) -> float:
    scalar = hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0
    if scalar and not _is_bool(value) and "complex" not in str(getattr(value, "dtype", "")):
        return float(value)
    raise TypeError(f"{name} must be a number, got {_shown(value)}")


def _named(value: Any) -> str:
    """Return the value's type and text for a message."""
    return type(value).__name__ if value is None else f"{type(value).__name__}: {_text(value)}"


def _shown(value: Any) -> str:
    """Return the value's text and type for a message."""
    return f"{value!r}" if value is None else f"{_text(value)} ({type(value).__name__})"


def _text(value: Any) -> str:
    """Return the value's text in one short line; for a tensor or array its shape and dtype."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape and hasattr(value, "dtype"):
        return f"shape {tuple(shape)}, {value.dtype}"
    if isinstance(value, (tuple, list)) and any(hasattr(one, "shape") for one in value):
        return f"of length {len(value)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
