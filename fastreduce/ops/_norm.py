"""What the primitives that end in a layer normalisation share: checks, and what their gradients ask for."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .. import reference
from ._check import check_floating, check_same, check_shape, shape_of
from ._library import dense_rows

__all__ = [
    "affine_gradients",
    "check_norm",
    "dense_gradients",
    "fake_norm",
    "fake_sums",
    "rows_if",
    "save_norm",
    "wants_affine",
]


def check_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm_eps: float) -> list[Tensor]:
    """Raise unless weight and bias are None or (C,), and norm_eps is usable; returns those that are not None."""
    given = [(name, tensor) for name, tensor in (("weight", weight), ("bias", bias)) if tensor is not None]
    for name, tensor in given:
        check_shape(name, tensor, "C")
        check_floating(name, tensor)
        check_same("x", x, name, tensor)
        if shape_of(tensor) != shape_of(x)[2:]:
            raise ValueError(f"{name} must have shape {shape_of(x)[2:]}, got {shape_of(tensor)}")
    if isinstance(norm_eps, bool) or not isinstance(norm_eps, (int, float)):
        raise TypeError(f"norm_eps must be a number, got {norm_eps!r}")
    if not 0.0 <= norm_eps < math.inf:
        raise ValueError(f"norm_eps must be at least 0 and finite, got {norm_eps}")
    return [tensor for _, tensor in given]


def fake_norm(out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What stands for rows, normed rows and their statistics."""
    statistics = out.new_empty(*out.shape[:2], 2, dtype=reference.accumulator(out.dtype))
    return out, out.new_empty(out.shape), statistics


def fake_sums(statistics: Tensor, out: Tensor, affine: bool) -> Tensor:
    """What stands for the gradients of weight and bias."""
    return statistics.new_empty(2 if affine else 0, out.shape[2])


def rows_if(wanted: bool, grad: Tensor) -> Tensor:
    """The rows (B, N, C), or none of them (B, 0, C)."""
    return grad if wanted else grad.new_empty(grad.shape[0], 0, grad.shape[2])


def dense_gradients(
    grad_out: Tensor | None, grad_normed: Tensor, out: Tensor, statistics: Tensor, weight: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor | None]:
    """What the gradient of a norm is made of, as the kernels take it."""
    grad_out, weight = (None if rows is None else dense_rows(rows) for rows in (grad_out, weight))
    return grad_out, dense_rows(grad_normed), out, statistics, weight


def save_norm(ctx: Any, place: int, weight: Tensor | None, bias: Tensor | None) -> None:
    """Keep what the gradients of weight and bias ask for; weight and bias are the inputs at ``place`` and behind it."""
    ctx.norm_place = place
    ctx.norm_dtypes = [None if tensor is None else tensor.dtype for tensor in (weight, bias)]
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient


def wants_affine(ctx: Any) -> bool:
    """Whether weight or bias gets a gradient."""
    return any(ctx.needs_input_grad[ctx.norm_place : ctx.norm_place + 2])


def affine_gradients(ctx: Any, sums: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight and bias, those that are wanted, in their dtypes."""
    wanted = ctx.needs_input_grad[ctx.norm_place : ctx.norm_place + 2]
    weight, bias = (sums[row].to(ctx.norm_dtypes[row]) if wanted[row] else None for row in range(2))
    return weight, bias
