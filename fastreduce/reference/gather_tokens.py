"""Kept rows: the prefix, then the chosen patch tokens in the order of the index."""

from __future__ import annotations

import torch
from torch import Tensor

from ._rows import accumulator, add_residual, add_rows, flat_rows, take_rows, with_prefix

__all__ = ["gather_tokens", "scatter_tokens"]


def gather_tokens(x: Tensor, index: Tensor, prefix: int, residual: Tensor | None) -> Tensor:
    """Compute ``out[b, j] = x[b, row[b, j]] (+ residual[b, j])`` with ``row = [0 .. prefix-1, index + prefix]``.

    x (B, N, C), index (B, K), residual (B, prefix + K, C) or None -> (B, prefix + K, C).
    """
    return add_residual(take_rows(x, with_prefix(index, prefix)), residual)


def scatter_tokens(grad: Tensor, index: Tensor, prefix: int, num_in: int) -> Tensor:
    """Transpose :func:`gather_tokens`: rows that were gathered twice add up, rows that were not are zero.

    grad (B, prefix + K, C), index (B, K) -> (B, num_in, C).
    """
    batch, _, channels = grad.shape
    rows = flat_rows(with_prefix(index, prefix), num_in)
    total = torch.zeros(batch * num_in, channels, dtype=accumulator(grad.dtype), device=grad.device)
    total = add_rows(total, rows, grad.to(total.dtype))
    return total.view(batch, num_in, channels).to(grad.dtype)
