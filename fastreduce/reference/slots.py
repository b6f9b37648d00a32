"""Tokens grouped by slot."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["group_slots"]


def group_slots(slot: Tensor, num_out: int) -> tuple[Tensor, Tensor]:
    """Group tokens by slot, in index order within a slot.

    slot (B, N) -> order (B, N) int32 and offsets (B, num_out + 1) int32: slot m holds the tokens
    ``order[b, offsets[b, m] : offsets[b, m + 1]]``. Tokens of slot -1 stand before the first offset.
    """
    ordered, order = torch.sort(slot, dim=1, stable=True)
    bounds = torch.arange(num_out + 1, device=slot.device, dtype=slot.dtype).expand(slot.shape[0], -1).contiguous()
    offsets = torch.searchsorted(ordered.contiguous(), bounds)
    return order.int(), offsets.int()
