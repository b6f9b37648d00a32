"""``gather_tokens``: the kept rows, in one pass with the residual addition."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from .. import reference
from ..backends import Resolved, resolve
from ._check import check_count, check_floating, check_index, check_same, check_shape, shape_of
from ._library import differentiates_again, operator, wants_gradient
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

__all__ = ["gather_tokens"]


def _triton_backward(grad: Tensor, index: Tensor, prefix: int, num_in: int) -> Tensor:
    from ..kernels import merge_tokens as kernels

    return kernels.sum_slots(grad, reference.with_prefix(index, prefix), num_in)


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
    from ..kernels import slots

    groups = slots.group_slots(reference.with_prefix(index, prefix), num_in)
    return kernels.gather_tokens_norm_backward(grad_out, grad_normed, out, statistics, weight, affine, rows, *groups)


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


@operator(
    "gather_tokens.gather_tokens",
    lambda x, index, prefix, residual, *norm: reference.with_norm(
        reference.gather_tokens(x, index, prefix, residual), *(norm or NO_NORM)
    ),
    dense="x residual weight bias",
)
def _forward(
    x: Tensor,
    index: Tensor,
    prefix: int,
    residual: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm_eps: float | None = None,
) -> list[Tensor]:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return fake_norm(x.new_empty(x.shape[0], prefix + index.shape[1], x.shape[2], dtype=dtype), norm_eps)


@operator(_triton_backward, reference.scatter_tokens, name="gather_tokens_backward", dense="grad")
def _backward(grad: Tensor, index: Tensor, prefix: int, num_in: int) -> Tensor:
    return grad.new_empty(grad.shape[0], num_in, grad.shape[2])


@operator(
    _triton_norm_backward,
    _reference_norm_backward,
    name="gather_tokens_norm_backward",
    dense="grad_out grad_normed weight",
)
def _norm_backward(
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
    grad_x = out.new_empty(out.shape[0], num_in, out.shape[2])
    return grad_x, rows_if(rows, grad), fake_sums(statistics, out, affine)


class GatherTokens(torch.autograd.Function):
    """Kept rows. Their gradients go back to the rows they came from; the residual gets the output's gradient.

    With a norm, one launch adds the gradient through the norm to the gradient of the rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        index: Tensor,
        prefix: int,
        residual: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        norm_eps: float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        out, *extra = _forward(x, index, prefix, residual, weight, bias, norm_eps)
        ctx.save_for_backward(index, *((out, extra[1], weight) if extra else ()))
        save_norm(ctx, 4, weight, bias, norm_eps)
        ctx.prefix, ctx.num_in, ctx.x_dtype = prefix, x.shape[1], x.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        return (out, extra[0]) if extra else out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        index, *saved = ctx.saved_tensors
        grad_out, grad_normed = grads if saved else (grads[0], None)
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
    """Return the gradients of GatherTokens' inputs for the gradient of its rows, None for inputs that need none."""
    grad_x = grad_residual = None
    if ctx.needs_input_grad[0]:
        backward = reference.scatter_tokens if differentiates_again() else _backward
        grad_x = backward(grad, index, ctx.prefix, ctx.num_in).to(ctx.x_dtype)
    if ctx.needs_input_grad[3]:
        grad_residual = grad.to(ctx.residual_dtype)
    return grad_x, None, None, grad_residual


def _check_arguments(x: Tensor, index: Tensor, prefix: Any, residual: Tensor | None) -> int:
    """Raise unless the arguments fit together; return the prefix as an int."""
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
    x: Tensor,
    index: Tensor,
    *,
    prefix: int = 1,
    residual: Tensor | None = None,
    norm: Norm | None = None,
    backend: Resolved,
) -> Any:
    """Call :func:`gather_tokens` without checks, by the backend named."""
    if backend == "reference":
        out = reference.gather_tokens(x, index, prefix, residual)
        return out if norm is None else (out, reference.layer_norm(out, *norm))
    arguments = x, index, prefix, residual, *(norm or NO_NORM)
    if wants_gradient(x, residual, *arguments[4:6]):
        return GatherTokens.apply(*arguments)
    found = _forward(*arguments)
    return found[0] if norm is None else (found[0], found[1])


@overload
def gather_tokens(
    x: Tensor,
    index: Tensor,
    *,
    prefix: int = 1,
    residual: Tensor | None = None,
    norm: None = None,
    backend: str | None = None,
) -> Tensor: ...
@overload
def gather_tokens(
    x: Tensor,
    index: Tensor,
    *,
    prefix: int = 1,
    residual: Tensor | None = None,
    norm: Norm,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def gather_tokens(
    x: Tensor,
    index: Tensor,
    *,
    prefix: int = 1,
    residual: Tensor | None = None,
    norm: Norm | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Keep the prefix and the chosen patch tokens, in the order of ``index``, and add a residual to them.

    Equivalent PyTorch::

        rows = torch.cat([torch.arange(prefix).expand(B, prefix), index + prefix], dim=1)
        out = x.gather(1, rows.unsqueeze(-1).expand(-1, -1, C)) + residual
        normed = F.layer_norm(out, (C,), *norm)

    Args:
        x: (B, N, C) tokens, the first ``prefix`` of them are always kept. float32, float16, bfloat16 (reference: any).
        index: (B, K) int64 or int32, positions among the N - prefix patch tokens. Values are not checked.
            An index may occur twice; its gradients add up.
        prefix: number of leading tokens that are never reduced (class, distillation, registers).
        residual: (B, prefix + K, C) to be added, or None.
        norm: the layer normalisation that follows, in the same pass over memory, or None: weight (C,) and bias (C,) of
            any floating dtype, each None for ones or zeros, and eps, which is added to the variance.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        out (B, prefix + K, C), in x's dtype or, with a residual, the promoted one. With a norm a pair, out and normed
        (B, prefix + K, C) in the same dtype; the statistics of the rounded out are float32. Differentiable in x,
        residual, weight and bias.

    Raises:
        ValueError: wrong shapes, devices that differ, a prefix outside 0 .. N, an eps that is negative or not finite.
        TypeError: x, weight or bias not floating point, index not an integer tensor, norm not a triple.
    """
    prefix = _check_arguments(x, index, prefix, residual)
    affine, norm = check_norm(x, norm)
    chosen = resolve(backend, x, *(() if residual is None else (residual,)), *affine)
    return gather_tokens_unchecked(x, index, prefix=prefix, residual=residual, norm=norm, backend=chosen)
