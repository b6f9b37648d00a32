"""Class attention averaged over heads, without the N x N matrix."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ._rows import accumulator

__all__ = ["cls_scores", "cls_scores_backward", "cls_scores_with_sums", "cls_value_scores", "cls_value_scores_packed"]


def _logits(q: Tensor, k: Tensor, valid: Tensor | None, scale: float) -> Tensor:
    """Return the logits of the class query (B, H, N), -inf for keys that are not valid."""
    dtype = accumulator(k.dtype)
    # An elementwise product and a sum take a third of the time: matmul would first copy the strided K.
    logits = (k.to(dtype) * q.to(dtype).unsqueeze(2)).sum(-1) * scale
    return logits if valid is None else logits.masked_fill(~valid.unsqueeze(1), -torch.inf)


def cls_scores(q: Tensor, k: Tensor, prefix: int, scale: float, valid: Tensor | None = None) -> Tensor:
    """Compute ``scores[b, n] = mean_h softmax_n(scale * q[b, h] . k[b, h, n])`` for the keys after the prefix.

    q (B, H, D), k (B, H, N, D), valid (B, N) or None -> (B, N - prefix).
    """
    return torch.softmax(_logits(q, k, valid, scale), dim=-1)[:, :, prefix:].mean(1)


def cls_scores_with_sums(
    q: Tensor, k: Tensor, prefix: int, scale: float, valid: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Score as :func:`cls_scores`, and return the logits (B, H, N) and their logsumexp (B, H) for the backward pass."""
    logits = _logits(q, k, valid, scale)
    logsumexp = torch.logsumexp(logits, dim=-1)
    return torch.exp(logits[:, :, prefix:] - logsumexp.unsqueeze(-1)).mean(1), logits, logsumexp


def cls_value_scores(q: Tensor, k: Tensor, value: Tensor, valid: Tensor | None, prefix: int, scale: float) -> Tensor:
    """Multiply the class token's attention by the lengths of the values, and sum over heads.

    ``scores[b, n] = sum_h softmax_n(scale * q[b, h] . k[b, h, n]) * |value[b, h, n]|`` for keys after the prefix.

    q (B, H, D), k and value (B, H, N, D), valid (B, N) or None -> (B, N - prefix).
    """
    attention = torch.softmax(_logits(q, k, valid, scale), dim=-1)[:, :, prefix:]
    scores = (attention * torch.linalg.vector_norm(value[:, :, prefix:], dim=-1, dtype=attention.dtype)).sum(1)
    # A weight of 0 times a norm that is not finite would be NaN.
    return scores if valid is None else scores.masked_fill_(~valid[:, prefix:], 0.0)


def cls_value_scores_packed(
    q: Tensor, k: Tensor, value: Tensor, offsets: Tensor, longest: int, prefix: int, scale: float
) -> Tensor:
    """Score packed keys as :func:`cls_value_scores`, image by image, with 0 past the last token of an image.

    q (B, H, D), k and value (1, H, T, D), offsets (B + 1,) -> (B, longest - prefix).
    """
    scores = torch.zeros(q.shape[0], longest - prefix, dtype=accumulator(k.dtype), device=k.device)
    for image, (start, stop) in enumerate(pairwise(offsets.tolist())):
        query, keys, values = q[image : image + 1], k[:, :, start:stop], value[:, :, start:stop]
        scores[image, : stop - start - prefix] = cls_value_scores(query, keys, values, None, prefix, scale)
    return scores


def cls_scores_backward(
    grad: Tensor, q: Tensor, k: Tensor, logits: Tensor, logsumexp: Tensor, prefix: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients (B, H, D) of q and (B, H, N, D) of k for grad (B, N - prefix)."""
    heads = k.shape[1]
    attention = torch.exp(logits - logsumexp.unsqueeze(-1))  # (B, H, N)
    upstream = torch.nn.functional.pad(grad.to(logits.dtype), (prefix, 0)).unsqueeze(1) / heads  # (B, 1, N)
    mean = (attention * upstream).sum(-1, keepdim=True)
    grad_logits = (attention * (upstream - mean) * scale).unsqueeze(-1)  # (B, H, N, 1)
    grad_q = (grad_logits * k.to(logits.dtype)).sum(2)
    grad_k = grad_logits * q.to(logits.dtype).unsqueeze(2)
    return grad_q.to(q.dtype), grad_k.to(k.dtype)
