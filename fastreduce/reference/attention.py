"""Attention whose keys a policy hides softly (DynamicViT, METHODS section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._rows import accumulator

__all__ = ["attention", "attention_backward", "attention_with_sums"]


def _logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    dtype = accumulator(q.dtype)
    return (q.to(dtype) * scale) @ k.to(dtype).transpose(2, 3)


def _visibility(policy: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, N) -> G (B, 1, N, N), where every token sees itself."""
    own = torch.eye(policy.shape[1], dtype=torch.bool, device=policy.device)
    return torch.where(own, 1.0, policy.to(dtype)[:, None, None, :])


def attention_with_sums(
    q: Tensor, k: Tensor, v: Tensor, policy: Tensor | None, scale: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`attention`, and for its backward pass three more tensors.

    The maximum of a row plus the logarithm of its denominator (B, H, M), the denominator (B, H, M), the mean (B, H, D)
    of v; without a policy the last two are empty.
    """
    logits, values = _logits(q, k, scale), v.to(accumulator(v.dtype))
    if policy is None:
        logsumexp = logits.logsumexp(-1)
        out = torch.exp(logits - logsumexp.unsqueeze(-1)) @ values
        return out.to(q.dtype), logsumexp, logits.new_empty(*q.shape[:2], 0), logits.new_empty(*q.shape[:2], 0)
    maximum = logits.max(-1, keepdim=True).values
    weights = torch.exp(logits - maximum) * _visibility(policy, logits.dtype)
    total = weights.sum(-1, keepdim=True) + eps
    mean = values.mean(2, keepdim=True)
    out = (weights @ values + eps * mean) / total
    return out.to(q.dtype), (maximum + total.log()).squeeze(-1), total.squeeze(-1), mean.squeeze(2)


def attention(q: Tensor, k: Tensor, v: Tensor, policy: Tensor | None, scale: float, eps: float) -> Tensor:
    """``out = A v``, where A = softmax(S) and S = scale * q k^T.

    With a policy p::

        G[m, n] = p[n] + (1 - p[n]) * [m == n]            # every token sees itself
        E[m, n] = exp(S[m, n] - max_n S[m, n]) * G[m, n]  # the hidden keys count for the maximum
        A[m, n] = (E[m, n] + eps / N) / (sum_n E[m, n] + eps)

    q (B, H, M, D), k and v (B, H, N, D), policy (B, N) or None -> (B, H, M, D).
    """
    if policy is None:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    return attention_with_sums(q, k, v, policy, scale, eps)[0]


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    total: Tensor,
    mean: Tensor,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the policy, (B, 0) without one, for grad (B, H, M, D).

    With a policy the maximum of a row has a gradient too, which goes to the first key that reaches it.
    """
    logits = _logits(q, k, scale)
    dtype = logits.dtype
    upstream = grad.to(dtype)
    delta = (upstream * out.to(dtype)).sum(-1, keepdim=True)
    slope = upstream @ v.to(dtype).transpose(2, 3) - delta
    weights = torch.exp(logits - logsumexp.unsqueeze(-1))
    if policy is None:
        grad_policy = q.new_empty(q.shape[0], 0)
        grad_logits = weights * slope
    else:
        diagonal = torch.eye(policy.shape[1], dtype=torch.bool, device=policy.device)
        grad_policy = (weights * slope).masked_fill(diagonal, 0.0).sum((1, 2)).to(policy.dtype)
        weights = weights * _visibility(policy, dtype)
        share = eps / total.unsqueeze(-1)
        of_maximum = share * (upstream @ mean.unsqueeze(-1) - delta)
        grad_logits = (weights * slope).scatter_add(-1, logits.argmax(-1, keepdim=True), of_maximum)
        weights = weights + share / policy.shape[1]
    grad_q = (grad_logits @ k.to(dtype)) * scale
    grad_k = (grad_logits.transpose(2, 3) @ q.to(dtype)) * scale
    grad_v = weights.transpose(2, 3) @ upstream
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_policy
