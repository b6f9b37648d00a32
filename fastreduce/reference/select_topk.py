"""The k best tokens by (score descending, index ascending)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["select_topk"]


def select_topk(scores: Tensor, k: int) -> Tensor:
    """Scores (B, N) -> indices (B, k), best first; ties go to the lower index, NaN counts as the worst score."""
    # Ascending order of the negated scores: that is the direction in which torch sorts NaN last.
    return torch.sort(-scores, dim=1, stable=True)[1][:, :k]
