"""``attention_cls_scores`` and ``attention_received_scores``: attention, and how much of it every key gets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import Resolved, resolve
from ._check import check_count, check_scale, shape_of
from ._library import differentiates_again, gradients_again, operator, wants_gradient
from .attention import backward, check_head_dim, check_of_keys, check_qkv, forward

__all__ = ["attention_cls_scores", "attention_received_scores"]


@operator("attention.key_scores", reference.key_scores, name="attention_scores", dense="q k")
def _scores(
    q: Tensor, k: Tensor, logsumexp: Tensor, kind: str, bias: Tensor | None, prefix: int, scale: float
) -> Tensor:
    return logsumexp.new_empty(k.shape[0], k.shape[2] - (prefix if kind == "class" else 0))


def _by_reference(
    q: Tensor, k: Tensor, v: Tensor, kind: str, bias: Tensor | None, prefix: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute ``reference.attention_scores`` with operators that all have second derivatives."""
    out, logsumexp = reference.attention_with_sums(q, k, v, scale, bias)
    return out, reference.key_scores(q, k, logsumexp, kind, bias, prefix, scale)


class AttentionScores(torch.autograd.Function):
    """Attention and the scores of the keys. One backward pass serves both; the scores add one sweep over K."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, kind: str, bias: Tensor | None, prefix: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, logsumexp = forward(q, k, v, scale, bias)
        ctx.save_for_backward(q, k, v, out, logsumexp, bias)
        ctx.kind, ctx.prefix, ctx.scale = kind, prefix, scale
        ctx.set_materialize_grads(False)
        return out, _scores(q, k, logsumexp, kind, bias, prefix, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, logsumexp, bias = ctx.saved_tensors
        upstream, grad_scores = grads
        if upstream is None and grad_scores is None:
            return (None,) * 7
        if differentiates_again():
            inputs = q, k, v, ctx.kind, bias, ctx.prefix, ctx.scale
            return tuple(gradients_again(_by_reference, inputs, grads))
        grad_q, grad_k, grad_v, grad_bias = backward(
            torch.zeros_like(out) if upstream is None else upstream,
            *(q, k, v, out, logsumexp, ctx.scale, bias, None, ctx.prefix, None, None, 0, 0),
            *(grad_scores, ctx.kind, ctx.needs_input_grad[4]),
        )
        return grad_q, grad_k, grad_v, None, grad_bias if ctx.needs_input_grad[4] else None, None, None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, kind: str, bias: Tensor | None, prefix: int, scale: float, backend: Resolved
) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return reference.attention_scores(q, k, v, kind, bias, prefix, scale)
    if wants_gradient(q, k, v, bias):
        return AttentionScores.apply(q, k, v, kind, bias, prefix, scale)
    out, logsumexp = forward(q, k, v, scale, bias)
    return out, _scores(q, k, logsumexp, kind, bias, prefix, scale)


def attention_cls_scores_unchecked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    prefix: int = 1,
    scale: float | None = None,
    backend: Resolved,
) -> tuple[Tensor, Tensor]:
    """Call :func:`attention_cls_scores` without checks, by the backend named."""
    return _attend(q, k, v, "class", bias, prefix, q.shape[3] ** -0.5 if scale is None else scale, backend)


def attention_received_scores_unchecked(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, scale: float | None = None, backend: Resolved
) -> tuple[Tensor, Tensor]:
    """Call :func:`attention_received_scores` without checks, by the backend named."""
    return _attend(q, k, v, "received", bias, 0, q.shape[3] ** -0.5 if scale is None else scale, backend)


def _resolve(backend: str | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Resolved:
    """Check the bias, and choose the backend."""
    if bias is not None:
        check_of_keys("bias", bias, q, k)
    chosen = resolve(backend, q, k, v, *(() if bias is None else (bias,)))
    if chosen == "triton":
        check_head_dim(q)
    return chosen


def attention_cls_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    prefix: int = 1,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend, and return how much attention the class token pays to every key, without a second softmax.

    Equivalent PyTorch::

        weights = torch.softmax(scale * q @ k.transpose(2, 3) + bias[:, None, None, :], dim=-1)
        weights @ v, weights[:, :, 0, prefix:].mean(1)  # cls_scores(q[:, :, 0], k, prefix=prefix)

    The forward pass takes two launches, and the second reads K once more. The backward pass takes two.

    Args:
        q: (B, H, M, D) queries, as for :func:`attention`; the class token's is the first.
        k: (B, H, N, D) keys.
        v: (B, H, N, D) values.
        bias: (B, N) as for :func:`attention`, or None; the scores follow the biased logits.
        prefix: number of leading keys that get no score.
        scale: factor on the dot products; None means ``D ** -0.5``.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        (B, H, M, D) in q's dtype, and (B, N - prefix), float32 (float64 for float64 inputs). Both differentiable in q,
        k, v and bias.

    Raises:
        ValueError: as :func:`attention`, and if there is no query or the prefix is outside 0 .. N.
        TypeError: as :func:`attention`.
    """
    check_qkv(q, k, v)
    prefix = check_count("prefix", prefix, 0, k.shape[2])
    if q.shape[2] == 0:
        raise ValueError(f"q must have the class token's query first, got shape {shape_of(q)}")
    scale = check_scale(scale, q.shape[3])
    return _attend(q, k, v, "class", bias, prefix, scale, _resolve(backend, q, k, v, bias))


def attention_received_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend, and return how much attention every key receives, without the matrix and without a second softmax.

    Equivalent PyTorch::

        weights = torch.softmax(scale * q @ k.transpose(2, 3) + bias[:, None, None, :], dim=-1)
        weights @ v, weights.sum((1, 2))  # received_scores(q, k)

    The forward pass takes three launches: the second computes the logits again, the third adds up the heads. The
    backward pass takes two; the gradient of the scores costs one more product of q and k.

    Args:
        q: (B, H, M, D) queries, as for :func:`attention`.
        k: (B, H, N, D) keys.
        v: (B, H, N, D) values.
        bias: (B, N) as for :func:`attention`, or None; the scores follow the biased logits.
        scale: factor on the dot products; None means ``D ** -0.5``.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context. The kernels hold no N x N
            matrix. Outside autograd the reference holds 2 ** 20 logits of an image at a time.

    Returns:
        (B, H, M, D) in q's dtype, and (B, N), float32 (float64 for float64 inputs). Both differentiable in q, k, v and
        bias.

    Raises:
        ValueError: as :func:`attention`.
        TypeError: as :func:`attention`.
    """
    check_qkv(q, k, v)
    scale = check_scale(scale, q.shape[3])
    return _attend(q, k, v, "received", bias, 0, scale, _resolve(backend, q, k, v, bias))
