"""Density-peak clustering by nearest neighbours: dense tokens that lie far from any denser one become centres."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._rows import accumulator, take_rows
from .select_topk import select_topk

__all__ = ["cluster_dpc_knn"]


def _smallest(distance: Tensor, count: int) -> Tensor:
    """(B, N, N) -> (B, N, count), ascending."""
    tokens = distance.shape[-1]
    # torch sorts partially only up to a 64th of a row: at N = 196 padding makes 5 neighbours twice as fast.
    if not distance.is_cuda and tokens < 64 * count <= 2 * tokens:
        distance = pad(distance, (0, 64 * count - tokens), value=math.inf)
    return distance.topk(count, dim=-1, largest=False)[0]


def cluster_dpc_knn(x: Tensor, k: int, neighbors: int, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens x (B, N, C) -> centers (B, k) int64, best first, and label (B, N) int64, the cluster of every token.

    With d the Euclidean distance over sqrt(C): ``density = exp(-mean of the smallest d^2) (+ noise)``, over as many of
    the token's distances as ``neighbors`` says, its own included; ``height`` is the distance to the nearest denser
    token, or the image's largest where there is none; the centres have the highest density * height. A token belongs to
    the nearest centre, the first if tied, and a centre to itself.
    """
    batch, tokens, channels = x.shape
    x = x.to(accumulator(x.dtype))
    distance = torch.cdist(x, x).div_(math.sqrt(channels))  # (B, N, N)
    density = _smallest(distance, min(neighbors, tokens)).square().mean(-1).neg().exp()
    if noise is not None:
        density = density + noise.to(density.dtype)
    farthest = distance.flatten(1).amax(1).unsqueeze(1)
    # 1.0 where not denser, which adds the largest distance: three times as fast as a mask of truth values.
    not_denser = density.unsqueeze(1).repeat(1, tokens, 1).le_(density.unsqueeze(2))
    height = torch.addcmul(distance, not_denser, farthest.unsqueeze(2)).amin(-1).minimum(farthest)
    centers = select_topk(density * height, k).contiguous()
    label = take_rows(distance, centers).min(1)[1]
    cluster = torch.arange(k, device=x.device).expand(batch, k)
    return centers, label.scatter_(1, centers, cluster)
