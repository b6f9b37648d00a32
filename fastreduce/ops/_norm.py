"""What the primitives that end in a layer normalisation share: checks, and the gradient of their rows."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .. import reference
from ._check import check_floating, check_same, check_shape, shape_of
from ._library import dense_rows, register

__all__ = ["check_norm", "fake_norm", "norm_backward", "save_norm"]


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


def _triton_backward(
    grad_out: Tensor | None, grad_normed: Tensor, out: Tensor, statistics: Tensor, weight: Tensor | None, affine: bool
) -> tuple[Tensor, Tensor]:
    from ..kernels import _norm as kernels

    grad_out, weight = (None if rows is None else dense_rows(rows) for rows in (grad_out, weight))
    return kernels.norm_backward(grad_out, dense_rows(grad_normed), out, statistics, weight, affine)


_backward = register(
    "norm_tokens_backward(Tensor? grad_out, Tensor grad_normed, Tensor out, Tensor statistics, Tensor? weight,"
    " bool affine) -> (Tensor, Tensor)",
    triton=_triton_backward,
    reference=reference.layer_norm_backward,
    fake=lambda grad_out, grad_normed, out, statistics, weight, affine: (
        out.new_empty(out.shape),
        statistics.new_empty(2 if affine else 0, out.shape[2]),
    ),
)


def save_norm(ctx: Any, place: int, weight: Tensor | None, bias: Tensor | None) -> None:
    """Keep what :func:`norm_backward` asks for; weight and bias are the inputs at ``place`` and behind it."""
    ctx.norm_place = place
    ctx.norm_dtypes = [None if tensor is None else tensor.dtype for tensor in (weight, bias)]
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient


def norm_backward(
    ctx: Any,
    grad_out: Tensor | None,
    grad_normed: Tensor | None,
    out: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The whole gradient of out (None if there is none), and those of weight and bias, if wanted."""
    if grad_normed is None:
        return grad_out, None, None
    wanted = ctx.needs_input_grad[ctx.norm_place : ctx.norm_place + 2]
    grad, sums = _backward(grad_out, grad_normed, out, statistics, weight, any(wanted))
    affine = [sums[row].to(ctx.norm_dtypes[row]) if wanted[row] else None for row in range(2)]
    return grad, affine[0], affine[1]
