"""``soft_merge``: a weighted sum of all tokens for every cluster, in one pass with the rows that stay."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import Resolved, resolve
from ._check import check_floating, check_same, check_shape, shape_of
from ._library import differentiates_again, gradients_again, operator, wants_gradient

__all__ = ["soft_merge"]


@operator("soft_merge.soft_merge", reference.soft_merge, dense="x head")
def _forward(logits: Tensor, x: Tensor, head: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, _, clusters = logits.shape
    rows = clusters if head is None else head.shape[1] + clusters
    dtype = x.dtype if head is None else torch.promote_types(x.dtype, head.dtype)
    out = x.new_empty(batch, rows, x.shape[2], dtype=dtype)
    promoted = torch.promote_types(logits.dtype, x.dtype)
    return out, x.new_empty(batch, clusters, dtype=reference.accumulator(promoted))


@operator("soft_merge.soft_merge_backward", reference.soft_merge_backward, dense="grad x")
def _backward(grad: Tensor, logits: Tensor, x: Tensor, out: Tensor, logsumexp: Tensor) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), x.new_empty(x.shape)


class SoftMerge(torch.autograd.Function):
    """Weighted sums of tokens. Rows of the head pass their gradient on; the logsumexp has none."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, x: Tensor, head: Tensor | None) -> tuple[Tensor, Tensor]:
        out, logsumexp = _forward(logits, x, head)
        ctx.save_for_backward(logits, x, out, logsumexp)
        ctx.num_head = 0 if head is None else head.shape[1]
        ctx.head_dtype = None if head is None else head.dtype
        ctx.mark_non_differentiable(logsumexp)
        ctx.set_materialize_grads(False)  # None, not zeros, where there is no gradient
        return out, logsumexp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 3
        grad = grads[0]
        grad_logits = grad_x = grad_head = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            if differentiates_again():
                merge = partial(reference.soft_merge, head=None)
                grad_logits, grad_x = gradients_again(merge, ctx.saved_tensors[:2], (grad[:, ctx.num_head :],))
            else:
                grad_logits, grad_x = _backward(grad, *ctx.saved_tensors)
        if ctx.needs_input_grad[2]:
            grad_head = grad[:, : ctx.num_head].to(ctx.head_dtype)
        return grad_logits, grad_x, grad_head


def soft_merge_unchecked(
    logits: Tensor, x: Tensor, *, head: Tensor | None = None, backend: Resolved
) -> tuple[Tensor, Tensor]:
    """Call :func:`soft_merge` without checks, by the backend named."""
    if backend == "reference":
        return reference.soft_merge(logits, x, head)
    return SoftMerge.apply(logits, x, head) if wants_gradient(logits, x, head) else _forward(logits, x, head)


def soft_merge(
    logits: Tensor, x: Tensor, *, head: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Sum the tokens for each cluster, weighted by a softmax over the tokens (SiT; PatchMerger, section 3).

    Equivalent PyTorch::

        weights = torch.softmax(logits, dim=1)  # over the tokens: the weights of every cluster sum to one
        torch.cat([head, weights.transpose(1, 2) @ x], dim=1), torch.logsumexp(logits, dim=1)

    Args:
        logits: (B, N, K), entry n, k for the weight of token n in cluster k, of any floating dtype and strides. -inf
            gives weight 0; a cluster with -inf alone, or with a NaN, becomes NaN.
        x: (B, N, C) tokens without the prefix; a view such as ``tokens[:, 1:]`` is not copied. float32, float16,
            bfloat16 (reference: any); softmax and sums are float32.
        head: (B, P, C) rows to put in front, such as ``tokens[:, :1]``, or None.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        The rows (B, P + K, C), head first, in x's dtype or, with a head, the promoted one; and the logsumexp (B, K) of
        each cluster's logits, float32 (float64 for float64): the weights are ``exp(logits - logsumexp)``.
        Rows are differentiable in logits, x and head; the logsumexp has no gradient.

    Raises:
        ValueError: wrong shapes, no tokens at all, devices that differ.
        TypeError: an argument that is not a floating-point tensor.
    """
    check_shape("logits", logits, "B N K")
    check_shape("x", x, "B N C")
    check_floating("logits", logits)
    check_floating("x", x)
    check_same("x", x, "logits", logits)
    if logits.shape[:2] != x.shape[:2]:
        raise ValueError(f"logits must have x's batch size and tokens {shape_of(x)[:2]}, got shape {shape_of(logits)}")
    if x.shape[1] == 0:
        raise ValueError(f"x must have at least one token, got shape {shape_of(x)}")
    tensors: tuple[Tensor, ...] = (logits, x)
    if head is not None:
        check_shape("head", head, "B P C")
        check_floating("head", head)
        check_same("x", x, "head", head)
        if head.shape[0] != x.shape[0] or head.shape[2] != x.shape[2]:
            raise ValueError(f"head must have x's batch size {x.shape[0]} and width {x.shape[2]}, got {shape_of(head)}")
        tensors = (logits, x, head)
    return soft_merge_unchecked(logits, x, head=head, backend=resolve(backend, *tensors))
