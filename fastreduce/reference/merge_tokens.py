"""Size-weighted mean of the tokens of each slot, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ._rows import accumulator, add_residual, flat_rows, take_rows

__all__ = ["group_slots", "merge_tokens", "merge_tokens_backward", "sum_slots", "unmerge_tokens"]


def group_slots(slot: Tensor, num_out: int) -> tuple[Tensor, Tensor]:
    """Tokens grouped by slot, in index order within each.

    slot (B, N) -> order (B, N) int32 and offsets (B, num_out + 1) int32: slot m holds the tokens
    ``order[b, offsets[b, m] : offsets[b, m + 1]]``. Tokens of slot -1 stand before the first offset.
    """
    ordered, order = torch.sort(slot, dim=1, stable=True)
    bounds = torch.arange(num_out + 1, device=slot.device, dtype=slot.dtype).expand(slot.shape[0], -1).contiguous()
    offsets = torch.searchsorted(ordered.contiguous(), bounds)
    return order.int(), offsets.int()


def sum_slots(x: Tensor, slot: Tensor, num_out: int) -> Tensor:
    """X (B, N, C) -> (B, num_out, C): sum of the rows of each slot; rows of slot -1 are left out."""
    batch, _, channels = x.shape
    rows = x.to(accumulator(x.dtype)).masked_fill((slot < 0).unsqueeze(-1), 0.0)
    total = torch.zeros(batch * num_out, channels, dtype=rows.dtype, device=x.device)
    total = total.index_add_(0, flat_rows(slot.long().clamp_min(0), num_out), rows.reshape(-1, channels))
    return total.view(batch, num_out, channels).to(x.dtype)


def merge_tokens(
    x: Tensor, slot: Tensor, num_out: int, size: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``merged[m] = sum_{slot[n] = m} size[n] x[n] / sum_{slot[n] = m} size[n] (+ residual[m])``.

    x (B, N, C), slot (B, N) with values in 0 .. num_out - 1, size (B, N) or None for ones, residual (B, num_out, C) or
    None -> merged (B, num_out, C) and the sizes (B, num_out). An empty slot gives zeros and size 0.
    """
    batch, tokens, channels = x.shape
    dtype = accumulator(x.dtype)
    weights = torch.ones(batch, tokens, dtype=dtype, device=x.device) if size is None else size.to(dtype)
    total = torch.zeros(batch, num_out, dtype=dtype, device=x.device).scatter_add_(1, slot.long(), weights)
    rows = x.to(dtype) if size is None else x.to(dtype) * weights.unsqueeze(-1)
    summed = torch.zeros(batch * num_out, channels, dtype=dtype, device=x.device)
    summed = summed.index_add_(0, flat_rows(slot.long(), num_out), rows.reshape(-1, channels))
    merged = summed.view(batch, num_out, channels).div_(total.unsqueeze(-1).clamp_min(1e-30)).to(x.dtype)
    return add_residual(merged, residual), total


def merge_tokens_backward(grad: Tensor, slot: Tensor, size: Tensor | None, total: Tensor) -> Tensor:
    """Gradient (B, N, C) of x for grad (B, num_out, C); slots and sizes are constants."""
    share = 1.0 / total.gather(1, slot.long()).clamp_min(1e-30)
    if size is not None:
        share = share * size.to(share.dtype)
    return (take_rows(grad, slot.long()).to(share.dtype) * share.unsqueeze(-1)).to(grad.dtype)


def unmerge_tokens(x: Tensor, slot: Tensor) -> Tensor:
    """X (B, M, C), slot (B, N) -> (B, N, C): the row of every token's slot, zeros where the slot is -1."""
    rows = take_rows(x, slot.long().clamp_min(0))
    return rows.masked_fill((slot < 0).unsqueeze(-1), 0.0)
