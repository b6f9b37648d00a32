"""``received_scores``: the attention that every key receives, without the attention matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import Resolved, resolve
from ._check import check_floating, check_same, check_scale, check_shape, shape_of
from ._library import differentiates_again, gradients_again, operator, wants_gradient

__all__ = ["received_scores"]


@operator("received_scores.received_scores", reference.received_scores, dense="q k")
def _forward(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return k.new_empty(k.shape[0], k.shape[2], dtype=reference.accumulator(k.dtype))


def _backward(grad: Tensor, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    grad_q, grad_k = reference.received_scores_backward(grad, q, k, scale)
    return grad_q.transpose(1, 2).contiguous().transpose(1, 2), grad_k.transpose(1, 2).contiguous().transpose(1, 2)


class ReceivedScores(torch.autograd.Function):
    """Received attention. PyTorch computes its gradient, which few need, in blocks of one head's matrix."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.scale = scale
        return _forward(q, k, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k = ctx.saved_tensors
        if differentiates_again():
            return tuple(gradients_again(reference.received_scores, (q, k, ctx.scale), grads))
        return *_backward(grads[0], q, k, ctx.scale), None


def received_scores_unchecked(q: Tensor, k: Tensor, *, scale: float | None = None, backend: Resolved) -> Tensor:
    """Call :func:`received_scores` without checks, by the backend named."""
    scale = k.shape[3] ** -0.5 if scale is None else scale
    if backend == "reference":
        return reference.received_scores(q, k, scale)
    return ReceivedScores.apply(q, k, scale) if wants_gradient(q, k) else _forward(q, k, scale)


def received_scores(q: Tensor, k: Tensor, *, scale: float | None = None, backend: str | None = None) -> Tensor:
    """Return the attention every key receives, summed over heads and queries (for K-Medoids, or without class token).

    Equivalent PyTorch::

        attention = torch.softmax(scale * q @ k.transpose(2, 3), dim=-1)  # (B, H, M, N)
        attention.sum((1, 2))

    Args:
        q: (B, H, M, D) queries. float32, float16, bfloat16 (reference: any).
        k: (B, H, N, D) keys in q's dtype; M and N may differ. Any strides; with a dense last axis, such as a
            view of a packed qkv, it is not copied.
        scale: factor on the dot products; None means ``D ** -0.5``.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context. The kernels hold no N x N
            matrix. Outside autograd the reference holds 2 ** 20 logits of an image at a time.

    Returns:
        (B, N), float32 (float64 for float64 inputs); each row sums to H * M. Differentiable in q and k.

    Raises:
        ValueError: wrong shapes, devices that differ, no head, key or channel.
        TypeError: q or k not floating point, or of two dtypes.
    """
    check_shape("q", q, "B H M D")
    check_shape("k", k, "B H N D")
    check_floating("q", q)
    check_same("q", q, "k", k, dtype=True)
    batch, heads, keys, head_dim = k.shape
    if shape_of(q)[:2] != (batch, heads) or q.shape[3] != head_dim:
        raise ValueError(f"q and k must agree in B, H and D, got {shape_of(q)} and {shape_of(k)}")
    if min(heads, keys, head_dim) < 1:
        raise ValueError(f"k must have at least one head, key and channel, got shape {shape_of(k)}")
    scale = check_scale(scale, head_dim)
    return received_scores_unchecked(q, k, scale=scale, backend=resolve(backend, q, k))
