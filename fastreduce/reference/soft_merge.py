"""Weighted sums of all tokens, one for each cluster, with weights that are a softmax over the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ._blocks import joined, split
from ._images import bmm, each_image
from ._rows import accumulator

__all__ = ["soft_merge", "soft_merge_backward"]


def soft_merge(logits: Tensor, x: Tensor, head: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum the tokens by weights that are a softmax over the tokens.

    ``merged[k] = sum_n weight[n, k] x[n]`` with ``weight[n, k] = exp(logits[n, k] - logsumexp_n(logits[:, k]))``.

    logits (B, N, K), x (B, N, C), head (B, P, C) or None -> rows [head, merged] (B, P + K, C) and, without
    gradient, the logsumexp (B, K).
    """
    dtype = accumulator(torch.promote_types(logits.dtype, x.dtype))
    x_wide, parts = x.to(dtype), []

    def softmax(logits: Tensor) -> Tensor:
        return torch.softmax(logits, dim=1, dtype=dtype)

    for some in split(logits, x.shape[1], dim=2):  # clusters do not depend on one another
        weight = each_image(softmax, some)  # not over the last dimension, so threads' shares change the rounding
        # From the largest entry of each column, in a third of the time: torch.logsumexp takes all exponentials again.
        largest = some.detach().amax(1).to(dtype)
        logsumexp = largest - weight.detach().amax(1).log_()
        parts.append((bmm(weight.transpose(1, 2), x_wide), logsumexp))
    merged, logsumexp = map(joined, zip(*parts, strict=True))
    if head is None:
        return merged.to(x.dtype), logsumexp
    promoted = torch.promote_types(x.dtype, head.dtype)
    return torch.cat([head.to(promoted), merged.to(promoted)], dim=1), logsumexp


def soft_merge_backward(
    grad: Tensor, logits: Tensor, x: Tensor, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients (B, N, K) of the logits and (B, N, C) of x for grad (B, P + K, C) of the rows."""
    clusters = logits.shape[2]
    dtype = logsumexp.dtype
    grad_merged = grad[:, grad.shape[1] - clusters :].to(dtype)
    merged = out[:, out.shape[1] - clusters :].to(dtype)
    weight = torch.exp(logits.to(dtype) - logsumexp.unsqueeze(1))
    delta = (grad_merged * merged).sum(-1).unsqueeze(1)  # the sum over tokens in the gradient of the softmax
    grad_logits = weight * (torch.bmm(x.to(dtype), grad_merged.transpose(1, 2)) - delta)
    return grad_logits.to(logits.dtype).contiguous(), torch.bmm(weight, grad_merged).to(x.dtype)
