"""``fuse_tokens``: the kept rows, and one row made of all others, in one pass with the residual addition."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from .. import reference
from ..backends import Resolved, resolve
from ._check import check_count, check_floating, check_index, check_same, check_shape, shape_of
from ._library import differentiates_again, gradients_again, operator, wants_gradient
from ._norm import (
    NO_NORM,
    Norm,
    affine_gradients,
    again_through_norm,
    check_norm,
    fake_norm,
    fake_sums,
    rows_if,
    save_norm,
    wants_affine,
)
from .gather_tokens import check_residual

__all__ = ["fuse_tokens"]


def _reference_norm_backward(
    grad_out: Tensor | None,
    grad_normed: Tensor,
    out: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    affine: bool,
    rows: bool,
    x: Tensor,
    order: Tensor,
    scores: Tensor,
    prefix: int,
    residual_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad, sums = reference.layer_norm_backward(grad_out, grad_normed, out, statistics, weight, affine)
    k = out.shape[1] - prefix - 1
    spread = reference.fuse_tokens_backward(grad, x, order, scores, k, prefix, residual_bias)
    return *spread, rows_if(rows, grad), sums


@operator(
    "fuse_tokens.fuse_tokens",
    lambda *arguments: reference.with_norm(reference.fuse_tokens(*arguments[:7]), *(arguments[7:] or NO_NORM)),
    dense="x residual residual_bias weight bias",
)
def _forward(
    x: Tensor,
    order: Tensor,
    scores: Tensor,
    k: int,
    prefix: int,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm_eps: float | None = None,
) -> list[Tensor]:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return fake_norm(x.new_empty(x.shape[0], prefix + k + 1, x.shape[2], dtype=dtype), norm_eps)


@operator("fuse_tokens.fuse_tokens_backward", reference.fuse_tokens_backward, dense="grad x residual_bias")
def _backward(
    grad: Tensor, x: Tensor, order: Tensor, scores: Tensor, k: int, prefix: int, residual_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), scores.new_empty(scores.shape)


@operator(
    "fuse_tokens.fuse_tokens_norm_backward",
    _reference_norm_backward,
    dense="grad_out grad_normed weight x residual_bias",
)
def _norm_backward(
    grad_out: Tensor | None,
    grad_normed: Tensor,
    out: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    affine: bool,
    rows: bool,
    x: Tensor,
    order: Tensor,
    scores: Tensor,
    prefix: int,
    residual_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    spread = x.new_empty(x.shape), scores.new_empty(scores.shape)
    return *spread, rows_if(rows, out.new_empty(out.shape)), fake_sums(statistics, out, affine)


class FuseTokens(torch.autograd.Function):
    """Kept rows and a fused one. A kept row gets its own gradient, any other its score times the fused row's.

    With a norm, one launch adds the gradient through the norm to the gradient of the rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        order: Tensor,
        scores: Tensor,
        k: int,
        prefix: int,
        residual: Tensor | None,
        residual_bias: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        norm_eps: float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        arguments = x, order, scores, k, prefix, residual, residual_bias
        out, *extra = _forward(*arguments, weight, bias, norm_eps)
        kept = (out, extra[1], weight) if extra else ()
        ctx.save_for_backward(x, order, scores, residual_bias, *kept)
        save_norm(ctx, 7, weight, bias, norm_eps)
        ctx.k, ctx.prefix = k, prefix
        ctx.residual_dtype = None if residual is None else residual.dtype
        return (out, extra[0]) if extra else out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, order, scores, residual_bias, *saved = ctx.saved_tensors
        grad_out, grad_normed = grads if saved else (grads[0], None)
        if grad_normed is None:
            if grad_out is None:
                return (None,) * 10
            return *_gradients(ctx, grad_out, x, order, scores, residual_bias), None, None, None
        if differentiates_again():
            grad, *affine = again_through_norm(ctx, grad_out, grad_normed, saved[0], saved[2])
            return *_gradients(ctx, grad, x, order, scores, residual_bias), *affine, None
        rows = ctx.needs_input_grad[5] or ctx.needs_input_grad[6]
        options = wants_affine(ctx), rows, x, order, scores, ctx.prefix, residual_bias
        grad_x, grad_scores, grad, sums = _norm_backward(grad_out, grad_normed, *saved, *options)
        added = _residual_gradients(ctx, grad, x, order, scores, residual_bias)
        return grad_x, None, grad_scores, None, None, *added, *affine_gradients(ctx, sums), None


def _gradients(
    ctx: Any, grad: Tensor, x: Tensor, order: Tensor, scores: Tensor, residual_bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of FuseTokens' inputs for the gradient of its rows, None for inputs that need none."""
    if differentiates_again():
        grad_residual = grad.to(ctx.residual_dtype) if ctx.needs_input_grad[5] else None
        inputs = x, order, scores, ctx.k, ctx.prefix, None, residual_bias
        *found, _, grad_bias = gradients_again(reference.fuse_tokens, inputs, (grad,))
        return *found, grad_residual, grad_bias
    grad_x = grad_scores = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
        grad_x, grad_scores = _backward(grad, x, order, scores, ctx.k, ctx.prefix, residual_bias)
    return grad_x, None, grad_scores, None, None, *_residual_gradients(ctx, grad, x, order, scores, residual_bias)


def _residual_gradients(
    ctx: Any, grad: Tensor, x: Tensor, order: Tensor, scores: Tensor, residual_bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the residual and of residual_bias, None for one that needs none."""
    grad_residual = grad_bias = None
    if ctx.needs_input_grad[5]:
        grad_residual = grad.to(ctx.residual_dtype)
    if ctx.needs_input_grad[6]:
        assert residual_bias is not None
        dtype = reference.accumulator(x.dtype)
        surplus = scores.to(dtype).gather(1, order[:, ctx.k :].long()).sum(1) - 1
        grad_bias = (surplus @ grad[:, -1].to(dtype)).to(residual_bias.dtype)
    return grad_residual, grad_bias


def _check_arguments(
    x: Tensor,
    order: Tensor,
    scores: Tensor,
    k: Any,
    prefix: Any,
    residual: Tensor | None,
    residual_bias: Tensor | None,
) -> tuple[list[Tensor], int, int]:
    """Raise unless the arguments fit together; return the floating-point tensors, and k and prefix as ints."""
    check_shape("x", x, "B N C")
    check_shape("order", order, "B P")
    check_shape("scores", scores, "B P")
    check_floating("x", x)
    check_index("order", order)
    check_floating("scores", scores)
    check_same("x", x, "order", order)
    check_same("x", x, "scores", scores)
    prefix = check_count("prefix", prefix, 0, x.shape[1])
    expected: tuple[int, ...] = (x.shape[0], x.shape[1] - prefix)
    for name, tensor in (("order", order), ("scores", scores)):
        if shape_of(tensor) != expected:
            raise ValueError(f"{name} must have shape {expected}, one entry a patch token, got {shape_of(tensor)}")
    k = check_count("k", k, 0, expected[1])
    if residual is not None:
        check_residual(x, residual, prefix + k + 1)
    if residual_bias is not None:
        check_shape("residual_bias", residual_bias, "C")
        check_floating("residual_bias", residual_bias)
        check_same("x", x, "residual_bias", residual_bias)
        if residual is None:
            raise ValueError("residual_bias is part of a residual, but there is none")
        if shape_of(residual_bias) != shape_of(x)[2:]:
            raise ValueError(f"residual_bias must have shape {shape_of(x)[2:]}, got {shape_of(residual_bias)}")
    return [tensor for tensor in (x, scores, residual, residual_bias) if tensor is not None], k, prefix


def fuse_tokens_unchecked(
    x: Tensor,
    order: Tensor,
    scores: Tensor,
    k: int,
    *,
    prefix: int = 1,
    residual: Tensor | None = None,
    residual_bias: Tensor | None = None,
    norm: Norm | None = None,
    backend: Resolved,
) -> Any:
    """Call :func:`fuse_tokens` without checks, by the backend named."""
    arguments = x, order, scores, k, prefix, residual, residual_bias
    if backend == "reference":
        out = reference.fuse_tokens(*arguments)
        return out if norm is None else (out, reference.layer_norm(out, *norm))
    weight, bias, eps = norm or NO_NORM
    if wants_gradient(x, scores, residual, residual_bias, weight, bias):
        return FuseTokens.apply(*arguments, weight, bias, eps)
    found = _forward(*arguments, weight, bias, eps)
    return found[0] if norm is None else (found[0], found[1])


@overload
def fuse_tokens(
    x: Tensor,
    order: Tensor,
    scores: Tensor,
    k: int,
    *,
    prefix: int = 1,
    residual: Tensor | None = None,
    residual_bias: Tensor | None = None,
    norm: None = None,
    backend: str | None = None,
) -> Tensor: ...
@overload
def fuse_tokens(
    x: Tensor,
    order: Tensor,
    scores: Tensor,
    k: int,
    *,
    prefix: int = 1,
    residual: Tensor | None = None,
    residual_bias: Tensor | None = None,
    norm: Norm,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def fuse_tokens(
    x: Tensor,
    order: Tensor,
    scores: Tensor,
    k: int,
    *,
    prefix: int = 1,
    residual: Tensor | None = None,
    residual_bias: Tensor | None = None,
    norm: Norm | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Keep the prefix and the k best patch tokens, sum up all the others with their scores (EViT, section 3).

    Equivalent PyTorch::

        kept, rest = order[:, :k], order[:, k:]
        patches = x[:, prefix:]
        weights = scores.gather(1, rest).unsqueeze(1)  # raw: they do not sum to one
        fused = weights @ patches.gather(1, rest.unsqueeze(-1).expand(-1, -1, C))
        kept = patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, C))
        out = torch.cat([x[:, :prefix], kept, fused], dim=1) + residual
        normed = F.layer_norm(out, (C,), *norm)

    Args:
        x: (B, N, C) tokens, the first ``prefix`` of them are always kept. float32, float16, bfloat16 (reference: any).
        order: (B, P) int64 or int32, a permutation of the P = N - prefix patch tokens, best first, as
            ``select_topk(scores, P)`` returns it. Values are not checked.
        scores: (B, P) the weight of every patch token, in token order, of any floating dtype and any strides.
        k: how many patch tokens to keep, 0 .. P. With k = P nothing is left to sum and the last row is zero.
        prefix: number of leading tokens that are never reduced (class, distillation, registers).
        residual: (B, prefix + k + 1, C) to be added, or None.
        residual_bias: (C,) a part that every row of the residual contains once, such as the projection's bias, or None.
            The fused row stands for several rows, so it gets ``weights.sum() - 1`` times the bias more.
        norm: the layer normalisation that follows, in the same pass over memory, or None: weight (C,) and bias (C,) of
            any floating dtype, each None for ones or zeros, and eps, which is added to the variance.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        out (B, prefix + k + 1, C), in x's dtype or, with a residual, the promoted one; the fused row is the last one
        and is summed in float32. With a norm a pair, out and normed (B, prefix + k + 1, C) in the same dtype; the
        statistics of the rounded out are float32. Differentiable in x, scores, residual, residual_bias, weight and
        bias.

    Raises:
        ValueError: wrong shapes, devices that differ, a prefix outside 0 .. N, a k outside 0 .. P, an eps that is
            negative or not finite.
        TypeError: x, scores, weight or bias not floating point, order not an integer tensor, norm not a triple.
    """
    tensors, k, prefix = _check_arguments(x, order, scores, k, prefix, residual, residual_bias)
    affine, norm = check_norm(x, norm)
    options: dict[str, Any] = {"prefix": prefix, "residual": residual, "residual_bias": residual_bias, "norm": norm}
    return fuse_tokens_unchecked(x, order, scores, k, **options, backend=resolve(backend, *tensors, *affine))
