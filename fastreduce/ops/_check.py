"""Argument checks shared by the public functions; every message quotes what was given."""

from __future__ import annotations

from torch import Tensor

__all__ = ["check_count", "check_floating", "check_index", "check_same", "check_shape"]


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape as a plain tuple, for messages."""
    return tuple(tensor.shape)


def check_shape(name: str, tensor: Tensor, layout: str) -> None:
    """Raise unless ``tensor`` is a tensor with as many axes as ``layout`` names, for example ``"B H N D"``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor of shape ({layout.replace(' ', ', ')}), got {type(tensor).__name__}")
    if tensor.ndim != len(layout.split()):
        raise ValueError(f"{name} must have shape ({layout.replace(' ', ', ')}), got {shape_of(tensor)}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless the tensor holds floating-point numbers."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")


def check_index(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless the tensor holds int32 or int64 indices."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.element_size() < 4:
        raise TypeError(f"{name} must hold int64 or int32 indices, got {tensor.dtype}")


def check_same(first: str, a: Tensor, second: str, b: Tensor, *, dtype: bool = False) -> None:
    """Raise unless both tensors are on one device (and, if asked, of one dtype)."""
    if a.device != b.device:
        raise ValueError(f"{first} is on {a.device} and {second} on {b.device}; they must be on one device")
    if dtype and a.dtype != b.dtype:
        raise TypeError(f"{first} is {a.dtype} and {second} {b.dtype}; they must have one dtype")


def check_count(name: str, value: int, low: int, high: int) -> None:
    """Raise unless ``low <= value <= high``."""
    if isinstance(value, (bool, float, str)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {value}")
