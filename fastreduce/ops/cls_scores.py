"""``cls_scores``: how much the class token attends to every patch token, without the attention matrix."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import Resolved, resolve
from ._check import check_bool, check_count, check_floating, check_same, check_scale, check_shape, shape_of
from ._library import differentiates_again, gradients_again, register, wants_gradient
from .gather_packed import check_offsets

__all__ = ["cls_scores"]


def _fake_forward(
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


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, logits: Tensor, logsumexp: Tensor, prefix: int, scale: float
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, head_dim = k.shape
    # The memory order of the packed qkv, so that its gradient can be put together without a transposition.
    return q.new_empty(q.shape), k.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


def _fake_value_packed(
    q: Tensor, k: Tensor, value: Tensor, offsets: Tensor, longest: int, prefix: int, scale: float
) -> Tensor:
    return k.new_empty(q.shape[0], longest - prefix, dtype=reference.accumulator(k.dtype))


def _fake_value_forward(q: Tensor, k: Tensor, value: Tensor, valid: Tensor | None, prefix: int, scale: float) -> Tensor:
    return k.new_empty(k.shape[0], k.shape[2] - prefix, dtype=reference.accumulator(k.dtype))


_forward = register(
    "cls_scores(Tensor q, Tensor k, int prefix, float scale, Tensor? valid=None) -> (Tensor, Tensor, Tensor)",
    triton="cls_scores.cls_scores",
    dense="q k",
    reference=reference.cls_scores_with_sums,
    fake=_fake_forward,
)
_backward = register(
    "cls_scores_backward(Tensor grad, Tensor q, Tensor k, Tensor logits, Tensor logsumexp, int prefix, float scale)"
    " -> (Tensor, Tensor)",
    triton="cls_scores.cls_scores_backward",
    dense="q k",
    reference=_reference_backward,
    fake=_fake_backward,
)
_value_forward = register(
    "cls_value_scores(Tensor q, Tensor k, Tensor value, Tensor? valid, int prefix, float scale) -> Tensor",
    triton="cls_scores.cls_value_scores",
    dense="q k value",
    reference=reference.cls_value_scores,
    fake=_fake_value_forward,
)
_value_packed = register(
    "cls_value_scores_packed(Tensor q, Tensor k, Tensor value, Tensor offsets, SymInt longest, int prefix, float scale)"
    " -> Tensor",
    triton="cls_scores.cls_value_scores_packed",
    dense="q k value",
    reference=reference.cls_value_scores_packed,
    fake=_fake_value_packed,
)


class ClsScores(torch.autograd.Function):
    """Gradient: that of a softmax, from the logits and their logsumexp kept by the forward pass."""

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
    value: Tensor | None = None,
    valid: Tensor | None = None,
    offsets: Tensor | None = None,
    longest: int | None = None,
    backend: Resolved,
) -> Tensor:
    """:func:`cls_scores` without checks, by the backend named."""
    scale = k.shape[3] ** -0.5 if scale is None else scale
    by_reference = backend == "reference"
    if value is not None:
        q, k, value = q.detach(), k.detach(), value.detach()
        if offsets is not None and longest is not None:
            packed = reference.cls_value_scores_packed if by_reference else _value_packed
            return packed(q, k, value, offsets, longest, prefix, scale)
        forward = reference.cls_value_scores if by_reference else _value_forward
        return forward(q, k, value, valid, prefix, scale)
    if by_reference:
        return reference.cls_scores(q, k, prefix, scale, valid)
    if wants_gradient(q, k):
        return ClsScores.apply(q, k, prefix, scale, valid)
    return _forward(q, k, prefix, scale, valid)[0]


def _check_packed(
    q: Tensor,
    k: Tensor,
    value: Tensor | None,
    valid: Tensor | None,
    offsets: Tensor,
    longest: Any,
    prefix: Any,
) -> tuple[int, int]:
    """Raise if they do not fit together; returns longest and prefix as ints."""
    check_offsets("offsets", offsets, "k", k)
    if value is None or valid is not None or longest is None:
        raise ValueError("with offsets the scores need value and longest, and no valid")
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
    return longest, check_count("prefix", prefix, 0, longest)


def cls_scores(
    q: Tensor,
    k: Tensor,
    *,
    prefix: int = 1,
    scale: float | None = None,
    value: Tensor | None = None,
    valid: Tensor | None = None,
    offsets: Tensor | None = None,
    longest: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Score every patch token by the attention that the class token pays to it, averaged over heads (EViT, section 3).

    With ``value`` the attention is weighted by the length of the token's value vector and summed over heads, not
    averaged: the significance scores of ATS (section 3), which :func:`sample_tokens` takes as they are.

    Equivalent PyTorch::

        logits = scale * q.unsqueeze(2) @ k.transpose(2, 3)  # (B, H, 1, N)
        attention = torch.softmax(logits.masked_fill(~valid[:, None, None], -inf), dim=-1)[:, :, 0, prefix:]
        attention.mean(1)  # without value
        (attention * value.norm(dim=-1)[:, :, prefix:]).sum(1)  # with value

    Args:
        q: (B, H, D) the class query of every head. float32, float16, bfloat16 (reference: any).
        k: (B, H, N, D) all keys, those of the prefix included, in q's dtype. Any strides; with a dense last axis, as a
            view of a packed qkv has it, nothing is copied.
        prefix: number of leading keys that take part in the softmax but get no score.
        scale: factor on the dot products; None means ``D ** -0.5``.
        value: (B, H, N, D) value vectors of any strides, in q's dtype, or None. With them the result has no gradient.
        valid: (B, N) bool, False for keys that take no part and score exactly 0, or None. At least one key of every
            image must be valid (not checked; its scores are NaN otherwise).
        offsets: (B + 1,) int32 or None. With them the keys of all images are packed: k and value are (1, H, T, D), and
            those of image b are ``offsets[b] .. offsets[b + 1]``, at least ``prefix`` (not checked). It takes
            ``value`` and no ``valid``.
        longest: with ``offsets``, the most keys that an image has (not checked). The result has ``longest - prefix``
            columns, 0 behind the last token of an image.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        (B, N - prefix), float32 (float64 for float64 inputs). Without ``value``, differentiable in q and k.

    Raises:
        ValueError: wrong shapes, devices that differ, no head, key or channel, a prefix outside 0 .. N, offsets without
            value or longest, or with valid.
        TypeError: q, k or value not floating point, or of two dtypes; valid not bool; offsets not int32.
    """
    check_shape("q", q, "B H D")
    check_shape("k", k, "B H N D")
    check_floating("q", q)
    check_same("q", q, "k", k, dtype=True)
    batch, heads, tokens, head_dim = k.shape
    options: dict[str, Any] = {"value": value, "valid": valid, "offsets": offsets}
    if offsets is not None:
        longest, prefix = _check_packed(q, k, value, valid, offsets, longest, prefix)
        chosen = resolve(backend, q, k)
        scale = check_scale(scale, head_dim)
        return cls_scores_unchecked(q, k, prefix=prefix, scale=scale, **options, longest=longest, backend=chosen)
    if longest is not None:
        raise ValueError(f"longest={longest} goes with offsets only")
    if shape_of(q) != (batch, heads, head_dim):
        raise ValueError(f"q must have shape {(batch, heads, head_dim)} to go with k {shape_of(k)}, got {shape_of(q)}")
    if min(heads, tokens, head_dim) < 1:
        raise ValueError(f"k must have at least one head, key and channel, got shape {shape_of(k)}")
    prefix = check_count("prefix", prefix, 0, tokens)
    scale = check_scale(scale, head_dim)
    if valid is not None:
        check_shape("valid", valid, "B N")
        check_same("k", k, "valid", valid)
        check_bool("valid", valid)
        if shape_of(valid) != (batch, tokens):
            raise ValueError(f"valid must have shape {(batch, tokens)} to go with k, got {shape_of(valid)}")
    if value is not None:
        check_shape("value", value, "B H N D")
        check_same("k", k, "value", value, dtype=True)
        if shape_of(value) != shape_of(k):
            raise ValueError(f"value must have k's shape {shape_of(k)}, got {shape_of(value)}")
    return cls_scores_unchecked(q, k, prefix=prefix, scale=scale, **options, backend=resolve(backend, q, k))
