"""Size-weighted means of the tokens of each slot, and the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from ._export import for_onnx, greatest_of_slots, sums_of_slots
from ._rows import accumulator, add_residual, add_rows, flat_rows, take_rows

__all__ = [
    "learned_sizes",
    "merge_tokens",
    "merge_tokens_backward",
    "merge_tokens_size_backward",
    "sum_slots",
    "unmerge_tokens",
]

_MAX_LOG_SIZE = 40.0


def sum_slots(x: Tensor, slot: Tensor, num_out: int) -> Tensor:
    """Sum the rows of each slot, (B, N, C) -> (B, num_out, C); rows of slot -1 are left out."""
    batch, _, channels = x.shape
    rows = x.to(accumulator(x.dtype)).masked_fill((slot < 0).unsqueeze(-1), 0.0)
    total = torch.zeros(batch * num_out, channels, dtype=rows.dtype, device=x.device)
    total = add_rows(total, flat_rows(slot.long().clamp_min(0), num_out), rows)
    return total.view(batch, num_out, channels).to(x.dtype)


def _sums(x: Tensor, slot: Tensor, num_out: int, size: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the size-weighted sums (B, num_out, C) of x and the sums (B, num_out) of the sizes."""
    batch, tokens, channels = x.shape
    if for_onnx():
        return sums_of_slots(x.to(dtype), None if size is None else size.to(dtype), slot, num_out)
    weights = torch.ones(batch, tokens, dtype=dtype, device=x.device) if size is None else size.to(dtype)
    # Each image has one more slot, for the tokens of slot -1; a mask would take another pass over x.
    place = slot.long().remainder(num_out + 1)
    total = torch.zeros(batch, num_out + 1, dtype=dtype, device=x.device).scatter_add(1, place, weights)
    rows = x.to(dtype) if size is None else x.to(dtype) * weights.unsqueeze(-1)
    summed = torch.zeros(batch * (num_out + 1), channels, dtype=dtype, device=x.device)
    summed = add_rows(summed, flat_rows(place, num_out + 1), rows).view(batch, num_out + 1, channels)[:, :num_out]
    return summed, total[:, :num_out].contiguous()


def merge_tokens(
    x: Tensor,
    slot: Tensor,
    num_out: int,
    size: Tensor | None,
    residual: Tensor | None,
    eps: float = 0.0,
    head: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute ``merged[m] = sum_{slot[n] = m} size[n] x[n] / (sum_{slot[n] = m} size[n] + eps) (+ residual[m])``.

    x (B, N, C), slot (B, N) with values in 0 .. num_out - 1, size (B, N) or None for ones, residual (B, num_out, C) or
    None, head (B, P, C) or None -> head and merged rows (B, P + num_out, C), and the sizes (B, num_out) without
    gradient. An empty slot gives zeros and size 0; tokens of slot -1 are left out.
    """
    dtype = accumulator(x.dtype)
    summed, total = _sums(x, slot, num_out, size, dtype)
    merged = (summed / _divisor(total, eps).unsqueeze(-1)).to(x.dtype)
    merged = add_residual(merged, residual)
    if head is not None:
        merged = torch.cat([head.to(merged.dtype), merged], dim=1)
    return merged, total.detach()


def learned_sizes(x: Tensor, weight: Tensor, bias: Tensor, slot: Tensor, num_out: int) -> Tensor:
    """Compute ``exp(weight . x + bias)``: x (B, N, C), weight (1, C), bias (1,) -> (B, N), float32 or wider.

    The exponential of 89 is beyond float32. So if the greatest logarithm of a slot is above 40, all sizes of the slot
    are divided by ``exp(greatest - 40)``. The mean is the same, since eps vanishes beside ``exp(40)``. Tokens of slot
    -1 have size 0.
    """
    rows = x.to(accumulator(x.dtype))
    # Row by row, since a matrix product would round the rows differently in another batch.
    logarithm = (rows * weight.to(rows.dtype)).sum(-1) + bias.to(rows.dtype)
    logarithm = logarithm.masked_fill(slot < 0, float("-inf"))
    place = slot.long().clamp_min(0)
    greatest = greatest_of_slots(logarithm.detach(), slot.long(), num_out, _MAX_LOG_SIZE)
    return (logarithm - (greatest - _MAX_LOG_SIZE).gather(1, place)).exp()


def merge_tokens_backward(grad: Tensor, slot: Tensor, size: Tensor | None, total: Tensor, eps: float = 0.0) -> Tensor:
    """Return the gradient (B, N, C) of x for grad (B, num_out, C), zeros for slot -1; slots and sizes are constants."""
    place = slot.long().clamp_min(0)
    share = (1.0 / _divisor(total, eps).gather(1, place)).masked_fill(slot < 0, 0.0)
    if size is not None:
        share = share * size.to(share.dtype)
    return (take_rows(grad, place).to(share.dtype) * share.unsqueeze(-1)).to(grad.dtype)


def merge_tokens_size_backward(
    grad: Tensor, x: Tensor, slot: Tensor, size: Tensor, total: Tensor, eps: float, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the gradients (B, N, C) of x and (B, N) of size for grad (B, num_out, C).

    ``grad_size[n] = sum_c grad[slot[n], c] (x[n, c] - merged[slot[n], c]) / (total[slot[n]] + eps)``. The sum over
    merged is computed as the weighted mean of the sums over x. With the weight (1, C) of the layer that gave the sizes,
    the gradient of x includes ``grad_size[n] size[n] weight``.
    """
    divisor, nowhere, place = _divisor(total, eps), slot < 0, slot.long().clamp_min(0)
    dots = (take_rows(grad, place).to(total.dtype) * x.to(total.dtype)).sum(-1).masked_fill(nowhere, 0.0)
    mean = torch.zeros_like(total).scatter_add_(1, place, dots * size.to(total.dtype)) / divisor
    grad_size = ((dots - mean.gather(1, place)) / divisor.gather(1, place)).masked_fill(nowhere, 0.0)
    if weight is None:
        return merge_tokens_backward(grad, slot, size, total, eps), grad_size
    grad_x = merge_tokens_backward(grad.to(total.dtype), slot, size, total, eps)
    exponent = grad_size * size.to(total.dtype)
    return torch.addcmul(grad_x, exponent.unsqueeze(-1), weight.to(total.dtype)).to(grad.dtype), grad_size


def _divisor(total: Tensor, eps: float) -> Tensor:
    """Return the divisor of a slot's sum, which is never zero."""
    return (total + eps if eps else total).clamp_min(1e-30)


def unmerge_tokens(x: Tensor, slot: Tensor) -> Tensor:
    """Give every token the row of its slot, zeros for slot -1: x (B, M, C), slot (B, N) -> (B, N, C)."""
    if x.shape[1] == 0:
        x = torch.nn.functional.pad(x, (0, 0, 0, 1))  # a row of zeros, for slot -1
    rows = take_rows(x, slot.long().clamp_min(0))
    return rows.masked_fill((slot < 0).unsqueeze(-1), 0.0)
