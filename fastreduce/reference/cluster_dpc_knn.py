"""Density-peak clustering by nearest neighbours: dense tokens far from any denser one become centres."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._blocks import joined, row_blocks
from ._images import pair_distances
from ._rows import accumulator, take_rows
from .select_topk import select_topk

__all__ = ["cluster_dpc_knn"]


class _Distances:
    """Distances over sqrt(C) of the tokens x (B, N, C) in blocks of rows; a single block is computed once and kept."""

    def __init__(self, x: Tensor):
        self.x = x
        self.blocks = row_blocks(x.shape[1], x.shape[1])
        self.kept = self._between(x, x) if len(self.blocks) == 1 else None

    def _between(self, rows: Tensor, columns: Tensor) -> Tensor:
        return pair_distances(rows, columns).div_(math.sqrt(self.x.shape[2]))

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield some rows at a time, and their distances (B, rows, N) to all tokens."""
        for rows in self.blocks:
            yield rows, self._between(self.x[:, rows], self.x) if self.kept is None else self.kept

    def nearest(self, centers: Tensor) -> Tensor:
        """Return the place (B, N) of every token's nearest center among centers (B, k), the first if tied."""
        if self.kept is not None:
            return take_rows(self.kept, centers).min(1)[1]
        rows = take_rows(self.x, centers)
        columns = row_blocks(self.x.shape[1], centers.shape[1])
        return joined([self._between(rows, self.x[:, some]).min(1)[1] for some in columns])


def _smallest(distance: Tensor, count: int) -> Tensor:
    """Return the ``count`` smallest along the last axis, ascending: (B, M, N) -> (B, M, count)."""
    tokens = distance.shape[-1]
    # torch sorts partially only up to a 64th of a row: padding a row of 196 makes 5 neighbours twice as fast.
    if not distance.is_cuda and tokens < 64 * count <= 2 * tokens:
        distance = pad(distance, (0, 64 * count - tokens), value=math.inf)
    return distance.topk(count, dim=-1, largest=False)[0]


def cluster_dpc_knn(x: Tensor, k: int, neighbors: int, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cluster tokens x (B, N, C) -> centers (B, k) int64, best first, and label (B, N) int64, every token's cluster.

    d is the Euclidean distance over sqrt(C). ``density = exp(-mean of d^2) (+ noise)`` over the ``neighbors`` smallest
    distances of the token, the one to itself included. ``height`` is the distance to the nearest denser token, or the
    image's largest distance if there is none. The centres have the highest density * height. A token belongs to the
    nearest centre, the first if tied, and a centre to itself.
    """
    batch, tokens, _ = x.shape
    distances = _Distances(x.to(accumulator(x.dtype)))
    densities, largest = [], []
    for _, distance in distances:
        densities.append(_smallest(distance, min(neighbors, tokens)).square().mean(-1).neg().exp())
        largest.append(distance.flatten(1).amax(1).unsqueeze(1))
    density = joined(densities)
    farthest = largest[0] if len(largest) == 1 else torch.cat(largest, dim=1).amax(1, keepdim=True)
    if noise is not None:
        density = density + noise.to(density.dtype)
    heights = []
    for rows, distance in distances:
        # 1.0 where not denser, to add the largest distance: three times as fast as a mask of truth values.
        not_denser = density.unsqueeze(1).repeat(1, distance.shape[1], 1).le_(density[:, rows].unsqueeze(2))
        heights.append(torch.addcmul(distance, not_denser, farthest.unsqueeze(2)).amin(-1).minimum(farthest))
    centers = select_topk(density * joined(heights), k).contiguous()
    label = distances.nearest(centers)
    cluster = torch.arange(k, device=x.device).expand(batch, k)
    return centers, label.scatter(1, centers, cluster)
