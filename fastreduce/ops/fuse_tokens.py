"""``fuse_tokens``: the rows that stay, and one row made of all the others, in one pass with the residual addition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import Resolved, resolve
from ._check import check_count, check_floating, check_index, check_same, check_shape, shape_of
from ._library import dense_rows, differentiates_again, gradients_again, register, wants_gradient
from ._norm import (
    affine_gradients,
    again_through_norm,
    check_norm,
    dense_gradients,
    fake_norm,
    fake_sums,
    rows_if,
    save_norm,
    wants_affine,
)
from .gather_tokens import check_residual

__all__ = ["fuse_tokens", "fuse_tokens_norm"]


def _fake_forward(
    x: Tensor,
    order: Tensor,
    scores: Tensor,
    k: int,
    prefix: int,
    residual: Tensor | None,
    residual_bias: Tensor | None,
) -> Tensor:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(x.shape[0], prefix + k + 1, x.shape[2], dtype=dtype)


def _fake_backward(
    grad: Tensor, x: Tensor, order: Tensor, scores: Tensor, k: int, prefix: int, residual_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), scores.new_empty(scores.shape)


def _triton_norm_backward(
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
    from ..kernels import fuse_tokens as kernels

    norm = *dense_gradients(grad_out, grad_normed, out, statistics, weight), affine
    residual_bias = None if residual_bias is None else dense_rows(residual_bias)
    return kernels.fuse_tokens_norm_backward(*norm, rows, dense_rows(x), order, scores, prefix, residual_bias)


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


def _fake_norm_backward(
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
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    spread = x.new_empty(x.shape), scores.new_empty(scores.shape)
    return *spread, rows_if(rows, out.new_empty(out.shape)), fake_sums(statistics, out, affine)


_forward = register(
    "fuse_tokens(Tensor x, Tensor order, Tensor scores, SymInt k, int prefix, Tensor? residual, Tensor? residual_bias)"
    " -> Tensor",
    triton="fuse_tokens.fuse_tokens",
    dense="x residual residual_bias",
    reference=reference.fuse_tokens,
    fake=_fake_forward,
)
_forward_norm = register(
    "fuse_tokens_norm(Tensor x, Tensor order, Tensor scores, SymInt k, int prefix, Tensor? residual,"
    " Tensor? residual_bias, Tensor? weight, Tensor? bias, float norm_eps) -> (Tensor, Tensor, Tensor)",
    triton="fuse_tokens.fuse_tokens_norm",
    dense="x residual residual_bias weight bias",
    reference=lambda *arguments: reference.with_norm(reference.fuse_tokens(*arguments[:7]), *arguments[7:]),
    fake=lambda *arguments: fake_norm(_fake_forward(*arguments[:7])),
)
_backward = register(
    "fuse_tokens_backward(Tensor grad, Tensor x, Tensor order, Tensor scores, SymInt k, int prefix,"
    " Tensor? residual_bias) -> (Tensor, Tensor)",
    triton="fuse_tokens.fuse_tokens_backward",
    dense="grad x residual_bias",
    reference=reference.fuse_tokens_backward,
    fake=_fake_backward,
)
_norm_backward = register(
    "fuse_tokens_norm_backward(Tensor? grad_out, Tensor grad_normed, Tensor out, Tensor statistics, Tensor? weight,"
    " bool affine, bool rows, Tensor x, Tensor order, Tensor scores, int prefix, Tensor? residual_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    triton=_triton_norm_backward,
    reference=_reference_norm_backward,
    fake=_fake_norm_backward,
)


class FuseTokens(torch.autograd.Function):
    """Gradient: a kept row takes its own, every other row its score's share of the fused row's gradient."""

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
    ) -> Tensor:
        ctx.save_for_backward(x, order, scores, residual_bias)
        ctx.k, ctx.prefix = k, prefix
        ctx.residual_dtype = None if residual is None else residual.dtype
        return _forward(x, order, scores, k, prefix, residual, residual_bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grads[0], *ctx.saved_tensors)


class FuseTokensNorm(torch.autograd.Function):
    """As FuseTokens, where the rows' gradient is their own and what the norm adds to it: one launch for both."""

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
        weight: Tensor | None,
        bias: Tensor | None,
        norm_eps: float,
    ) -> tuple[Tensor, Tensor]:
        arguments = x, order, scores, k, prefix, residual, residual_bias
        out, normed, statistics = _forward_norm(*arguments, weight, bias, norm_eps)
        ctx.save_for_backward(x, order, scores, residual_bias, out, statistics, weight)
        save_norm(ctx, 7, weight, bias, norm_eps)
        ctx.k, ctx.prefix = k, prefix
        ctx.residual_dtype = None if residual is None else residual.dtype
        return out, normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_out, grad_normed = grads
        if grad_normed is None:
            if grad_out is None:
                return (None,) * 10
            return *_gradients(ctx, grad_out, *ctx.saved_tensors[:4]), None, None, None
        x, order, scores, residual_bias, *saved = ctx.saved_tensors
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
    """Return the gradients of FuseTokens' inputs, None for those that need none, for the gradient of its rows."""
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
    """Return the gradients of the residual and of the part that all its rows have, None for one that needs none."""
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
    """Raise if they do not fit together; returns those that have a floating dtype, and k and prefix as ints."""
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
    backend: Resolved,
) -> Tensor:
    """:func:`fuse_tokens` without checks, by the backend named."""
    arguments = x, order, scores, k, prefix, residual, residual_bias
    if backend == "reference":
        return reference.fuse_tokens(*arguments)
    return FuseTokens.apply(*arguments) if wants_gradient(x, scores, residual, residual_bias) else _forward(*arguments)


def fuse_tokens_norm_unchecked(
    x: Tensor,
    order: Tensor,
    scores: Tensor,
    k: int,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    prefix: int = 1,
    residual: Tensor | None = None,
    residual_bias: Tensor | None = None,
    backend: Resolved,
) -> tuple[Tensor, Tensor]:
    """:func:`fuse_tokens_norm` without checks, by the backend named."""
    arguments = x, order, scores, k, prefix, residual, residual_bias
    if backend == "reference":
        out = reference.fuse_tokens(*arguments)
        return out, reference.layer_norm(out, weight, bias, norm_eps)
    if wants_gradient(x, scores, residual, residual_bias, weight, bias):
        return FuseTokensNorm.apply(*arguments, weight, bias, norm_eps)
    return _forward_norm(*arguments, weight, bias, norm_eps)[:2]


def fuse_tokens(
    x: Tensor,
    order: Tensor,
    scores: Tensor,
    k: int,
    *,
    prefix: int = 1,
    residual: Tensor | None = None,
    residual_bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Keep the prefix and the k best patch tokens, sum up all the others with their scores (EViT, section 3).

    Equivalent PyTorch::

        kept, rest = order[:, :k], order[:, k:]
        patches = x[:, prefix:]
        weights = scores.gather(1, rest).unsqueeze(1)  # raw: they do not sum to one
        fused = weights @ patches.gather(1, rest.unsqueeze(-1).expand(-1, -1, C))
        kept = patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, C))
        torch.cat([x[:, :prefix], kept, fused], dim=1) + residual

    Args:
        x: (B, N, C) tokens, the first ``prefix`` of them are always kept. float32, float16, bfloat16 (reference: any).
        order: (B, P) int64 or int32, a permutation of the P = N - prefix patch tokens, best first: what
            ``select_topk(scores, P)`` returns. Values are not checked.
        scores: (B, P) the weight of every patch token, in token order, of any floating dtype and any strides.
        k: how many patch tokens to keep, 0 .. P. With k = P nothing is left to sum and the last row is zero.
        prefix: number of leading tokens that are never reduced (class, distillation, registers).
        residual: (B, prefix + k + 1, C) to be added, or None.
        residual_bias: (C,) a part that every row of the residual has once, or None. The fused row stands for rows that
            each had it, so it gets it ``weights.sum() - 1`` times more.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        (B, prefix + k + 1, C), in x's dtype or, with a residual, the promoted one; the fused row is the last one and
        its sum is float32. Differentiable in x, scores, residual and residual_bias.

    Raises:
        ValueError: wrong shapes, devices that differ, a prefix outside 0 .. N, a k outside 0 .. P.
        TypeError: x or scores not floating point, order not an integer tensor.
    """
    tensors, k, prefix = _check_arguments(x, order, scores, k, prefix, residual, residual_bias)
    options: dict[str, Any] = {"prefix": prefix, "residual": residual, "residual_bias": residual_bias}
    return fuse_tokens_unchecked(x, order, scores, k, **options, backend=resolve(backend, *tensors))


def fuse_tokens_norm(
    x: Tensor,
    order: Tensor,
    scores: Tensor,
    k: int,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    prefix: int = 1,
    residual: Tensor | None = None,
    residual_bias: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`fuse_tokens`, with its arguments, and the layer normalisation that follows it, in one pass over memory.

    Equivalent PyTorch::

        out = fuse_tokens(x, order, scores, k, prefix=prefix, residual=residual, residual_bias=residual_bias)
        out, F.layer_norm(out, (C,), weight, bias, norm_eps)

    Args:
        x: (B, N, C) tokens.
        order: (B, P) a permutation of the patch tokens, best first.
        scores: (B, P) the weight of every patch token.
        k: how many patch tokens to keep.
        weight: (C,) what the normalised rows are multiplied with, of any floating dtype, or None for ones.
        bias: (C,) what is added to them, of any floating dtype, or None for zeros.
        norm_eps: added to the variance.
        prefix: number of leading tokens that are never reduced.
        residual: (B, prefix + k + 1, C) to be added, or None.
        residual_bias: (C,) a part that every row of the residual has once, or None.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        out (B, prefix + k + 1, C) and normed (B, prefix + k + 1, C), both in the dtype of :func:`fuse_tokens`; the
        statistics are float32 and those of out as it is stored. Differentiable in x, scores, residual, residual_bias,
        weight and bias.

    Raises:
        ValueError: as in :func:`fuse_tokens`; weight or bias of another shape, norm_eps negative or not finite.
        TypeError: as in :func:`fuse_tokens`; weight or bias not floating point, norm_eps not a number.
    """
    tensors, k, prefix = _check_arguments(x, order, scores, k, prefix, residual, residual_bias)
    affine, norm_eps = check_norm(x, weight, bias, norm_eps)
    options: dict[str, Any] = {"prefix": prefix, "residual": residual, "residual_bias": residual_bias}
    norm: dict[str, Any] = {"weight": weight, "bias": bias, "norm_eps": norm_eps}
    chosen = resolve(backend, *tensors, *affine)
    return fuse_tokens_norm_unchecked(x, order, scores, k, **norm, **options, backend=chosen)
