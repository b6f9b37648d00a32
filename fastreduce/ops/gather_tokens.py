"""``gather_tokens``: the rows that stay, in one pass with the residual addition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import Resolved, resolve
from ._check import check_count, check_floating, check_index, check_same, check_shape, shape_of
from ._library import dense_rows, differentiates_again, register, wants_gradient
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

__all__ = ["gather_tokens", "gather_tokens_norm"]


def _reference_norm(
    x: Tensor,
    index: Tensor,
    prefix: int,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.with_norm(reference.gather_tokens(x, index, prefix, residual), weight, bias, norm_eps)


def _triton_backward(grad: Tensor, index: Tensor, prefix: int, num_in: int) -> Tensor:
    from ..kernels import merge_tokens as kernels

    rows = reference.with_prefix(index, prefix)
    return kernels.sum_slots(dense_rows(grad), rows, num_in)


def _triton_norm_backward(
    grad_out: Tensor | None,
    grad_normed: Tensor,
    out: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    affine: bool,
    rows: bool,
    index: Tensor,
    prefix: int,
    num_in: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels import gather_tokens as kernels
    from ..kernels import merge_tokens as grouping

    norm = *dense_gradients(grad_out, grad_normed, out, statistics, weight), affine
    groups = grouping.group_slots(reference.with_prefix(index, prefix), num_in)
    return kernels.gather_tokens_norm_backward(*norm, rows, *groups)


def _reference_norm_backward(
    grad_out: Tensor | None,
    grad_normed: Tensor,
    out: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    affine: bool,
    rows: bool,
    index: Tensor,
    prefix: int,
    num_in: int,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, sums = reference.layer_norm_backward(grad_out, grad_normed, out, statistics, weight, affine)
    grad_x = reference.scatter_tokens(grad, index, prefix, num_in)
    return grad_x, rows_if(rows, grad), sums


def _fake_forward(x: Tensor, index: Tensor, prefix: int, residual: Tensor | None) -> Tensor:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(x.shape[0], prefix + index.shape[1], x.shape[2], dtype=dtype)


def _fake_backward(grad: Tensor, index: Tensor, prefix: int, num_in: int) -> Tensor:
    return grad.new_empty(grad.shape[0], num_in, grad.shape[2])


def _fake_norm_backward(
    grad_out: Tensor | None,
    grad_normed: Tensor,
    out: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    affine: bool,
    rows: bool,
    index: Tensor,
    prefix: int,
    num_in: int,
) -> tuple[Tensor, Tensor, Tensor]:
    grad = out.new_empty(out.shape)
    return _fake_backward(out, index, prefix, num_in), rows_if(rows, grad), fake_sums(statistics, out, affine)


_forward = register(
    "gather_tokens(Tensor x, Tensor index, int prefix, Tensor? residual) -> Tensor",
    triton="gather_tokens.gather_tokens",
    dense="x residual",
    reference=reference.gather_tokens,
    fake=_fake_forward,
)
_forward_norm = register(
    "gather_tokens_norm(Tensor x, Tensor index, int prefix, Tensor? residual, Tensor? weight, Tensor? bias,"
    " float norm_eps) -> (Tensor, Tensor, Tensor)",
    triton="gather_tokens.gather_tokens_norm",
    dense="x residual weight bias",
    reference=_reference_norm,
    fake=lambda x, index, prefix, residual, *norm: fake_norm(_fake_forward(x, index, prefix, residual)),
)
_backward = register(
    "gather_tokens_backward(Tensor grad, Tensor index, int prefix, SymInt num_in) -> Tensor",
    triton=_triton_backward,
    reference=reference.scatter_tokens,
    fake=_fake_backward,
)
_norm_backward = register(
    "gather_tokens_norm_backward(Tensor? grad_out, Tensor grad_normed, Tensor out, Tensor statistics, Tensor? weight,"
    " bool affine, bool rows, Tensor index, int prefix, SymInt num_in) -> (Tensor, Tensor, Tensor)",
    triton=_triton_norm_backward,
    reference=_reference_norm_backward,
    fake=_fake_norm_backward,
)


class GatherTokens(torch.autograd.Function):
    """Gradient: the rows go back where they came from; the residual's gradient is the output's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, prefix: int, residual: Tensor | None) -> Tensor:
        ctx.save_for_backward(index)
        ctx.prefix, ctx.num_in, ctx.x_dtype = prefix, x.shape[1], x.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        return _forward(x, index, prefix, residual)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        return _gradients(ctx, grads[0], *ctx.saved_tensors)


class GatherTokensNorm(torch.autograd.Function):
    """As GatherTokens, where the rows' gradient is their own and what the norm adds to it: one launch for both."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        index: Tensor,
        prefix: int,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        norm_eps: float,
    ) -> tuple[Tensor, Tensor]:
        out, normed, statistics = _forward_norm(x, index, prefix, residual, weight, bias, norm_eps)
        ctx.save_for_backward(index, out, statistics, weight)
        save_norm(ctx, 4, weight, bias, norm_eps)
        ctx.prefix, ctx.num_in, ctx.x_dtype = prefix, x.shape[1], x.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        return out, normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        index, *saved = ctx.saved_tensors
        grad_out, grad_normed = grads
        if grad_normed is None:
            if grad_out is None:
                return (None,) * 7
            return *_gradients(ctx, grad_out, index), None, None, None
        if differentiates_again():
            out, _, weight = saved
            grad, *affine = again_through_norm(ctx, grad_out, grad_normed, out, weight)
            return *_gradients(ctx, grad, index), *affine, None
        rows = ctx.needs_input_grad[3]
        options = wants_affine(ctx), rows, index, ctx.prefix, ctx.num_in
        grad_x, grad_rows, sums = _norm_backward(grad_out, grad_normed, *saved, *options)
        grad_residual = grad_rows.to(ctx.residual_dtype) if rows else None
        return grad_x.to(ctx.x_dtype), None, None, grad_residual, *affine_gradients(ctx, sums), None


def _gradients(ctx: Any, grad: Tensor, index: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
    """Return the gradients of GatherTokens' inputs, None for those that need none, for the gradient of its rows."""
    grad_x = grad_residual = None
    if ctx.needs_input_grad[0]:
        backward = reference.scatter_tokens if differentiates_again() else _backward
        grad_x = backward(grad, index, ctx.prefix, ctx.num_in).to(ctx.x_dtype)
    if ctx.needs_input_grad[3]:
        grad_residual = grad.to(ctx.residual_dtype)
    return grad_x, None, None, grad_residual


def _check_arguments(x: Tensor, index: Tensor, prefix: Any, residual: Tensor | None) -> int:
    """Raise if they do not fit together; returns the prefix as an int."""
    check_shape("x", x, "B N C")
    check_shape("index", index, "B K")
    check_floating("x", x)
    check_index("index", index)
    check_same("x", x, "index", index)
    prefix = check_count("prefix", prefix, 0, x.shape[1])
    if index.shape[0] != x.shape[0]:
        raise ValueError(f"index must have x's batch size {x.shape[0]}, got shape {shape_of(index)}")
    if index.shape[1] and prefix == x.shape[1]:
        raise ValueError(f"x of shape {shape_of(x)} has no token behind the prefix of {prefix} to be kept")
    if residual is not None:
        check_residual(x, residual, prefix + index.shape[1])
    return prefix


def check_residual(x: Tensor, residual: Tensor, rows: int) -> None:
    """Raise unless the residual is (B, rows, C) floating point on the device of x (B, N, C)."""
    check_shape("residual", residual, "B M C")
    check_floating("residual", residual)
    check_same("x", x, "residual", residual)
    expected = (x.shape[0], rows, x.shape[2])
    if shape_of(residual) != expected:
        raise ValueError(f"residual must have shape {expected}, got {shape_of(residual)}")


def gather_tokens_unchecked(
    x: Tensor, index: Tensor, *, prefix: int = 1, residual: Tensor | None = None, backend: Resolved
) -> Tensor:
    """:func:`gather_tokens` without checks, by the backend named."""
    if backend == "reference":
        return reference.gather_tokens(x, index, prefix, residual)
    if wants_gradient(x, residual):
        return GatherTokens.apply(x, index, prefix, residual)
    return _forward(x, index, prefix, residual)


def gather_tokens_norm_unchecked(
    x: Tensor,
    index: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    prefix: int = 1,
    residual: Tensor | None = None,
    backend: Resolved,
) -> tuple[Tensor, Tensor]:
    """:func:`gather_tokens_norm` without checks, by the backend named."""
    if backend == "reference":
        out = reference.gather_tokens(x, index, prefix, residual)
        return out, reference.layer_norm(out, weight, bias, norm_eps)
    if wants_gradient(x, residual, weight, bias):
        return GatherTokensNorm.apply(x, index, prefix, residual, weight, bias, norm_eps)
    return _forward_norm(x, index, prefix, residual, weight, bias, norm_eps)[:2]


def gather_tokens(
    x: Tensor, index: Tensor, *, prefix: int = 1, residual: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Keep the prefix and the chosen patch tokens, in the order of ``index``, and add a residual to them.

    Equivalent PyTorch::

        rows = torch.cat([torch.arange(prefix).expand(B, prefix), index + prefix], dim=1)
        x.gather(1, rows.unsqueeze(-1).expand(-1, -1, C)) + residual

    Args:
        x: (B, N, C) tokens, the first ``prefix`` of them are always kept. float32, float16, bfloat16 (reference: any).
        index: (B, K) int64 or int32, positions among the N - prefix patch tokens. Values are not checked.
            An index may occur twice; its gradients add up.
        prefix: number of leading tokens that are never reduced (class, distillation, registers).
        residual: (B, prefix + K, C) to be added, or None.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        (B, prefix + K, C), in x's dtype or, with a residual, the promoted one. Differentiable in x and residual.

    Raises:
        ValueError: wrong shapes, devices that differ, a prefix outside 0 .. N.
        TypeError: x not floating point, index not an integer tensor.
    """
    prefix = _check_arguments(x, index, prefix, residual)
    chosen = resolve(backend, x, *(() if residual is None else (residual,)))
    return gather_tokens_unchecked(x, index, prefix=prefix, residual=residual, backend=chosen)


def gather_tokens_norm(
    x: Tensor,
    index: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    prefix: int = 1,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`gather_tokens`, with its arguments, and the layer normalisation that follows it, in one pass over memory.

    Equivalent PyTorch::

        out = gather_tokens(x, index, prefix=prefix, residual=residual)
        out, F.layer_norm(out, (C,), weight, bias, norm_eps)

    Args:
        x: (B, N, C) tokens.
        index: (B, K) positions among the patch tokens.
        weight: (C,) what the normalised rows are multiplied with, of any floating dtype, or None for ones.
        bias: (C,) what is added to them, of any floating dtype, or None for zeros.
        norm_eps: added to the variance.
        prefix: number of leading tokens that are never reduced.
        residual: (B, prefix + K, C) to be added, or None.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        out (B, prefix + K, C) and normed (B, prefix + K, C), both in the dtype of :func:`gather_tokens`; the statistics
        are float32 and those of out as it is stored. Differentiable in x, residual, weight and bias.

    Raises:
        ValueError: as in :func:`gather_tokens`; weight or bias of another shape, norm_eps negative or not finite.
        TypeError: as in :func:`gather_tokens`; weight or bias not floating point, norm_eps not a number.
    """
    prefix = _check_arguments(x, index, prefix, residual)
    affine, norm_eps = check_norm(x, weight, bias, norm_eps)
    chosen = resolve(backend, x, *(() if residual is None else (residual,)), *affine)
    options: dict[str, Any] = {
        "weight": weight,
        "bias": bias,
        "norm_eps": norm_eps,
        "prefix": prefix,
        "residual": residual,
    }
    return gather_tokens_norm_unchecked(x, index, **options, backend=chosen)
