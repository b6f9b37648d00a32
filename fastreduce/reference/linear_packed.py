"""A linear layer on packed tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._rows import accumulator

__all__ = ["linear_packed", "linear_packed_backward"]


def _real_rows(x: Tensor, offsets: Tensor) -> Tensor:
    """Return whether a row is before ``offsets[B]``: (T, 1) bool."""
    return (torch.arange(x.shape[1], device=x.device) < offsets[-1]).unsqueeze(1)


def linear_packed(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """Return ``x @ weight.T + bias`` in the rows before ``offsets[B]``, 0 in the others.

    x (1, T, I), weight (O, I), bias (O,) or None, offsets (B + 1,) -> (1, T, O).
    """
    return F.linear(x, weight, bias).masked_fill(~_real_rows(x, offsets), 0.0)


def linear_packed_backward(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, wanted: Sequence[bool] = (True, True, True)
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x (1, T, I), weight (O, I) and bias (O,), empty where unwanted.

    Only rows before ``offsets[B]`` count.
    """
    dtype = accumulator(x.dtype)
    real = _real_rows(x, offsets)
    grad = grad[0].to(dtype).masked_fill(~real, 0.0)
    grad_x, grad_weight, grad_bias = x.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if wanted[0]:
        grad_x = (grad @ weight.to(dtype)).unsqueeze(0).to(x.dtype)
    if wanted[1]:
        grad_weight = (grad.t() @ x[0].to(dtype).masked_fill(~real, 0.0)).to(weight.dtype)
    if wanted[2]:
        grad_bias = grad.sum(0).to(weight.dtype)
    return grad_x, grad_weight, grad_bias
