"""ToMe's bipartite soft matching: the output slot of every token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._blocks import joined, split
from ._export import lowest_first, marks
from ._images import bmm
from ._rows import accumulator

__all__ = ["match_tokens"]

WORST = -2.0  # below every cosine, for a similarity that is NaN: its token merges last


def _nearest(a: Tensor, b: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Return the largest cosine (B, A) of every token of A with a patch token of B, and the first such token."""
    found = []
    for rows in split(a, b.shape[1]):
        similarity = bmm(rows, b.mT).nan_to_num_(WORST)
        if prefix:
            hidden = torch.arange(b.shape[1], device=b.device) < prefix
            similarity = similarity.masked_fill_(hidden, float("-inf"))
        found.append(similarity.max(dim=-1))
    best, destination = zip(*found, strict=True)
    return joined(best), joined(destination)


def match_tokens(metric: Tensor, r: int, prefix: int) -> Tensor:
    """Merge the r tokens of set A (even positions) that lie closest to a token of set B (odd positions).

    metric (B, N, D), or keys (B, H, N, D) whose mean over heads is the metric -> slot (B, N), values 0 .. N-r-1. Slots
    hold, in this order, the prefix, the unmerged rest of A, the rest of B. Similarity is the cosine, 0 for zero
    vectors. Ties go to the lower index, of destinations and of merged tokens. Prefix tokens neither merge nor receive.
    """
    if metric.ndim == 4:
        # A sum has the same cosines, for one operator less; half precision could overflow.
        metric = metric.sum(1) if metric.dtype == accumulator(metric.dtype) else metric.mean(1)
    batch, tokens, _ = metric.shape
    metric = metric.to(accumulator(metric.dtype))
    unit = metric / metric.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    num_b, prefix_a, prefix_b = tokens // 2, (prefix + 1) // 2, prefix // 2

    best, destination = _nearest(unit[:, ::2], unit[:, 1::2], prefix_b)
    distance = -best
    if prefix_a:
        distance = pad(distance[:, prefix_a:], (prefix_a, 0), value=float("inf"))
    merged = marks(lowest_first(distance, r), distance.shape[1])

    first_b = tokens - r - num_b  # the slot of B's first token if there is no prefix
    stays = (~merged).cumsum(1).add_(prefix - prefix_a - 1)  # the slot of a token of A that is not merged
    of_b = torch.arange(first_b, tokens - r, device=metric.device).expand(batch, num_b)
    of_a = torch.where(merged, destination + first_b, stays)
    slot = torch.stack([of_a[:, :num_b], of_b], dim=2).flatten(1)
    if tokens % 2:  # the last token is in A, without a token of B after it
        slot = torch.cat([slot, of_a[:, num_b:]], dim=1)
    if prefix > 1:
        slot = torch.cat([torch.arange(prefix, device=metric.device).expand(batch, prefix), slot[:, prefix:]], dim=1)
    return slot
