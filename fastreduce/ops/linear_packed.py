"""``linear_packed``: a linear layer on packed tokens that skips the rows past the last token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import Resolved, resolve
from ._check import check_floating, check_same, check_shape, shape_of
from ._library import differentiates_again, gradients_again, operator, wants_gradient
from .gather_packed import check_offsets

__all__ = ["linear_packed"]


@operator("linear_packed.linear_packed", reference.linear_packed, dense="x weight", whole="bias offsets")
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    return x.new_empty(1, x.shape[1], weight.shape[0])


@operator(
    "linear_packed.linear_packed_backward", reference.linear_packed_backward, dense="grad x weight", whole="offsets"
)
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = x.shape, weight.shape, weight.shape[:1]
    grad_x, grad_weight, grad_bias = (shape if asked else (0,) for shape, asked in zip(shapes, wanted, strict=True))
    return x.new_empty(grad_x), weight.new_empty(grad_weight), weight.new_empty(grad_bias)


class LinearPacked(torch.autograd.Function):
    """A linear layer on packed rows. Only the gradients that are needed are computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, offsets)
        return _forward(x, weight, bias, offsets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:3]
        if differentiates_again():
            x, weight, offsets = ctx.saved_tensors
            # Any bias will do, since its gradient does not depend on it.
            bias = weight.new_zeros(weight.shape[0]).requires_grad_() if wanted[2] else None
            return tuple(gradients_again(reference.linear_packed, (x, weight, bias, offsets), grads))
        grad_x, grad_weight, grad_bias = _backward(grads[0], *ctx.saved_tensors, wanted)
        return grad_x if wanted[0] else None, grad_weight if wanted[1] else None, grad_bias if wanted[2] else None, None


def linear_packed_unchecked(
    x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, *, backend: Resolved
) -> Tensor:
    """Call :func:`linear_packed` without checks, by the backend named."""
    if backend == "reference":
        return reference.linear_packed(x, weight, bias, offsets)
    if wants_gradient(x, weight, bias):
        return LinearPacked.apply(x, weight, bias, offsets)
    return _forward(x, weight, bias, offsets)


def linear_packed(
    x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, *, backend: str | None = None
) -> Tensor:
    """Apply a linear layer to packed tokens; rows past the last token are not computed.

    Equivalent PyTorch::

        out = torch.nn.functional.linear(x, weight, bias)
        out[:, offsets[-1] :] = 0

    The kernels multiply float32 in three passes of the tensor cores (``tf32x3``), nearly as exactly as float32.

    Args:
        x: (1, T, I) packed tokens. float32, float16, bfloat16 (reference: any).
        weight: (O, I) in x's dtype.
        bias: (O,) in x's dtype, or None.
        offsets: (B + 1,) int32, where the images begin; only the last one, the number of tokens, is used.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        (1, T, O), zeros from row ``offsets[B]`` on. Differentiable in x, weight and bias.

    Raises:
        ValueError: wrong shapes, devices that differ.
        TypeError: x not floating point, several dtypes, offsets not int32.
    """
    check_shape("x", x, "1 T I")
    check_floating("x", x)
    check_shape("weight", weight, "O I")
    check_same("x", x, "weight", weight, dtype=True)
    if x.shape[0] != 1 or x.shape[2] != weight.shape[1]:
        raise ValueError(f"x must have shape (1, T, {weight.shape[1]}) to go with weight, got {shape_of(x)}")
    if bias is not None:
        check_same("x", x, "bias", bias, dtype=True)
        if shape_of(bias) != (weight.shape[0],):
            raise ValueError(f"bias must have shape {(weight.shape[0],)} to go with weight, got {shape_of(bias)}")
    check_offsets("offsets", offsets, "x", x)
    return linear_packed_unchecked(x, weight, bias, offsets, backend=resolve(backend, x))
