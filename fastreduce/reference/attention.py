"""Attention, and the scores that its matrix gives the keys.

Keys may have a bias (ToMe's log size), or be hidden softly by a policy (DynamicViT). Queries may be a subset (ATS).
Images may have several lengths and be packed into one row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._blocks import block_rows
from ._images import each_image, matmul
from ._rows import accumulator, take_rows, with_prefix
from .gather_packed import gather_packed, gather_packed_backward
from .gather_tokens import scatter_tokens

__all__ = [
    "attention",
    "attention_backward",
    "attention_policy",
    "attention_policy_backward",
    "attention_policy_with_sums",
    "attention_scores",
    "attention_with_sums",
    "key_scores",
]

Offsets = tuple[Tensor, Tensor]  # offsets of queries and of keys, (B + 1,) each


def _chosen(q: Tensor, index: Tensor, prefix: int, offsets: Offsets | None = None, num_out: int = 0) -> Tensor:
    """Return the chosen queries: (B, H, N, D) -> (B, H, prefix + M, D).

    ``q[b, :, row[b, m]]`` with ``row = [0 .. prefix-1, index + prefix]``. With packed images the result is
    (1, H, num_out, D), and the queries of image b begin at ``offsets[1][b]`` of q.
    """
    tokens = q.transpose(1, 2).flatten(2)
    if offsets is None:
        rows = take_rows(tokens, with_prefix(index, prefix))
    else:
        rows = gather_packed(tokens, index, offsets[1], offsets[0], prefix, num_out, None)
    return rows.unflatten(2, (q.shape[1], q.shape[3])).transpose(1, 2)


def _back(grad: Tensor, index: Tensor, prefix: int, offsets: Offsets | None, num_tokens: int) -> Tensor:
    """Transpose :func:`_chosen`: bring the gradient back to all queries."""
    tokens = grad.transpose(1, 2).flatten(2)
    if offsets is None:
        rows = scatter_tokens(tokens, index, prefix, num_tokens)
    else:
        rows = gather_packed_backward(tokens, index, offsets[1], offsets[0], prefix, num_tokens)
    return rows.unflatten(2, (grad.shape[1], grad.shape[3])).transpose(1, 2)


def _images(offsets: Offsets) -> Iterator[tuple[slice, slice]]:
    """Yield the rows of the queries and of the keys of every image that has queries."""
    queries, keys = (bounds.tolist() for bounds in offsets)
    for image in range(len(queries) - 1):
        if queries[image] < queries[image + 1]:
            yield slice(queries[image], queries[image + 1]), slice(keys[image], keys[image + 1])


def _join(pieces: list[Tensor], like: Tensor, rows: int) -> Tensor:
    """Join the images' rows (1, H, m, ...), padded with zeros to ``rows`` rows, tokens first in memory."""
    pieces = [piece.transpose(1, 2) for piece in pieces]
    past = rows - sum(piece.shape[1] for piece in pieces)
    if past or not pieces:
        pieces.append(like.new_zeros(1, past, like.shape[1], *like.shape[3:]))
    return torch.cat(pieces, dim=1).transpose(1, 2)


def _seen(bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bias (B, N), zeros for images without a visible key, and whether an image has one (B, 1, 1, 1)."""
    seen = (bias > -torch.inf).any(1, keepdim=True)
    return bias.masked_fill(~seen, 0.0), seen[:, :, None, None]


def _logits(q: Tensor, k: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    dtype = accumulator(q.dtype)
    logits = matmul(q.to(dtype) * scale, k.to(dtype).transpose(-1, -2))
    if bias is None:
        return logits
    return logits + bias.to(dtype).view(bias.shape[0], *[1] * (logits.ndim - 2), bias.shape[1])


def _visibility(policy: Tensor, dtype: torch.dtype) -> Tensor:
    """Return G of :func:`attention_policy`, (B, 1, N, N), from the policy (B, N)."""
    own = torch.eye(policy.shape[1], dtype=torch.bool, device=policy.device)
    return torch.where(own, 1.0, policy.to(dtype)[:, None, None, :])


def attention_with_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    prefix: int = 0,
    offsets: Offsets | None = None,
    num_out: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attend, and return for the backward pass the logsumexp (B, H, M), which is -inf for a row without keys."""
    if index is not None:
        q = _chosen(q, index, prefix, offsets, num_out)
    nothing = q.new_empty(0, dtype=accumulator(q.dtype))
    if offsets is not None:
        outs, sums = [], []
        for m, n in _images(offsets):
            out, logsumexp = attention_with_sums(
                q[:, :, m], k[:, :, n], v[:, :, n], scale, None if bias is None else bias[:, n]
            )
            outs.append(out)
            sums.append(logsumexp)
        past = nothing.new_full((1, q.shape[1], q.shape[2] - sum(part.shape[2] for part in sums)), -torch.inf)
        return _join(outs, q, q.shape[2]), torch.cat([*sums, past], dim=2)
    if k.shape[2] == 0:
        return torch.zeros_like(q), nothing.new_full(q.shape[:3], -torch.inf)
    bias, seen = (None, None) if bias is None else _seen(bias)
    logits, values = _logits(q, k, scale, bias), v.to(accumulator(v.dtype))
    logsumexp = logits.logsumexp(-1)
    out = matmul(torch.exp(logits - logsumexp.unsqueeze(-1)), values)
    if seen is not None:
        out, logsumexp = out * seen, logsumexp.masked_fill(~seen.squeeze(-1), -torch.inf)
    return out.to(q.dtype), logsumexp


def attention_policy_with_sums(
    q: Tensor, k: Tensor, v: Tensor, policy: Tensor, scale: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend under a policy, and return three more tensors for the backward pass.

    These are each row's maximum plus the logarithm of its denominator (B, H, M), the denominator (B, H, M), and the
    mean of v (B, H, D).
    """
    logits, values = _logits(q, k, scale), v.to(accumulator(v.dtype))
    maximum = logits.max(-1, keepdim=True).values
    weights = torch.exp(logits - maximum) * _visibility(policy, logits.dtype)
    total = weights.sum(-1, keepdim=True) + eps
    mean = values.mean(2, keepdim=True)
    out = (matmul(weights, values) + eps * mean) / total
    return out.to(q.dtype), (maximum + total.log()).squeeze(-1), total.squeeze(-1), mean.squeeze(2)


def attention_policy(q: Tensor, k: Tensor, v: Tensor, policy: Tensor, scale: float, eps: float) -> Tensor:
    """Compute ``out = A v`` with S[m, n] = scale * q[m] k[n] and a policy p that hides keys softly.

    Formula::

        G[m, n] = p[n] + (1 - p[n]) * [m == n]            # every token sees itself
        E[m, n] = exp(S[m, n] - max_n S[m, n]) * G[m, n]  # the hidden keys count for the maximum
        A[m, n] = (E[m, n] + eps / N) / (sum_n E[m, n] + eps)

    q, k, v (B, H, N, D), policy (B, N) -> (B, H, N, D).
    """
    return attention_policy_with_sums(q, k, v, policy, scale, eps)[0]


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Compute softmax attention by PyTorch, image by image where its batch would change the rounding."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)

    tensors = (q, k, v) if mask is None else (q, k, v, mask)
    # With a single head PyTorch gives the products of one image all threads. In float64 products depend on where a
    # thread's buffer lies.
    if q.shape[1] == 1 or q.dtype == torch.float64:
        return each_image(attend, *tensors)
    return attend(*tensors)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    prefix: int = 0,
    offsets: Offsets | None = None,
    num_out: int = 0,
) -> Tensor:
    """Attend over keys with a bias each; zeros where every bias is -inf.

    ``out = A v``, where A = softmax(S) and S[m, n] = scale * q[m] k[n] + bias[n].

    q (B, H, M, D), k and v (B, H, N, D), bias (B, N) or None -> (B, H, M, D).

    With an index (B, K) the queries are ``q[b, :, row[b, m]]``, row = [0 .. prefix-1, index + prefix].

    With offsets B is 1. The queries of image i are the rows offsets[0][i] .. offsets[0][i + 1]. They see the keys in
    the rows offsets[1][i] .. offsets[1][i + 1]. Rows past the end are zeros.

    With both, the queries of image i are chosen from the rows of q that begin at offsets[1][i]. Their number follows
    from offsets[0], and the result has ``num_out`` rows.
    """
    if index is not None:
        q = _chosen(q, index, prefix, offsets, num_out)
    if offsets is not None:
        pieces = [
            attention(q[:, :, m], k[:, :, n], v[:, :, n], scale, None if bias is None else bias[:, n])
            for m, n in _images(offsets)
        ]
        return _join(pieces, q, q.shape[2])
    if k.shape[2] == 0:
        return q * 0.0
    mask = None if bias is None else bias.to(accumulator(q.dtype))[:, None, None, :]
    if mask is None or not (torch.is_grad_enabled() and mask.requires_grad):
        return _fused(q, k, v, mask, scale)
    # A mask with a gradient takes another route, of other bits. It gives the gradients, the usual route the values.
    aside = _fused(q, k, v, mask, scale)
    return _fused(q.detach(), k.detach(), v.detach(), mask.detach(), scale) + (aside - aside.detach())


def _through(
    q: Tensor, k: Tensor, grad_logits: Tensor, weights: Tensor, upstream: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v from the gradients of the logits (B, H, M, N) and of the result."""
    grad_q = (grad_logits @ k.to(grad_logits.dtype)) * scale
    grad_k = (grad_logits.transpose(2, 3) @ q.to(grad_logits.dtype)) * scale
    return grad_q, grad_k, weights.transpose(2, 3) @ upstream


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    scale: float,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    prefix: int = 0,
    offsets: Offsets | None = None,
    grad_scores: Tensor | None = None,
    kind: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and the bias, (B, 0) without one, for grad (B, H, M, D).

    ``grad_scores``, if given, is the gradient of the scores of :func:`key_scores`.
    """
    num_tokens = q.shape[2]
    if index is not None:
        q = _chosen(q, index, prefix, offsets, grad.shape[2])
    if offsets is not None:
        grads_q, grads_k, grads_v, grads_bias = (torch.zeros_like(t) for t in (q, k, v, k if bias is None else bias))
        for m, n in _images(offsets):
            grads_q[:, :, m], grads_k[:, :, n], grads_v[:, :, n], grad_bias = attention_backward(
                *(grad[:, :, m], q[:, :, m], k[:, :, n], v[:, :, n], out[:, :, m], logsumexp[:, :, m]),
                *(scale, None if bias is None else bias[:, n]),
            )
            if bias is not None:
                grads_bias[:, n] = grad_bias
        if index is not None:
            grads_q = _back(grads_q, index, prefix, offsets, num_tokens)
        return grads_q, grads_k, grads_v, q.new_empty(1, 0) if bias is None else grads_bias
    logits = _logits(q, k, scale, bias)
    dtype = logits.dtype
    upstream = grad.to(dtype)
    delta = (upstream * out.to(dtype)).sum(-1, keepdim=True)
    slope = upstream @ v.to(dtype).transpose(2, 3)
    # A query without keys has a logsumexp of -inf, and weights of zero.
    weights = torch.exp(logits - logsumexp.masked_fill(logsumexp == -torch.inf, torch.inf).unsqueeze(-1))
    if grad_scores is not None:
        of_scores = grad_scores.to(dtype)[:, None, None, :]  # (B, 1, 1, N) or (B, 1, 1, N - prefix)
        if kind == "class":
            of_scores = torch.nn.functional.pad(of_scores, (prefix, 0)) / q.shape[1]
            of_scores = torch.nn.functional.pad(of_scores, (0, 0, 0, q.shape[2] - 1))
        slope = slope + of_scores
        delta = delta + (weights * of_scores).sum(-1, keepdim=True)
    grad_logits = weights * (slope - delta)
    grad_bias = q.new_empty(q.shape[0], 0) if bias is None else grad_logits.sum((1, 2)).to(bias.dtype)
    grad_q, grad_k, grad_v = _through(q, k, grad_logits, weights, upstream, scale)
    if index is not None:
        grad_q = _back(grad_q, index, prefix, None, num_tokens)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_bias


def attention_policy_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    total: Tensor,
    mean: Tensor,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and the policy for grad (B, H, N, D).

    The maximum of a row has a gradient too; it goes to the first key that reaches the maximum.
    """
    logits = _logits(q, k, scale)
    dtype = logits.dtype
    upstream = grad.to(dtype)
    delta = (upstream * out.to(dtype)).sum(-1, keepdim=True)
    weights = torch.exp(logits - logsumexp.unsqueeze(-1))
    slope = upstream @ v.to(dtype).transpose(2, 3) - delta
    diagonal = torch.eye(policy.shape[1], dtype=torch.bool, device=policy.device)
    grad_policy = (weights * slope).masked_fill(diagonal, 0.0).sum((1, 2)).to(policy.dtype)
    weights = weights * _visibility(policy, dtype)
    share = eps / total.unsqueeze(-1)
    of_maximum = share * (upstream @ mean.unsqueeze(-1) - delta)
    grad_logits = (weights * slope).scatter_add(-1, logits.argmax(-1, keepdim=True), of_maximum)
    weights = weights + share / policy.shape[1]
    grad_q, grad_k, grad_v = _through(q, k, grad_logits, weights, upstream, scale)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_policy


def key_scores(
    q: Tensor, k: Tensor, logsumexp: Tensor, kind: str, bias: Tensor | None, prefix: int, scale: float
) -> Tensor:
    """Return the scores of :func:`attention_scores` from the logsumexp (B, H, M) of the same logits."""
    logsumexp = logsumexp.masked_fill(logsumexp == -torch.inf, torch.inf).unsqueeze(-1)
    if kind == "class":
        return torch.exp(_logits(q[:, :, :1], k, scale, bias) - logsumexp[:, :, :1])[:, :, 0, prefix:].mean(1)
    received = logsumexp.new_zeros(k.shape[0], k.shape[2])
    rows = block_rows(k.shape[2])
    for head in range(k.shape[1]):
        for block, lse in zip(q[:, head].split(rows, 1), logsumexp[:, head].split(rows, 1), strict=True):
            received = received + torch.exp(_logits(block, k[:, head], scale, bias) - lse).sum(1)
    return received


def attention_scores(
    q: Tensor, k: Tensor, v: Tensor, kind: str, bias: Tensor | None, prefix: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend, and return scores of the keys from the matrix A (B, H, M, N).

    ``kind="class"``: the attention of query 0, averaged over heads, to the keys after the prefix (B, N - prefix).
    ``kind="received"``: the attention that a key receives, summed over heads and queries (B, N).
    """
    dtype = accumulator(q.dtype)
    shown, seen = (None, None) if bias is None else _seen(bias)
    if kind == "class":
        # An elementwise product and a sum take a third of the time: matmul would first copy the strided K.
        logits = (k.to(dtype) * q[:, :, :1].to(dtype)).sum(-1) * scale  # (B, H, N)
        if shown is not None:
            logits = logits + shown.to(dtype).unsqueeze(1)
        scores = torch.softmax(logits, dim=-1)[:, :, prefix:].mean(1)
        scores = scores if seen is None else scores * seen[:, 0, 0]
        return attention(q, k, v, scale, bias), scores
    outs, received = [], q.new_zeros(k.shape[0], k.shape[2], dtype=dtype)
    rows = block_rows(k.shape[2])
    for queries, keys, values in zip(q.unbind(1), k.unbind(1), v.to(dtype).unbind(1), strict=True):
        blocks = []
        for block in queries.split(rows, dim=1):
            weights = torch.softmax(_logits(block, keys, scale, shown), dim=-1)
            weights = weights if seen is None else weights * seen[:, 0]
            blocks.append(matmul(weights, values))
            received = received + weights.sum(1)
        outs.append(torch.cat(blocks, dim=1))
    return torch.stack(outs, dim=2).transpose(1, 2).to(q.dtype), received
