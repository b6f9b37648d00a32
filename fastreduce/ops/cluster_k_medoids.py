"""``cluster_k_medoids``: clusters of tokens, each with one of its tokens as the center."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backends import Resolved, resolve
from ._check import check_count, check_floating, check_same, check_shape, shape_of
from ._library import operator

__all__ = ["cluster_k_medoids"]

COSTS = ("all", "members")


def _reference_cluster(x: Tensor, weights: Tensor, k: int, iters: int) -> tuple[Tensor, Tensor]:
    centers, label = reference.cluster_k_medoids(x, weights, k, iters, False, 0)
    return centers.clone(memory_format=torch.contiguous_format), label.contiguous()


@operator("cluster_k_medoids.cluster_k_medoids", _reference_cluster, dense="x")
def _cluster(x: Tensor, weights: Tensor, k: int, iters: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k, dtype=torch.int64), x.new_empty(x.shape[:2], dtype=torch.int64)


def cluster_k_medoids_unchecked(
    x: Tensor,
    weights: Tensor | None,
    k: int,
    *,
    iters: int = 3,
    cost: str = "all",
    first: int = 0,
    backend: Resolved,
) -> tuple[Tensor, Tensor]:
    """Call :func:`cluster_k_medoids` without checks, by the backend named."""
    x, weights = x.detach(), None if weights is None else weights.detach()
    if backend == "reference" or weights is None or cost == "members":
        return reference.cluster_k_medoids(x, weights, k, iters, cost == "members", first)
    return _cluster(x, weights, k, iters)


def cluster_k_medoids(
    x: Tensor,
    weights: Tensor | None,
    k: int,
    *,
    iters: int = 3,
    cost: str = "all",
    first: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cluster every image's tokens by K-Medoids (Haurum et al., "Which Tokens to Use?", section 3).

    Start from the k tokens of the highest weight. ``iters`` times, every token joins its nearest center and every
    cluster takes its token of the least cost as its center; at the end every token joins its nearest center once more.

    - ``cost="all"``, as in the released code: ``weights[n] * sum(d(n, i))`` over all tokens i. The weight is the one
      of the candidate n, so light tokens are preferred, and the cost is the same in every iteration.
    - ``cost="members"``, as the method means: ``sum(weights[i] * d(n, i))`` over the tokens i of n's own cluster.

    Ties go to the lower index, of clusters and of tokens. An empty cluster takes token 0, so a center can occur twice;
    then all its tokens join the first of the two. A distance that is NaN counts as infinite; a weight or a cost that is
    NaN comes last. The released code takes a token outside a cluster if all costs inside reach 1e6 * N; ours does not.

    Distances are Euclidean, by ``sqrt(|a|^2 + |b|^2 - 2 ab)`` in float32 (float64 for float64 x), as ``torch.cdist``
    computes them for more than 25 tokens. The kernels hold all distances of an image, ``4 * N ** 2`` bytes. They take
    as many images at a time as 256 MB hold. ``cost="members"``, and a start without weights, have no kernels: they run
    on PyTorch's operators with every backend.

    Equivalent PyTorch of one iteration with ``cost="all"``::

        d = torch.cdist(x, x)
        label = d.gather(2, centers.unsqueeze(1).expand(-1, N, -1)).argmin(2)
        outside = label.unsqueeze(1) != torch.arange(k).unsqueeze(1)
        centers = (weights.unsqueeze(2) * d).sum(2).unsqueeze(1).masked_fill(outside, torch.inf).argmin(2)

    Args:
        x: (B, N, C) tokens without the prefix. float32, float16, bfloat16 (reference: any).
        weights: (B, N) attention that every token receives, or None. Then all weigh 1, and the start is token ``first``
            and k - 1 times the token whose *largest* distance to the chosen ones is largest, 0 for a chosen token. The
            released code does so; the usual rule takes the smallest distance.
        k: number of clusters, 1 .. N.
        iters: number of iterations, at least 0.
        cost: ``"all"`` or ``"members"``.
        first: the token to start from without weights, 0 .. N - 1.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        centers (B, k) int64, the tokens of x that stand for the clusters, and label (B, N) int64 with values
        0 .. k - 1. No gradient.

    Raises:
        ValueError: wrong shapes, devices that differ, an unknown cost, k, iters or first out of range.
        TypeError: x or weights not floating point; k, iters or first not an integer.
    """
    check_shape("x", x, "B N C")
    check_floating("x", x)
    tokens = x.shape[1]
    if weights is not None:
        check_shape("weights", weights, "B N")
        check_floating("weights", weights)
        check_same("x", x, "weights", weights)
        if shape_of(weights) != shape_of(x)[:2]:
            raise ValueError(f"weights must have shape {shape_of(x)[:2]}, got {shape_of(weights)}")
    if cost not in COSTS:
        raise ValueError(f"unknown cost {cost!r}; expected one of {', '.join(map(repr, COSTS))}")
    if tokens == 0:
        raise ValueError(f"x must have at least one token, got shape {shape_of(x)}")
    if x.shape[2] == 0:
        raise ValueError(f"x must have at least one channel, got shape {shape_of(x)}")
    k = check_count("k", k, 1, tokens)
    iters = check_count("iters", iters, 0, 2**31 - 1)
    first = check_count("first", first, 0, tokens - 1)
    chosen = resolve(backend, x, *(() if weights is None else (weights,)))
    return cluster_k_medoids_unchecked(x, weights, k, iters=iters, cost=cost, first=first, backend=chosen)
