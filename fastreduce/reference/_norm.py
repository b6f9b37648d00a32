"""Layer normalisation of the rows that a reduction leaves, and its gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._rows import accumulator

__all__ = ["layer_norm", "layer_norm_backward", "with_norm"]


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise rows of x (..., C), then apply weight (C,) and bias (C,), in x's dtype; sums are float32 or wider."""
    dtype = x.dtype
    for affine in (weight, bias):
        dtype = dtype if affine is None else torch.promote_types(dtype, affine.dtype)
    weight, bias = (None if affine is None else affine.to(dtype) for affine in (weight, bias))
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, eps).to(x.dtype)


def with_norm(out: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None) -> list[Tensor]:
    """Return out (B, N, C) and, with an eps, normed (B, N, C) and the rows' mean and 1 / deviation (B, N, 2)."""
    if eps is None:
        return [out]
    variance, mean = torch.var_mean(out.to(accumulator(out.dtype)), -1, correction=0)
    statistics = torch.stack([mean, (variance + eps).rsqrt()], -1)
    return [out, layer_norm(out, weight, bias, eps), statistics]


def layer_norm_backward(
    grad_out: Tensor | None, grad_normed: Tensor, out: Tensor, statistics: Tensor, weight: Tensor | None, affine: bool
) -> tuple[Tensor, Tensor]:
    """Return gradients of out (B, N, C), ``grad_out`` added, and of weight and bias, (2, C) if affine, else (0, C)."""
    dtype = accumulator(out.dtype)
    mean, scale = statistics.unsqueeze(-1).unbind(2)
    normal = (out.to(dtype) - mean) * scale
    upstream = grad_normed.to(dtype)
    scaled = upstream if weight is None else upstream * weight.to(dtype)
    inner = scaled.mean(-1, keepdim=True) + normal * (scaled * normal).mean(-1, keepdim=True)
    grad = scale * (scaled - inner)
    if grad_out is not None:
        grad = grad + grad_out.to(dtype)
    sums = grad.new_empty(0, grad.shape[2])
    if affine:
        sums = torch.stack([(upstream * normal).sum((0, 1)), upstream.sum((0, 1))])
    return grad.to(out.dtype).contiguous(), sums
