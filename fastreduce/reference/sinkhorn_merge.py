"""Sums of normalised tokens under an entropic transport plan between tokens and centres."""

from __future__ import annotations

import torch
from torch import Tensor

from ._images import bmm, image_parts
from ._rows import accumulator

__all__ = ["sinkhorn_merge", "sinkhorn_merge_backward", "sinkhorn_merge_inference"]


def sinkhorn_merge(x: Tensor, centers: Tensor, eps: float, iters: int, head: Tensor | None) -> tuple[Tensor, ...]:
    """Merge normalised tokens by W, the transport plan after ``iters`` iterations.

    ``merged[k] = sum_n W[n, k] y[n]`` with ``y = x / max(|x|, 1e-12)``.

    ``Z[n, k] = y[n] . centers[k] / eps`` and ``log W = Z + c[n] + a[k]``. From c = 0, ``a = -logsumexp_n(Z + c)`` and
    ``c = -logsumexp_k(Z + a)`` in turn. Tokens and clusters have the same marginal, -log(K + N), which cancels.

    x (B, N, C), centers (K, C), head (B, P, C) or None -> merged (B, P + K, C), and without gradient similarity Z
    (B, N, K), token_bias c (B, N), inverse_norm 1 / max(|x|, 1e-12) (B, N), and for every iteration token_shifts
    (B, iters, N), token_scales (B, iters, N) and cluster_biases a (B, iters, K). A shift is the maximum of a row of
    Z + a. A scale is 1 / sum(exp(Z + a - shift)) over the row.
    """
    dtype = accumulator(x.dtype)
    out_dtype = x.dtype if head is None else torch.promote_types(x.dtype, head.dtype)
    x = x.to(dtype)
    inverse_norm = torch.linalg.vector_norm(x, dim=2, keepdim=True).clamp_min(1e-12).reciprocal()
    # Norms go into the smaller matrices, so normalised tokens are never written; bmm takes any strides.
    directions = (centers.to(dtype) / eps).t().expand(x.shape[0], -1, -1)
    similarity = bmm(x, directions) * inverse_norm
    bias = -torch.logsumexp(similarity, dim=1, keepdim=True)
    weights = similarity
    shifts, scales, biases = [], [], []
    for step in range(iters):
        if step:  # W = exp(Z + a + c), so logsumexp_n(Z + c) = log(W's column sums) - a; the sums are at least 1 / K
            bias = bias - weights.sum(1, keepdim=True).log()
        scores = similarity + bias
        weights = torch.softmax(scores, dim=2)
        shifts.append(scores.detach().amax(2))
        scales.append(weights.detach().amax(2))  # the largest weight of a row is exp(0) / sum
        biases.append(bias.detach())
    merged = bmm((weights * inverse_norm).mT, x).to(out_dtype)
    if head is not None:
        merged = torch.cat([head.to(out_dtype), merged], dim=1)
    token_bias = scales[-1].log() - shifts[-1]
    saved = (
        inverse_norm.detach().squeeze(2),
        torch.stack(shifts, dim=1),
        torch.stack(scales, dim=1),
        torch.cat(biases, 1),
    )
    return merged, similarity.detach(), token_bias, *saved


def sinkhorn_merge_inference(
    x: Tensor, centers: Tensor, eps: float, iters: int, head: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the merged rows, c (B, N) and all a (B, iters, K), with some images' similarities in memory at a time."""
    found = []
    four = 4 * accumulator(x.dtype).itemsize * x.shape[1] * centers.shape[0]  # matrices: scores, plan and two more
    for part in image_parts(x.shape[0], four):
        outputs = sinkhorn_merge(x[part], centers, eps, iters, None if head is None else head[part])
        found.append((outputs[0], outputs[2], outputs[-1]))
    merged, token_bias, biases = (one[0] if len(one) == 1 else torch.cat(one) for one in zip(*found, strict=True))
    return merged, token_bias, biases


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
    """Return the gradients (B, N, C) of x and (K, C) of the centres, through every iteration, for grad (B, K, C)."""
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
