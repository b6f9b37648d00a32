"""Checks and gradients shared by the primitives that end in a layer normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._check import check_floating, check_number, check_same, check_shape, shape_of
from ._library import gradients_again

__all__ = [
    "NO_NORM",
    "Norm",
    "affine_gradients",
    "again_through_norm",
    "check_norm",
    "fake_norm",
    "fake_sums",
    "rows_if",
    "save_norm",
    "wants_affine",
]


Norm = tuple[Tensor | None, Tensor | None, float]  # weight (C,), bias (C,), eps
NO_NORM = (None, None, None)


def check_norm(x: Tensor, norm: Any) -> tuple[list[Tensor], Norm | None]:
    """Raise unless norm is None, or weight and bias are None or (C,) and eps is finite and not negative.

    Returns:
        The list of weight and bias, without None, and the norm with eps as a float.
    """
    if norm is None:
        return [], None
    if not isinstance(norm, (tuple, list)) or len(norm) != 3:
        raise TypeError(f"norm must be None or (weight, bias, eps), got {norm!r}")
    weight, bias, eps = norm
    given = [(name, tensor) for name, tensor in (("weight", weight), ("bias", bias)) if tensor is not None]
    for name, tensor in given:
        check_shape(name, tensor, "C")
        check_floating(name, tensor)
        check_same("x", x, name, tensor)
        if shape_of(tensor) != shape_of(x)[2:]:
            raise ValueError(f"{name} must have shape {shape_of(x)[2:]}, got {shape_of(tensor)}")
    return [tensor for _, tensor in given], (weight, bias, check_number("eps of norm", eps, low=0.0))


def fake_norm(out: Tensor, norm_eps: float | None) -> list[Tensor]:
    """Return the fake of the rows and, with an eps, of the normed rows and their statistics."""
    if norm_eps is None:
        return [out]
    statistics = out.new_empty(*out.shape[:2], 2, dtype=reference.accumulator(out.dtype))
    return [out, out.new_empty(out.shape), statistics]


def fake_sums(statistics: Tensor, out: Tensor, affine: bool) -> Tensor:
    """Return the fake of the gradients of weight and bias."""
    return statistics.new_empty(2 if affine else 0, out.shape[2])


def rows_if(wanted: bool, grad: Tensor) -> Tensor:
    """Return the rows (B, N, C), or none of them (B, 0, C)."""
    return grad if wanted else grad.new_empty(grad.shape[0], 0, grad.shape[2])


def save_norm(ctx: Any, place: int, weight: Tensor | None, bias: Tensor | None, norm_eps: float | None) -> None:
    """Save what the gradients of weight and bias need; these are the inputs at ``place`` and ``place + 1``."""
    ctx.norm_place, ctx.norm_eps = place, norm_eps
    ctx.norm_dtypes = [None if tensor is None else tensor.dtype for tensor in (weight, bias)]
    ctx.set_materialize_grads(False)  # None, not zeros, where there is no gradient


def wants_affine(ctx: Any) -> bool:
    """Return whether weight or bias needs a gradient."""
    return any(ctx.needs_input_grad[ctx.norm_place : ctx.norm_place + 2])


def affine_gradients(ctx: Any, sums: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of weight and bias in their dtypes, or None where unneeded."""
    wanted = ctx.needs_input_grad[ctx.norm_place : ctx.norm_place + 2]
    weight, bias = (sums[row].to(ctx.norm_dtypes[row]) if wanted[row] else None for row in range(2))
    return weight, bias


def again_through_norm(
    ctx: Any, grad_out: Tensor | None, grad_normed: Tensor, out: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return gradients of out (``grad_out`` added), weight and bias that can be differentiated again."""
    wanted = ctx.needs_input_grad[ctx.norm_place : ctx.norm_place + 2]
    # Any bias will do, since its gradient does not depend on it.
    bias = out.new_zeros(out.shape[2], dtype=ctx.norm_dtypes[1]).requires_grad_() if wanted[1] else None
    inputs = out, weight, bias, ctx.norm_eps
    grad, grad_weight, grad_bias, _ = gradients_again(reference.layer_norm, inputs, (grad_normed,))
    if grad is None:  # no gradient of the rows is needed
        grad = torch.zeros_like(out)
    if grad_out is not None:
        grad = grad + grad_out.to(grad.dtype)
    return grad, grad_weight if wanted[0] else None, grad_bias
