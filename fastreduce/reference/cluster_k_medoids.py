"""K-Medoids over tokens: clusters, each with one of its tokens as the center."""

from __future__ import annotations

import torch
from torch import Tensor

from ._export import cdist, first_of_slots, lowest_first, marks
from ._images import image_parts, is_captured
from ._rows import accumulator, flat_rows

__all__ = ["cluster_k_medoids"]


def _first_nearest(rows: Tensor) -> Tensor:
    """Return the place (B, N) of the first nearest center for distances rows (B, k, N), which may be overwritten."""
    if is_captured():
        return rows.min(1)[1]
    count = rows.shape[1]
    # The first place of the minimum by vectorised passes, in half the time of min() with indices.
    from_end = torch.arange(count, 0, -1, dtype=rows.dtype, device=rows.device).unsqueeze(1)
    return count - rows.eq_(rows.amin(1, keepdim=True)).mul_(from_end).amax(1).long()


def _finite(weighted: Tensor) -> Tensor:
    """Make values finite, so that they can be multiplied by zero: 0 * inf would be NaN."""
    largest = torch.finfo(weighted.dtype).max
    return weighted.nan_to_num(nan=largest, posinf=largest)


class _Distances:
    """All distances, ``distance_to[b, i, n] = d(n, i)``, and the costs over all tokens (B, N).

    ``torch.cdist`` computes them, as in the released code; NaN counts as infinite.
    """

    def __init__(self, x: Tensor, weights: Tensor | None, k: int, members: bool):
        batch, tokens, _ = x.shape
        self.captured = is_captured()
        if self.captured or x.device.type != "cpu" or not batch:
            distance = cdist(x, x).nan_to_num(nan=torch.inf, posinf=torch.inf)
            self.distance_to = distance.mT.contiguous()
            self.costs = (distance if weights is None else distance * weights.unsqueeze(2)).sum(2)
        else:  # image by image: data stays in the cache, and bits do not depend on other images
            self.distance_to = x.new_empty(batch, tokens, tokens)
            costs = []
            for part in (slice(image, image + 1) for image in range(batch)):
                distance = torch.cdist(x[part], x[part]).nan_to_num_(nan=torch.inf, posinf=torch.inf)
                self.distance_to[part] = distance.mT
                costs.append((distance if weights is None else distance.mul_(weights[part].unsqueeze(2))).sum(2))
            self.costs = torch.cat(costs)
        if not self.captured:
            self.rows = x.new_empty(batch, k, tokens)
        if members:
            weighted = self.distance_to if weights is None else self.distance_to * weights.unsqueeze(2)
            # Rounding errors on the diagonal would decide between members.
            own = torch.eye(tokens, dtype=torch.bool, device=x.device)
            self.weighted = _finite(weighted).masked_fill(own, 0.0)
            if not self.captured:
                self.together = torch.empty_like(self.weighted)

    def of(self, index: Tensor) -> Tensor:
        """Return the distances (B, N) to one token of each image, index (B,)."""
        batch, tokens, _ = self.distance_to.shape
        return self.distance_to.view(batch * tokens, tokens).index_select(0, flat_rows(index.unsqueeze(1), tokens))

    def nearest(self, centers: Tensor) -> Tensor:
        """Return the place (B, N) of every token's nearest center among centers (B, k)."""
        tokens = self.distance_to.shape[1]
        flat = self.distance_to.view(-1, tokens)
        if self.captured:
            rows = flat.index_select(0, flat_rows(centers, tokens))
            return _first_nearest(rows.view(*centers.shape, tokens))
        torch.index_select(flat, 0, flat_rows(centers, tokens), out=self.rows.view(-1, tokens))
        return _first_nearest(self.rows)

    def costs_of_members(self, label: Tensor) -> Tensor:
        """Return every token's cost (B, N) over the tokens with its label (B, N)."""
        if self.captured:
            return ((label.unsqueeze(2) == label.unsqueeze(1)) * self.weighted).sum(1)
        number = label.to(self.weighted.dtype)
        torch.eq(number.unsqueeze(2), number.unsqueeze(1), out=self.together)
        return self.together.mul_(self.weighted).sum(1)


def _farthest_first(distances: _Distances, k: int, first: int) -> Tensor:
    """Choose centers (B, k): ``first``, then each time the unchosen token with the largest distance to a chosen one."""
    batch, _ = distances.costs.shape
    centers = [distances.costs.new_full((batch, 1), first, dtype=torch.int64)]
    largest = distances.of(centers[0][:, 0])
    chosen = torch.zeros_like(largest, dtype=torch.bool)
    for _ in range(1, k):
        chosen = chosen | marks(centers[-1], chosen.shape[1])
        newest = largest.masked_fill(chosen, 0.0).argmax(1)
        centers.append(newest.unsqueeze(1))
        largest = torch.maximum(largest, distances.of(newest))
    return torch.cat(centers, dim=1)


def _first_of_each(order: Tensor, label: Tensor, k: int) -> Tensor:
    """Return the first token of every cluster in order (B, N); token 0 where a cluster is empty."""
    first = first_of_slots(label.gather(1, order), k)
    return torch.cat([order, order.new_zeros(order.shape[0], 1)], dim=1).gather(1, first)


def cluster_k_medoids(
    x: Tensor, weights: Tensor | None, k: int, iters: int, members: bool, first: int
) -> tuple[Tensor, Tensor]:
    """Cluster by K-Medoids.

    ``label[n] = argmin_j d(n, centers[j])``, then ``centers[j] = argmin of cost over its tokens``, ``iters`` times.

    x (B, N, C), weights (B, N) or None for ones -> centers (B, k), label (B, N), labelled once more at the end.

    cost[n] = weights[n] * sum over all i of d(n, i), the same in every iteration. With ``members`` it is the sum of
    weights[i] * d(n, i) over n's own cluster. The first centers are the k heaviest tokens; without weights they are
    chosen farthest first from ``first``. An empty cluster takes token 0. Ties go to the lower index, of clusters and of
    tokens. A distance that is NaN counts as infinite, and in a cost of members as the largest finite number. A cost or
    weight that is NaN comes last.
    """
    dtype = accumulator(x.dtype)
    x, weights = x.to(dtype), None if weights is None else weights.to(dtype)
    parts = image_parts(x.shape[0], 4 * x.element_size() * x.shape[1] ** 2)  # an image takes up to four matrices
    if len(parts) == 1:
        return _cluster(x, weights, k, iters, members, first)
    found = [_cluster(x[part], None if weights is None else weights[part], k, iters, members, first) for part in parts]
    centers, labels = zip(*found, strict=True)
    return torch.cat(centers), torch.cat(labels)


def _cluster(x: Tensor, weights: Tensor | None, k: int, iters: int, members: bool, first: int) -> tuple[Tensor, Tensor]:
    """Cluster images whose distances are in memory together."""
    distances = _Distances(x, weights, k, members)
    if weights is None:
        centers = _farthest_first(distances, k, first)
    else:
        centers = lowest_first(-weights, k)
    order = lowest_first(distances.costs, x.shape[1])
    for _ in range(iters):
        label = distances.nearest(centers)
        if members:
            order = lowest_first(distances.costs_of_members(label), x.shape[1])
        centers = _first_of_each(order, label, k)
    return centers, distances.nearest(centers)
