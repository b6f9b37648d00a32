"""K-Medoids over tokens: which tokens stand for all, and which of them every token belongs to."""

from __future__ import annotations

import torch
from torch import Tensor

from ._rows import accumulator, flat_rows

__all__ = ["cluster_k_medoids"]

CHUNK = 2**17  # elements of x that a thread takes at once: the operands of the distances then stay in its cache


def _distances(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """X (B, N, C) -> distance_to (B, N, N), ``distance_to[b, i, n] = d(n, i)``, and the costs over all tokens (B, N).

    By ``torch.cdist``, as the released code; what is not a number counts as infinite.
    """
    batch, tokens, channels = x.shape
    parts = [slice(None)]
    if x.device.type == "cpu" and batch and not torch.compiler.is_compiling():  # traced, it would fix the batch size
        images = torch.get_num_threads() * max(1, CHUNK // max(1, tokens * channels))
        parts = [slice(start, start + images) for start in range(0, batch, images)]
    distance_to = x.new_empty(batch, tokens, tokens)
    costs = []
    for part in parts:
        distance = torch.cdist(x[part], x[part]).nan_to_num_(nan=torch.inf, posinf=torch.inf)
        distance_to[part] = distance.mT
        costs.append((distance if weights is None else distance.mul_(weights[part].unsqueeze(2))).sum(2))
    return distance_to, torch.cat(costs)


def _nearest(distance_to: Tensor, centers: Tensor, rows: Tensor) -> Tensor:
    """Place (B, N) of the nearest of centers (B, k); rows (B, k, N) is room to work in."""
    tokens, count = distance_to.shape[1], centers.shape[1]
    torch.index_select(distance_to.view(-1, tokens), 0, flat_rows(centers, tokens), out=rows.view(-1, tokens))
    # The first place of the minimum, by vectorised passes: half the time of min() with its indices.
    from_end = torch.arange(count, 0, -1, dtype=rows.dtype, device=rows.device).unsqueeze(1)
    return count - rows.eq_(rows.amin(1, keepdim=True)).mul_(from_end).amax(1).long()


def _farthest_first(distance_to: Tensor, k: int, first: int) -> Tensor:
    """Centers (B, k): after ``first``, always the token whose largest distance to the chosen ones is largest."""
    batch, tokens, _ = distance_to.shape
    centers = torch.full((batch, k), first, device=distance_to.device)
    largest = distance_to[:, first].clone()
    chosen = torch.zeros_like(largest, dtype=torch.bool)
    for j in range(1, k):
        chosen.scatter_(1, centers[:, j - 1 : j], True)
        newest = largest.masked_fill(chosen, 0.0).argmax(1)
        centers[:, j] = newest
        rows = flat_rows(newest.unsqueeze(1), tokens)
        largest = torch.maximum(largest, distance_to.view(batch * tokens, tokens).index_select(0, rows))
    return centers


def _first_of_each(order: Tensor, label: Tensor, k: int) -> Tensor:
    """The first token of every cluster in order (B, N); token 0 where a cluster is empty."""
    batch, tokens = order.shape
    place = torch.arange(tokens, device=order.device).expand(batch, tokens)
    first = torch.full((batch, k), tokens, device=order.device)
    first = first.scatter_reduce_(1, label.gather(1, order), place, "amin")
    return torch.cat([order, order.new_zeros(batch, 1)], dim=1).gather(1, first)


def cluster_k_medoids(
    x: Tensor, weights: Tensor | None, k: int, iters: int, members: bool, first: int
) -> tuple[Tensor, Tensor]:
    """``label[n] = argmin_j d(n, centers[j])``, then ``centers[j] = argmin of cost over its tokens``, ``iters`` times.

    x (B, N, C), weights (B, N) or None for ones -> centers (B, k), label (B, N), labelled once more at the end.

    cost[n] = weights[n] * sum over all i of d(n, i), which no iteration changes; with ``members`` it is the sum of
    weights[i] * d(n, i) over n's own cluster. The first centers are the k tokens of most weight; without weights the
    farthest-first ones from ``first``. An empty cluster takes token 0. Ties go to the lower index, of the cluster as
    of the token. A distance that is NaN counts as infinite, and as the largest finite number in a cost of
    the members; a cost or weight that is NaN comes last.
    """
    dtype = accumulator(x.dtype)
    batch, tokens, _ = x.shape
    weights = None if weights is None else weights.to(dtype)
    distance_to, cost = _distances(x.to(dtype), weights)
    if weights is None:
        centers = _farthest_first(distance_to, k, first)
    else:
        centers = torch.sort(-weights, dim=1, stable=True)[1][:, :k]
    if members:
        largest = torch.finfo(dtype).max
        weighted = distance_to if weights is None else distance_to * weights.unsqueeze(2)
        weighted = weighted.nan_to_num(nan=largest, posinf=largest)  # 0 * inf would be NaN
        weighted.diagonal(dim1=1, dim2=2).zero_()  # what rounding leaves there would decide between two members
        together = torch.empty_like(weighted)
    rows = distance_to.new_empty(batch, k, tokens)
    order = torch.sort(cost, dim=1, stable=True)[1]
    for _ in range(iters):
        label = _nearest(distance_to, centers, rows)
        if members:
            number = label.to(dtype)
            torch.eq(number.unsqueeze(2), number.unsqueeze(1), out=together)
            order = torch.sort(together.mul_(weighted).sum(1), dim=1, stable=True)[1]
        centers = _first_of_each(order, label, k)
    return centers, _nearest(distance_to, centers, rows)
