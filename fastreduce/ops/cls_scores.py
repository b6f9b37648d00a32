"""Attention of the class token to every patch token, without the attention matrix.

``cls_scores`` averages over heads; ``cls_value_scores`` multiplies by the lengths of values and sums over heads.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import Resolved, resolve
from ._check import check_bool, check_count, check_floating, check_same, check_scale, check_shape, shape_of
from ._library import differentiates_again, gradients_again, operator, wants_gradient
from .gather_packed import check_offsets

__all__ = ["cls_scores", "cls_value_scores", "cls_value_scores_packed"]


@operator("cls_scores.cls_scores", reference.cls_scores_with_sums, dense="q k")
def _forward(
    q: Tensor, k: Tensor, prefix: int, scale: float, valid: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, tokens, _ = k.shape
    dtype = reference.accumulator(k.dtype)
    scores = k.new_empty(batch, tokens - prefix, dtype=dtype)
    return scores, k.new_empty(batch, heads, tokens, dtype=dtype), k.new_empty(batch, heads, dtype=dtype)


def _reference_backward(
    grad: Tensor, q: Tensor, k: Tensor, logits: Tensor, logsumexp: Tensor, prefix: int, scale: float
) -> tuple[Tensor, Tensor]:
    grad_q, grad_k = reference.cls_scores_backward(grad, q, k, logits, logsumexp, prefix, scale)
    return grad_q, grad_k.transpose(1, 2).contiguous().transpose(1, 2)


@operator("cls_scores.cls_scores_backward", _reference_backward, dense="q k")
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, logits: Tensor, logsumexp: Tensor, prefix: int, scale: float
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, head_dim = k.shape
    # In the memory order of the packed qkv, so that its gradient needs no transposition.
    return q.new_empty(q.shape), k.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


@operator(
    "cls_scores.cls_value_scores_packed",
    reference.cls_value_scores_packed,
    dense="q k value",
    whole="offsets",
)
def _value_packed(
    q: Tensor, k: Tensor, value: Tensor, offsets: Tensor, longest: int, prefix: int, scale: float
) -> Tensor:
    return k.new_empty(q.shape[0], longest - prefix, dtype=reference.accumulator(k.dtype))


@operator("cls_scores.cls_value_scores", reference.cls_value_scores, dense="q k value")
def _value_forward(q: Tensor, k: Tensor, value: Tensor, valid: Tensor | None, prefix: int, scale: float) -> Tensor:
    return k.new_empty(k.shape[0], k.shape[2] - prefix, dtype=reference.accumulator(k.dtype))


class ClsScores(torch.autograd.Function):
    """Class scores. The backward pass differentiates the softmax, from the saved logits and their logsumexp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, prefix: int, scale: float, valid: Tensor | None = None) -> Tensor:
        scores, logits, logsumexp = _forward(q, k, prefix, scale, valid)
        ctx.save_for_backward(q, k, logits, logsumexp, valid)
        ctx.prefix, ctx.scale = prefix, scale
        return scores

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, logits, logsumexp, valid = ctx.saved_tensors
        if differentiates_again():
            return tuple(gradients_again(reference.cls_scores, (q, k, ctx.prefix, ctx.scale, valid), grads))
        return *_backward(grads[0], q, k, logits, logsumexp, ctx.prefix, ctx.scale), None, None, None


def cls_scores_unchecked(
    q: Tensor,
    k: Tensor,
    *,
    prefix: int = 1,
    scale: float | None = None,
    valid: Tensor | None = None,
    backend: Resolved,
) -> Tensor:
    """Call :func:`cls_scores` without checks, by the backend named."""
    scale = k.shape[3] ** -0.5 if scale is None else scale
    if backend == "reference":
        return reference.cls_scores(q, k, prefix, scale, valid)
    if wants_gradient(q, k):
        return ClsScores.apply(q, k, prefix, scale, valid)
    return _forward(q, k, prefix, scale, valid)[0]


def cls_value_scores_unchecked(
    q: Tensor,
    k: Tensor,
    value: Tensor,
    *,
    prefix: int = 1,
    scale: float | None = None,
    valid: Tensor | None = None,
    backend: Resolved,
) -> Tensor:
    """Call :func:`cls_value_scores` without checks, by the backend named."""
    scale = k.shape[3] ** -0.5 if scale is None else scale
    forward = reference.cls_value_scores if backend == "reference" else _value_forward
    return forward(q.detach(), k.detach(), value.detach(), valid, prefix, scale)


def cls_value_scores_packed_unchecked(
    q: Tensor,
    k: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    *,
    prefix: int = 1,
    scale: float | None = None,
    backend: Resolved,
) -> Tensor:
    """Call :func:`cls_value_scores_packed` without checks, by the backend named."""
    scale = k.shape[3] ** -0.5 if scale is None else scale
    forward = reference.cls_value_scores_packed if backend == "reference" else _value_packed
    return forward(q.detach(), k.detach(), value.detach(), offsets, longest, prefix, scale)


def _check_qk(q: Tensor, k: Tensor) -> None:
    check_shape("q", q, "B H D")
    check_shape("k", k, "B H N D")
    check_floating("q", q)
    check_same("q", q, "k", k, dtype=True)


def _check(q: Tensor, k: Tensor, prefix: Any, valid: Tensor | None) -> int:
    """Raise unless q, k, prefix and valid fit together; return the prefix as an int."""
    _check_qk(q, k)
    batch, heads, tokens, head_dim = k.shape
    if shape_of(q) != (batch, heads, head_dim):
        raise ValueError(f"q must have shape {(batch, heads, head_dim)} to go with k {shape_of(k)}, got {shape_of(q)}")
    if min(heads, tokens, head_dim) < 1:
        raise ValueError(f"k must have at least one head, key and channel, got shape {shape_of(k)}")
    prefix = check_count("prefix", prefix, 0, tokens)
    if valid is not None:
        check_shape("valid", valid, "B N")
        check_same("k", k, "valid", valid)
        check_bool("valid", valid)
        if shape_of(valid) != (batch, tokens):
            raise ValueError(f"valid must have shape {(batch, tokens)} to go with k, got {shape_of(valid)}")
    return prefix


def cls_scores(
    q: Tensor,
    k: Tensor,
    *,
    prefix: int = 1,
    scale: float | None = None,
    valid: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Score every patch token by the attention that the class token pays to it, averaged over heads (EViT, section 3).

    Equivalent PyTorch::

        logits = scale * q.unsqueeze(2) @ k.transpose(2, 3)  # (B, H, 1, N)
        torch.softmax(logits.masked_fill(~valid[:, None, None], -inf), dim=-1)[:, :, 0, prefix:].mean(1)

    Args:
        q: (B, H, D) the class query of every head. float32, float16, bfloat16 (reference: any).
        k: (B, H, N, D) all keys, the prefix's included, in q's dtype. Any strides; with a dense last
            axis, such as a view of a packed qkv, it is not copied.
        prefix: number of leading keys that take part in the softmax but get no score.
        scale: factor on the dot products; None means ``D ** -0.5``.
        valid: (B, N) bool, False for keys that take no part and score exactly 0, or None. At least one key of every
            image must be valid (not checked; its scores are NaN otherwise).
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        (B, N - prefix), float32 (float64 for float64 inputs). Differentiable in q and k.

    Raises:
        ValueError: wrong shapes, devices that differ, no head, key or channel, a prefix outside 0 .. N.
        TypeError: q or k not floating point, or of two dtypes; valid not bool.
    """
    prefix = _check(q, k, prefix, valid)
    scale = check_scale(scale, k.shape[3])
    return cls_scores_unchecked(q, k, prefix=prefix, scale=scale, valid=valid, backend=resolve(backend, q, k))


def cls_value_scores(
    q: Tensor,
    k: Tensor,
    value: Tensor,
    *,
    prefix: int = 1,
    scale: float | None = None,
    valid: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Score every patch token by the class token's attention times the length of its value, summed over heads.

    These are the significance scores of ATS (section 3), as :func:`sample_tokens` takes them. They have no gradient.

    Equivalent PyTorch::

        logits = scale * q.unsqueeze(2) @ k.transpose(2, 3)  # (B, H, 1, N)
        attention = torch.softmax(logits.masked_fill(~valid[:, None, None], -inf), dim=-1)[:, :, 0, prefix:]
        (attention * value.norm(dim=-1)[:, :, prefix:]).sum(1).detach()

    Args:
        q: (B, H, D) the class query of every head, as for :func:`cls_scores`.
        k: (B, H, N, D) all keys.
        value: (B, H, N, D) value vectors of any strides, in q's dtype.
        prefix: number of leading keys that take part in the softmax but get no score.
        scale: factor on the dot products; None means ``D ** -0.5``.
        valid: (B, N) bool as for :func:`cls_scores`, or None.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        (B, N - prefix), float32 (float64 for float64 inputs), without gradient.

    Raises:
        ValueError: as :func:`cls_scores`, and if value has not k's shape.
        TypeError: as :func:`cls_scores`, and if value has another dtype.
    """
    prefix = _check(q, k, prefix, valid)
    scale = check_scale(scale, k.shape[3])
    check_shape("value", value, "B H N D")
    check_same("k", k, "value", value, dtype=True)
    if shape_of(value) != shape_of(k):
        raise ValueError(f"value must have k's shape {shape_of(k)}, got {shape_of(value)}")
    backend = resolve(backend, q, k)
    return cls_value_scores_unchecked(q, k, value, prefix=prefix, scale=scale, valid=valid, backend=backend)


def cls_value_scores_packed(
    q: Tensor,
    k: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    *,
    prefix: int = 1,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Score the patch tokens of packed images, whose keys lie in one row, as :func:`cls_value_scores` does.

    Args:
        q: (B, H, D) the class query of every head and image, as for :func:`cls_scores`.
        k: (1, H, T, D) keys of all images.
        value: (1, H, T, D) value vectors, in q's dtype.
        offsets: (B + 1,) int32; the keys of image b are ``offsets[b] .. offsets[b + 1]``, at least ``prefix`` (not
            checked).
        longest: the most keys that an image has (not checked).
        prefix: number of leading keys of every image that take part in the softmax but get no score.
        scale: factor on the dot products; None means ``D ** -0.5``.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        (B, longest - prefix), float32 (float64 for float64 inputs), 0 behind the last token of an image, without
        gradient.

    Raises:
        ValueError: wrong shapes, devices that differ, no head or channel, a prefix outside 0 .. longest.
        TypeError: as :func:`cls_value_scores`, and if offsets are not int32.
    """
    _check_qk(q, k)
    check_offsets("offsets", offsets, "k", k)
    check_shape("value", value, "1 H T D")
    check_same("k", k, "value", value, dtype=True)
    one, heads, _, head_dim = k.shape
    if one != 1 or shape_of(value) != shape_of(k):
        raise ValueError(f"k and value must have one shape (1, H, T, D), got {shape_of(k)} and {shape_of(value)}")
    if shape_of(q) != (offsets.shape[0] - 1, heads, head_dim) or min(heads, head_dim) < 1:
        raise ValueError(
            f"q must have shape {(offsets.shape[0] - 1, heads, head_dim)}, with a head and a channel, to go with k "
            f"{shape_of(k)} and offsets {shape_of(offsets)}, got {shape_of(q)}"
        )
    longest = check_count("longest", longest, 0, sys.maxsize)
    prefix = check_count("prefix", prefix, 0, longest)
    scale = check_scale(scale, head_dim)
    backend = resolve(backend, q, k)
    return cls_value_scores_packed_unchecked(q, k, value, offsets, longest, prefix=prefix, scale=scale, backend=backend)
