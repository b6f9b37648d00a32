"""Inverse transform sampling of tokens: the points of a fixed grid are searched in the cumulated scores."""

from __future__ import annotations

import torch
from torch import Tensor

from ._export import for_onnx, marks, nearest_in_row, number_below
from ._rows import accumulator

__all__ = ["nearest_tokens", "sample_tokens", "sampling_grid", "search_nearest"]

_FEW = 1 << 16  # up to so many comparisons are faster than two searches: 54 us against 74 for two images


def sampling_grid(budget: int, parts: int | None = None, device: torch.device | None = None) -> Tensor:
    """Return the points ``(2 i + 1) / (2 parts)``, i < budget, in float64.

    ``parts`` is ``budget + 1`` by default: the symmetric grid without its last point.
    """
    parts = budget + 1 if parts is None else parts
    return torch.arange(1, 2 * budget, 2, dtype=torch.float64, device=device) / (2 * parts)


def nearest_tokens(cdf: Tensor, grid: Tensor) -> Tensor:
    """Compute ``argmin_n |grid[b, i] - cdf[b, n]|``, the lowest n on ties, rounded in the dtype of cdf.

    cdf (B, N) non-decreasing and not negative, grid (B, K), both contiguous -> (B, K) int64. Few tokens and points are
    all compared; more are searched.
    """
    if for_onnx() or (not torch.compiler.is_compiling() and grid.numel() * cdf.shape[1] <= _FEW):
        return nearest_in_row(cdf, grid)
    return search_nearest(cdf, grid)


def search_nearest(cdf: Tensor, grid: Tensor) -> Tensor:
    """Compute the same as :func:`nearest_tokens` by two binary searches, instead of a (B, K, N) comparison."""
    above = torch.searchsorted(cdf, grid)
    below = (above - 1).clamp_(min=0)
    above.clamp_(max=cdf.shape[1] - 1)
    distance = torch.minimum((grid - cdf.gather(1, below)).abs_(), (grid - cdf.gather(1, above)).abs_())
    # Cdfs below the nearest one can round to the same distance, down to half a step below it.
    infinity = distance.new_full((), torch.inf)
    lowest = grid - distance - (torch.nextafter(distance, infinity) - distance) / 2
    lowest = torch.where(grid - lowest <= distance, lowest, torch.nextafter(lowest, infinity))
    return torch.searchsorted(cdf, lowest)


def sample_tokens(scores: Tensor, budget: int, prefix: int, parts: int | None = None) -> tuple[Tensor, Tensor]:
    """Return ``unique(argmin_n |grid_i - cumsum(scores / (sum(scores) + 1e-6))_n|)``, ascending, padded with 0.

    scores (B, N) -> index (B, budget) int64 and valid (B, prefix + budget) bool.
    """
    batch, tokens = scores.shape
    scores = scores.to(accumulator(scores.dtype)).nan_to_num(0.0, 0.0, 0.0).clamp_(min=0.0)
    # In float64 sums are the same in any order, and tokens of weight 0 repeat the cdf before them exactly.
    weights = scores / (scores.sum(1, keepdim=True, dtype=torch.float64).to(scores.dtype) + 1e-6)
    cdf = weights.cumsum(1, dtype=torch.float64).to(scores.dtype)
    grid = sampling_grid(budget, parts, scores.device).to(scores.dtype).expand(batch, -1).contiguous()
    rank = marks(nearest_tokens(cdf, grid), tokens).cumsum(1)  # (B, N)
    place = torch.arange(1 - prefix, budget + 1, device=scores.device).expand(batch, -1).contiguous()
    valid = place <= rank[:, -1:]
    index = number_below(rank, place[:, prefix:].contiguous())
    return index.masked_fill(~valid[:, prefix:], 0), valid
