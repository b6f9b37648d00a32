"""Kept rows and one score-weighted sum of all others."""

from __future__ import annotations

import torch
from torch import Tensor

from ._images import bmm
from ._rows import accumulator, add_residual, flat_rows, take_rows, with_prefix

__all__ = ["fuse_tokens", "fuse_tokens_backward"]


def _rest_weights(order: Tensor, scores: Tensor, k: int) -> Tensor:
    """Return the score of every patch token, zero for kept ones: (B, P)."""
    return scores.scatter(1, order[:, :k].long(), 0.0)


def fuse_tokens(
    x: Tensor,
    order: Tensor,
    scores: Tensor,
    k: int,
    prefix: int,
    residual: Tensor | None,
    residual_bias: Tensor | None = None,
) -> Tensor:
    """Return the rows ``[prefix, order[:k], sum of scores[n] * x[n] over n in order[k:]]`` plus the residual.

    The last row also gets ``(sum of scores[n] - 1) * residual_bias``. x (B, N, C), order (B, P) a permutation of the
    P = N - prefix patch tokens, scores (B, P), residual (B, prefix + k + 1, C) or None, residual_bias (C,) or None ->
    (B, prefix + k + 1, C).
    """
    dtype = accumulator(x.dtype)
    kept = take_rows(x, with_prefix(order[:, :k], prefix))
    weights = _rest_weights(order, scores.to(dtype), k).unsqueeze(1)
    fused = bmm(weights, x[:, prefix:].to(dtype))  # no copy of the rest
    if residual_bias is not None:
        fused = fused + (weights.sum(2, keepdim=True) - 1) * residual_bias.to(dtype)
    return add_residual(torch.cat([kept, fused.to(x.dtype)], dim=1), residual)


def fuse_tokens_backward(
    grad: Tensor, x: Tensor, order: Tensor, scores: Tensor, k: int, prefix: int, residual_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the gradients (B, N, C) of x and (B, P) of the scores for grad (B, prefix + k + 1, C)."""
    batch, tokens, channels = x.shape
    dtype = accumulator(x.dtype)
    grad_fused = grad[:, -1:].to(dtype)  # (B, 1, C)
    weights = torch.nn.functional.pad(_rest_weights(order, scores.to(dtype), k), (prefix, 0)).unsqueeze(-1)
    grad_x = (weights * grad_fused).reshape(batch * tokens, channels)
    rows = flat_rows(with_prefix(order[:, :k], prefix), tokens)
    grad_x = grad_x.index_copy(0, rows, grad[:, :-1].reshape(-1, channels).to(dtype))
    patches = x[:, prefix:].to(dtype)
    if residual_bias is not None:
        patches = patches + residual_bias.to(dtype)
    grad_scores = (patches * grad_fused).sum(-1).scatter(1, order[:, :k].long(), 0.0)
    return grad_x.view(batch, tokens, channels).to(x.dtype), grad_scores.to(scores.dtype)
