"""ToMe's bipartite soft matching: which output slot every token goes to."""

from __future__ import annotations

import torch
from torch import Tensor

from ._rows import accumulator

__all__ = ["match_tokens"]

WORST = -2.0  # below every cosine: where the similarity is NaN a token merges last, and prefix tokens never


def match_tokens(metric: Tensor, r: int, prefix: int) -> Tensor:
    """Merge the r tokens of set A (even positions) that lie closest to a token of set B (odd positions).

    metric (B, N, D) -> slot (B, N), with values 0 .. N-r-1. Slots: the prefix in its order, the unmerged rest of A in
    ascending position, the rest of B in its order. Similarity is the cosine (0 for zero vectors); ties go to the lower
    index, of the destination as of the merged token. Prefix tokens neither merge nor receive.
    """
    batch, tokens, _ = metric.shape
    metric = metric.to(accumulator(metric.dtype))
    unit = metric / metric.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    num_a, num_b = (tokens + 1) // 2, tokens // 2
    prefix_a, prefix_b = (prefix + 1) // 2, prefix // 2

    similarity = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # (B, A, B)
    similarity = similarity.masked_fill(similarity.isnan(), WORST)
    similarity[:, :, :prefix_b] = float("-inf")
    similarity[:, :prefix_a] = float("-inf")
    best, destination = similarity.max(dim=-1)
    merged_first = torch.sort(-best, dim=1, stable=True)[1][:, :r]
    merged = torch.zeros_like(best, dtype=torch.bool).scatter(
        1, merged_first, torch.ones_like(merged_first, dtype=torch.bool)
    )

    position_a = torch.arange(num_a, device=metric.device)
    position_b = torch.arange(num_b, device=metric.device)
    rank = (~merged).cumsum(1) - 1  # among the unmerged of A
    slot_a = torch.where(position_a < prefix_a, 2 * position_a, prefix + rank - prefix_a)
    slot_b = torch.where(position_b < prefix_b, 2 * position_b + 1, tokens - r - num_b + position_b)
    slot = torch.empty(batch, tokens, dtype=torch.int64, device=metric.device)
    slot[:, ::2] = torch.where(merged, slot_b[destination], slot_a)
    slot[:, 1::2] = slot_b
    return slot
