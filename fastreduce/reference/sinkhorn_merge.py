"""Sums of normalised tokens under an entropic transport plan between tokens and centres."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ._blocks import joined, row_blocks
from ._images import bmm
from ._rows import accumulator

__all__ = ["sinkhorn_merge", "sinkhorn_merge_backward", "sinkhorn_merge_blocks"]


class _Transport:
    """The tokens' side of the products: what full and block-wise form share, so that their bits are the same."""

    def __init__(self, x: Tensor, centers: Tensor, eps: float, head: Tensor | None):
        dtype = accumulator(x.dtype)
        self.out_dtype = x.dtype if head is None else torch.promote_types(x.dtype, head.dtype)
        self.x, self.head = x.to(dtype), head
        norm = torch.linalg.vector_norm(self.x, dim=2, keepdim=True)
        self.inverse_norm = norm.clamp_min(1e-12).reciprocal()
        # The norms go into the smaller matrices, so the normalised tokens are never written; bmm takes any strides.
        self.directions = (centers.to(dtype) / eps).t().expand(x.shape[0], -1, -1)
        self.blocks = row_blocks(x.shape[1], centers.shape[0])

    def similarity(self, rows: slice) -> Tensor:
        """Z of some tokens, (B, rows, K)."""
        return bmm(self.x[:, rows], self.directions) * self.inverse_norm[:, rows]

    def merged(self, shares: Iterable[tuple[slice, Tensor]]) -> Tensor:
        """Sums (B, P + K, C) of the tokens behind the head, by blocks of tokens and their weights (B, rows, K)."""
        sums = None
        for rows, weights in shares:
            share = bmm((weights * self.inverse_norm[:, rows]).mT, self.x[:, rows])
            sums = share if sums is None else sums + share
        assert sums is not None
        sums = sums.to(self.out_dtype)
        return sums if self.head is None else torch.cat([self.head.to(self.out_dtype), sums], dim=1)


def _start(starts: list[Tensor]) -> Tensor:
    """Return a (B, 1, K) before the first iteration, from the logsumexp (B, K) of every block."""
    return -(starts[0] if len(starts) == 1 else torch.logsumexp(torch.stack(starts), dim=0)).unsqueeze(1)


def _update(bias: Tensor, received: list[Tensor]) -> Tensor:
    """Return a (B, 1, K) after an iteration, from what the clusters get of every block (B, 1, K).

    weights = exp(Z + a + c), so logsumexp_n(Z + c) = log(their column sums) - a; these are at least 1 / K.
    """
    return bias - joined(received).sum(1, keepdim=True).log()


def sinkhorn_merge(x: Tensor, centers: Tensor, eps: float, iters: int, head: Tensor | None) -> tuple[Tensor, ...]:
    """``merged[k] = sum_n W[n, k] y[n]`` with ``y = x / max(|x|, 1e-12)`` and W the plan after ``iters`` iterations.

    ``Z[n, k] = y[n] . centers[k] / eps``, ``log W = Z + c[n] + a[k]`` and, from c = 0, ``a = -logsumexp_n(Z + c)`` and
    ``c = -logsumexp_k(Z + a)`` in turn. The one marginal of tokens and clusters alike, -log(K + N), cancels.

    x (B, N, C), centers (K, C), head (B, P, C) or None -> merged (B, P + K, C), and without gradient similarity Z
    (B, N, K), token_bias c (B, N), inverse_norm 1 / max(|x|, 1e-12) (B, N), and of every iteration the largest entry of
    each row of Z + a, token_shifts (B, iters, N), the reciprocal of the sum of exponentials of the row less that,
    token_scales (B, iters, N), and a, cluster_biases (B, iters, K).
    """
    transport = _Transport(x, centers, eps, head)
    similarities = [transport.similarity(rows) for rows in transport.blocks]
    bias = _start([torch.logsumexp(some, dim=1) for some in similarities])
    shifts, scales, biases = [], [], []
    weights: list[Tensor] = []
    for step in range(iters):
        if step:
            bias = _update(bias, [some.sum(1, keepdim=True) for some in weights])
        scores = [some + bias for some in similarities]
        weights = [torch.softmax(some, dim=2) for some in scores]
        shifts.append(joined([some.detach().amax(2) for some in scores]))
        scales.append(joined([some.detach().amax(2) for some in weights]))  # of the largest entry, exp(0) / sum
        biases.append(bias.detach())
    merged = transport.merged(zip(transport.blocks, weights, strict=True))
    token_bias = scales[-1].log() - shifts[-1]
    saved = (
        transport.inverse_norm.detach().squeeze(2),
        torch.stack(shifts, dim=1),
        torch.stack(scales, dim=1),
        torch.cat(biases, 1),
    )
    return merged, joined(similarities).detach(), token_bias, *saved


def sinkhorn_merge_blocks(
    x: Tensor, centers: Tensor, eps: float, iters: int, head: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same merged rows, with c (B, N) and a (B, K), some tokens at a time and without gradient.

    Nothing of the size of Z is kept: it is computed again for the start and for every iteration.
    """
    transport = _Transport(x, centers, eps, head)
    bias = _start([torch.logsumexp(transport.similarity(rows), dim=1) for rows in transport.blocks])

    for _ in range(iters - 1):
        sums = [
            torch.softmax(transport.similarity(rows).add_(bias), dim=2).sum(1, keepdim=True)
            for rows in transport.blocks
        ]
        bias = _update(bias, sums)
    token_biases = []

    def shares() -> Iterator[tuple[slice, Tensor]]:
        for rows in transport.blocks:
            scores = transport.similarity(rows).add_(bias)
            largest = scores.amax(2)
            weights = torch.softmax(scores, dim=2)
            token_biases.append(weights.amax(2).log() - largest)
            yield rows, weights

    merged = transport.merged(shares())
    return merged, joined(token_biases), bias.squeeze(1)


def sinkhorn_merge_backward(
    grad: Tensor,
    x: Tensor,
    centers: Tensor,
    similarity: Tensor,
    inverse_norm: Tensor,
    token_shifts: Tensor,
    token_scales: Tensor,
    cluster_biases: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients (B, N, C) of x and (K, C) of the centres, through every iteration, for grad (B, K, C) of merged."""
    dtype = similarity.dtype
    grad, norm = grad.to(dtype), inverse_norm.unsqueeze(2)
    unit = x.to(dtype) * norm
    scores = similarity.unsqueeze(1) + cluster_biases.unsqueeze(2)  # (B, iters, N, K)
    plans = torch.exp(scores - token_shifts.unsqueeze(3)) * token_scales.unsqueeze(3)
    weights = plans[:, -1]
    grad_similarity = weights * torch.bmm(unit, grad.mT)
    grad_cluster = grad_similarity.sum(1, keepdim=True)
    grad_token = grad_similarity.sum(2, keepdim=True)
    for step in range(plans.shape[1] - 1, -1, -1):
        share = plans[:, step] * grad_token
        grad_similarity = grad_similarity - share
        grad_cluster = grad_cluster - share.sum(1, keepdim=True)
        # The plan before this step, its columns scaled to sum to one.
        before = plans[:, step - 1] if step else torch.exp(scores[:, 0])
        share = before / before.sum(1, keepdim=True) * grad_cluster
        grad_similarity = grad_similarity - share
        grad_token = -share.sum(2, keepdim=True)
        grad_cluster = torch.zeros_like(grad_cluster)
    grad_unit = torch.matmul(grad_similarity, centers.to(dtype) / eps) + torch.bmm(weights, grad)
    grad_centers = torch.matmul(grad_similarity.flatten(0, 1).mT, unit.flatten(0, 1)) / eps
    along = (unit * grad_unit).sum(2, keepdim=True) * (norm < 0.999999e12)  # a clamped norm has no gradient
    return ((grad_unit - unit * along) * norm).to(x.dtype), grad_centers.to(centers.dtype)
