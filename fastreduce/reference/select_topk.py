"""The k best tokens by (score descending, index ascending)."""

from __future__ import annotations

from torch import Tensor

from ._export import lowest_first

__all__ = ["select_topk"]


def select_topk(scores: Tensor, k: int) -> Tensor:
    """Select indices (B, k) of scores (B, N), best first; ties go to the lower index, NaN counts as the worst score."""
    # Negated, since torch sorts NaN last only in ascending order.
    return lowest_first(-scores, k)
