"""``merge_tokens`` and ``unmerge_tokens``: the weighted mean of every slot, and back to one row for each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from .. import reference
from ..backends import Resolved, resolve
from ._check import (
    check_count,
    check_floating,
    check_number,
    check_pair,
    check_same,
    check_shape,
    shape_of,
)
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
from .slots import check_groups, check_slot, grouped

__all__ = ["merge_tokens", "unmerge_tokens"]


def _reference_merge(
    x: Tensor,
    slot: Tensor,
    order: Tensor,
    offsets: Tensor,
    size: Tensor | None,
    residual: Tensor | None,
    eps: float,
    head: Tensor | None,
    log_weight: Tensor | None = None,
    log_bias: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm_eps: float | None = None,
) -> list[Tensor]:
    num_out, learned = offsets.shape[1] - 1, []
    if log_weight is not None and log_bias is not None:
        size = reference.learned_sizes(x, log_weight, log_bias, slot, num_out)
        learned = [size]
    merged, total = reference.merge_tokens(x, slot, num_out, size, residual, eps, head)
    merged, *extra = reference.with_norm(merged, weight, bias, norm_eps)
    return [merged, total, *extra, *learned]


def _reference_norm_backward(
    grad_out: Tensor | None,
    grad_normed: Tensor,
    merged: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    affine: bool,
    rows: bool,
    head: bool,
    x: Tensor | None,
    slot: Tensor,
    order: Tensor,
    offsets: Tensor,
    size: Tensor | None,
    total: Tensor,
    eps: float,
    log_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    whole, sums = reference.layer_norm_backward(grad_out, grad_normed, merged, statistics, weight, affine)
    num_head = merged.shape[1] - total.shape[1]
    grad_head, grad = whole[:, :num_head].clone(), whole[:, num_head:].contiguous()
    if x is None:
        grad_x = reference.merge_tokens_backward(grad, slot, size, total, eps)
        grad_size = total.new_empty(total.shape[0], 0)
    else:
        assert size is not None
        grad_x, grad_size = reference.merge_tokens_size_backward(grad, x, slot, size, total, eps, log_weight)
    return grad_x, grad_size, rows_if(rows, grad), rows_if(head, grad_head), sums


@operator(
    "merge_tokens.merge_tokens",
    _reference_merge,
    dense="x residual head log_weight weight bias",
    whole="order offsets",
    skip="slot",
)
def _merge(
    x: Tensor,
    slot: Tensor,
    order: Tensor,
    offsets: Tensor,
    size: Tensor | None,
    residual: Tensor | None,
    eps: float,
    head: Tensor | None,
    log_weight: Tensor | None = None,
    log_bias: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm_eps: float | None = None,
) -> list[Tensor]:
    num_out = offsets.shape[1] - 1
    rows = num_out if head is None else head.shape[1] + num_out
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    merged, *extra = fake_norm(x.new_empty(x.shape[0], rows, x.shape[2], dtype=dtype), norm_eps)
    total = x.new_empty(x.shape[0], num_out, dtype=reference.accumulator(x.dtype))
    return [merged, total, *extra, *([] if log_weight is None else [total.new_empty(slot.shape)])]


@operator(
    "merge_tokens.spread_slots",
    lambda grad, slot, order, offsets, *others: reference.merge_tokens_backward(grad, slot, *others),
    name="merge_tokens_backward",
    dense="grad",
    whole="order offsets",
    skip="slot",
)
def _merge_backward(
    grad: Tensor, slot: Tensor, order: Tensor, offsets: Tensor, size: Tensor | None, total: Tensor, eps: float
) -> Tensor:
    return grad.new_empty(grad.shape[0], slot.shape[1], grad.shape[2])


@operator(
    "merge_tokens.merge_tokens_size_backward",
    lambda grad, x, slot, order, offsets, *others: reference.merge_tokens_size_backward(grad, x, slot, *others),
    dense="grad x weight",
    whole="order offsets",
    skip="slot",
)
def _merge_size_backward(
    grad: Tensor,
    x: Tensor,
    slot: Tensor,
    order: Tensor,
    offsets: Tensor,
    size: Tensor,
    total: Tensor,
    eps: float,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape[0], slot.shape[1], grad.shape[2]), total.new_empty(slot.shape)


@operator(
    "merge_tokens.merge_tokens_norm_backward",
    _reference_norm_backward,
    dense="grad_out grad_normed weight x log_weight",
    whole="order offsets",
    skip="slot",
)
def _norm_backward(
    grad_out: Tensor | None,
    grad_normed: Tensor,
    merged: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    affine: bool,
    rows: bool,
    head: bool,
    x: Tensor | None,
    slot: Tensor,
    order: Tensor,
    offsets: Tensor,
    size: Tensor | None,
    total: Tensor,
    eps: float,
    log_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, num_out, channels = merged.shape
    tokens, num_slots = slot.shape[1], total.shape[1]
    grad_size = total.new_empty(batch, 0 if x is None else tokens)
    grad_rows = merged.new_empty(batch, num_slots if rows else 0, channels)
    grad_head = merged.new_empty(batch, num_out - num_slots if head else 0, channels)
    sums = fake_sums(statistics, merged, affine)
    return merged.new_empty(batch, tokens, channels), grad_size, grad_rows, grad_head, sums


@operator(
    "merge_tokens.spread_slots",
    lambda x, slot, order, offsets: reference.unmerge_tokens(x, slot),
    name="unmerge_tokens",
    dense="x",
    whole="order offsets",
    skip="slot",
)
def _unmerge(x: Tensor, slot: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], slot.shape[1], x.shape[2])


@operator(
    "merge_tokens.sum_grouped",
    lambda grad, slot, order, offsets: reference.sum_slots(grad, slot, offsets.shape[1] - 1),
    name="unmerge_tokens_backward",
    dense="grad",
    whole="order offsets",
    skip="slot",
)
def _unmerge_backward(grad: Tensor, slot: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[0], offsets.shape[1] - 1, grad.shape[2])


class MergeTokens(torch.autograd.Function):
    """Weighted means of slots. A token gets the share size / total of its slot's gradient.

    With a layer, sizes are exp(log_weight . x + log_bias), and their gradient goes on to the layer and to x. With a
    norm_eps, the rows are also normalised.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        slot: Tensor,
        order: Tensor,
        offsets: Tensor,
        size: Tensor | None,
        residual: Tensor | None,
        eps: float,
        head: Tensor | None,
        log_weight: Tensor | None = None,
        log_bias: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        norm_eps: float | None = None,
    ) -> tuple[Tensor, ...]:
        needs_x = ctx.needs_input_grad[4] or log_weight is not None
        options = size, residual, eps, head, log_weight, log_bias, weight, bias, norm_eps
        merged, total, *extra = _merge(x, slot, order, offsets, *options)
        if log_weight is not None:
            size, extra = extra[-1], extra[:-1]  # torch 2.11 captures a starred name as a tuple: no pop
        saved = (x if needs_x else None, slot, order, offsets, size, total, log_weight, log_bias)
        ctx.save_for_backward(*saved, *((merged, extra[1], weight) if extra else ()))
        save_norm(ctx, 10, weight, bias, norm_eps)
        ctx.eps = eps
        ctx.x_dtype = x.dtype
        ctx.log_bias_dtype = None if log_bias is None else log_bias.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.num_head = 0 if head is None else head.shape[1]
        ctx.mark_non_differentiable(total)
        return merged, total, *extra[:1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, slot, order, offsets, size, total, log_weight, _, *kept = ctx.saved_tensors
        grad, grad_normed = grads[0], grads[2] if kept else None
        if grad is None and grad_normed is None:
            return (None,) * 13
        if differentiates_again():
            return _gradients_again(ctx, grad, grad_normed)
        slots, wanted = (slot, order, offsets), ctx.needs_input_grad
        learned = log_weight is not None
        sized = wanted[4] or (learned and (wanted[0] or wanted[8] or wanted[9]))
        grad_x = grad_size = grad_log_weight = grad_log_bias = None
        affine: tuple[Tensor | None, Tensor | None] = (None, None)
        if grad_normed is not None:
            options = wants_affine(ctx), wanted[5], wanted[7], x if sized else None, *slots, size, total, ctx.eps
            grad_x, grad_size, grad_rows, grad_head, sums = _norm_backward(
                grad, grad_normed, *kept, *options, log_weight if sized else None
            )
            affine = affine_gradients(ctx, sums)
        else:
            assert grad is not None
            grad_head, grad_rows = grad[:, : ctx.num_head], grad[:, ctx.num_head :]
            if sized:
                arguments = grad_rows, x, *slots, size, total, ctx.eps, log_weight
                grad_x, grad_size = _merge_size_backward(*arguments)
            elif wanted[0]:
                grad_x = _merge_backward(grad_rows, *slots, size, total, ctx.eps)
        if learned and sized:
            exponent = (grad_size * size).masked_fill(slot < 0, 0.0)  # kernels compute no size without a slot
            dtype = torch.promote_types(x.dtype, log_weight.dtype)  # a layer in float32 needs a gradient in float32
            products = torch.bmm(exponent.to(dtype).unsqueeze(1), x.to(dtype))
            grad_log_weight = products.sum(0, dtype=exponent.dtype).to(log_weight.dtype)
            grad_log_bias = exponent.sum().view(1).to(ctx.log_bias_dtype)
        return (
            None if grad_x is None else grad_x.to(ctx.x_dtype),
            None,
            None,
            None,
            grad_size.to(size.dtype) if grad_size is not None and wanted[4] else None,
            grad_rows.to(ctx.residual_dtype) if wanted[5] else None,
            None,
            grad_head.to(ctx.x_dtype) if wanted[7] else None,
            grad_log_weight,
            grad_log_bias,
            *affine,
            None,
        )


def _gradients_again(ctx: Any, grad: Tensor | None, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return gradients of MergeTokens' inputs that can be differentiated again."""
    x, slot, _, _, size, total, log_weight, log_bias, *kept = ctx.saved_tensors
    affine: Sequence[Tensor | None] = (None, None)
    if grad_normed is not None:
        merged, _, weight = kept
        grad, *affine = again_through_norm(ctx, grad, grad_normed, merged, weight)
    assert grad is not None
    wanted = ctx.needs_input_grad
    grad_head, grad_rows = grad[:, : ctx.num_head], grad[:, ctx.num_head :]
    grad_x = grad_size = grad_log_weight = grad_log_bias = None
    if x is None:
        if wanted[0]:
            grad_x = reference.merge_tokens_backward(grad_rows, slot, size, total, ctx.eps).to(ctx.x_dtype)
    else:

        def merge(x: Tensor, size: Tensor | None, log_weight: Tensor | None, log_bias: Tensor | None) -> Tensor:
            if log_weight is not None and log_bias is not None:
                size = reference.learned_sizes(x, log_weight, log_bias, slot, total.shape[1])
            return reference.merge_tokens(x, slot, total.shape[1], size, None, ctx.eps)[0]

        inputs = x, size, log_weight, log_bias
        grad_x, grad_size, grad_log_weight, grad_log_bias = gradients_again(merge, inputs, (grad_rows,))
    grad_residual = grad_rows.to(ctx.residual_dtype) if wanted[5] else None
    of_head = grad_head.to(ctx.x_dtype) if wanted[7] else None
    found = (grad_x, None, None, None, grad_size, grad_residual, None, of_head, grad_log_weight, grad_log_bias)
    return *found, *affine, None


class UnmergeTokens(torch.autograd.Function):
    """Rows of slots, one for each token. A slot gets the sum of its tokens' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(slot, order, offsets)
        return _unmerge(x, slot, order, offsets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slot, order, offsets = ctx.saved_tensors
        if differentiates_again():
            return reference.sum_slots(grads[0], slot, offsets.shape[1] - 1), None, None, None
        return _unmerge_backward(grads[0], slot, order, offsets), None, None, None


def _check_log_size(x: Tensor, log_size: Any) -> None:
    """Raise unless log_size is the weight (1, C) and bias (1,) of a layer."""
    check_pair("log_size", log_size, "weight and bias")
    for name, tensor, layout, shape in (
        ("weight", log_size[0], "1 C", (1, x.shape[2])),
        ("bias", log_size[1], "1", (1,)),
    ):
        check_shape(name, tensor, layout)
        check_floating(name, tensor)
        check_same("x", x, name, tensor)
        if shape_of(tensor) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {shape_of(tensor)}")


def _check_merge(
    x: Tensor,
    slot: Tensor,
    num_out: Any,
    size: Tensor | None,
    log_size: tuple[Tensor, Tensor] | None,
    residual: Tensor | None,
    groups: tuple[Tensor, Tensor] | None,
    eps: Any,
    head: Tensor | None,
) -> tuple[list[Tensor], int, float]:
    """Raise unless the arguments fit together.

    Returns:
        The tensors whose dtype and device decide the backend, num_out as an int and eps as a float.
    """
    check_shape("x", x, "B N C")
    check_floating("x", x)
    check_slot(slot)
    check_same("x", x, "slot", slot)
    if x.shape[2] < 1:
        raise ValueError(f"x must have at least one channel, got shape {shape_of(x)}")
    num_out = check_count("num_out", num_out, 1, 2**31 - 2)
    if shape_of(slot) != shape_of(x)[:2]:
        raise ValueError(f"slot must have shape {shape_of(x)[:2]}, got {shape_of(slot)}")
    if size is not None:
        check_shape("size", size, "B N")
        check_same("x", x, "size", size)
        if size.is_complex() or size.dtype == torch.bool:
            raise TypeError(f"size must hold real numbers, got {size.dtype}")
        if shape_of(size) != shape_of(slot):
            raise ValueError(f"size must have shape {shape_of(slot)}, got {shape_of(size)}")
    if log_size is not None:
        if size is not None:
            raise ValueError("size and log_size exclude each other, got both")
        _check_log_size(x, log_size)
    if residual is not None:
        check_residual(x, residual, num_out)
    if groups is not None:
        check_groups(groups, slot, num_out)
    if head is not None:
        check_shape("head", head, "B P C")
        check_same("x", x, "head", head, dtype=True)
        if (head.shape[0], head.shape[2]) != (x.shape[0], x.shape[2]):
            raise ValueError(f"head must have shape ({x.shape[0]}, P, {x.shape[2]}), got {shape_of(head)}")
    floating = size is not None and size.is_floating_point()
    tensors = [x, *((size,) if floating else ()), *(() if residual is None else (residual,)), *(log_size or ())]
    return tensors, num_out, check_number("eps", eps, low=0.0)


def merge_tokens_unchecked(
    x: Tensor,
    slot: Tensor,
    num_out: int,
    *,
    size: Tensor | None = None,
    log_size: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    groups: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    head: Tensor | None = None,
    norm: Norm | None = None,
    backend: Resolved,
) -> Any:
    """Call :func:`merge_tokens` without checks, by the backend named."""
    if backend == "reference":
        if log_size is not None:
            size = reference.learned_sizes(x, *log_size, slot, num_out)
        found = reference.merge_tokens(x, slot, num_out, size, residual, eps, head)
        return found if norm is None else (*found, reference.layer_norm(found[0], *norm))
    order, offsets = groups or grouped(slot, num_out)
    log_weight, log_bias = log_size or (None, None)
    weight, bias, norm_eps = norm or NO_NORM
    arguments = x, slot, order, offsets, size, residual, float(eps), head, log_weight, log_bias, weight, bias, norm_eps
    if wants_gradient(x, size, residual, head, log_weight, log_bias, weight, bias):
        return MergeTokens.apply(*arguments)
    return tuple(_merge(*arguments)[: 2 if norm is None else 3])


def unmerge_tokens_unchecked(
    x: Tensor, slot: Tensor, *, groups: tuple[Tensor, Tensor] | None = None, backend: Resolved
) -> Tensor:
    """Call :func:`unmerge_tokens` without checks, by the backend named."""
    if backend == "reference":
        return reference.unmerge_tokens(x, slot)
    order, offsets = groups or grouped(slot, x.shape[1])
    arguments = x, slot, order, offsets
    return UnmergeTokens.apply(*arguments) if wants_gradient(x) else _unmerge(*arguments)


@overload
def merge_tokens(
    x: Tensor,
    slot: Tensor,
    num_out: int,
    *,
    size: Tensor | None = None,
    log_size: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    groups: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    head: Tensor | None = None,
    norm: None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def merge_tokens(
    x: Tensor,
    slot: Tensor,
    num_out: int,
    *,
    size: Tensor | None = None,
    log_size: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    groups: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    head: Tensor | None = None,
    norm: Norm,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...
def merge_tokens(
    x: Tensor,
    slot: Tensor,
    num_out: int,
    *,
    size: Tensor | None = None,
    log_size: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    groups: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    head: Tensor | None = None,
    norm: Norm | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Replace the tokens of every slot by their size-weighted mean, and add a residual (ToMe, section 3).

    ``merged[m] = sum(size[n] * x[n]) / (sum(size[n]) + eps) + residual[m]`` over the tokens n with ``slot[n] == m``.
    With a norm also ``F.layer_norm(merged, (C,), *norm)``.

    Args:
        x: (B, N, C) tokens. float32, float16, bfloat16 (reference: any); sums are float32.
        slot: (B, N) int64 or int32, values -1 .. num_out - 1, not checked. An empty slot gives zeros and size 0. A
            token of slot -1 is left out, and it and its size get no gradient.
        num_out: number of slots.
        size: (B, N), the weights of the tokens, or None for ones: in ToMe the number of patches in each token, in
            TCFormer learned weights. Differentiable if it requires a gradient.
        log_size: in place of size, the weight (1, C) and bias (1,) of a linear layer that gives its logarithm:
            ``size[n] = exp(weight @ x[n] + bias)``, which the kernels compute in the same launch, in float32.
        residual: (B, num_out, C) to be added, or None.
        groups: the result of :func:`group_slots` for this slot, to save that step; the reference does not need it.
        eps: added to the divisor, not to the sizes that are returned.
        head: (B, P, C) rows in x's dtype that go in front of the merged ones unchanged, or None.
        norm: the layer normalisation that follows, in the same pass over memory, or None: weight (C,) and bias (C,) of
            any floating dtype, each None for ones or zeros, and eps, which is added to the variance.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        merged (B, P + num_out, C), differentiable in x, size, log_size, residual and head, and the new sizes
        (B, num_out), float32 (float64 for float64 x), the sums of the sizes, without gradient. If the greatest
        logarithm of a slot by log_size is above 40, its size is divided by ``exp(greatest - 40)``, since the sum may be
        beyond float32; the merged row is still the mean. With a norm also normed (B, P + num_out, C), with the
        head's rows, in merged's dtype and differentiable in weight and bias too; the statistics of the rounded merged
        are float32.

    Raises:
        ValueError: wrong shapes, no channel, devices that differ, ``num_out < 1``, an eps that is negative or not
            finite, both size and log_size, a weight or bias of another shape.
        TypeError: x or log_size not floating point, log_size not a pair, slot not an integer tensor, head not in x's
            dtype, eps not a number, norm not a triple.
    """
    tensors, num_out, eps = _check_merge(x, slot, num_out, size, log_size, residual, groups, eps, head)
    affine, norm = check_norm(x, norm)
    options: dict[str, Any] = {
        "size": size,
        "log_size": log_size,
        "residual": residual,
        "groups": groups,
        "eps": eps,
        "head": head,
        "norm": norm,
    }
    return merge_tokens_unchecked(x, slot, num_out, **options, backend=resolve(backend, *tensors, *affine))


def unmerge_tokens(
    x: Tensor, slot: Tensor, *, groups: tuple[Tensor, Tensor] | None = None, backend: str | None = None
) -> Tensor:
    """Give every token the row of its slot, or zeros if it was dropped.

    Equivalent PyTorch: ``x.gather(1, slot.unsqueeze(-1).expand(-1, -1, C))`` where no slot is -1.

    Args:
        x: (B, M, C) rows.
        slot: (B, N) int64 or int32, values -1 .. M - 1, not checked; -1 gives zeros.
        groups: the result of :func:`group_slots` for this slot and M slots, to save that step; the reference does not
            need it.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        (B, N, C) in x's dtype. Differentiable in x.

    Raises:
        ValueError: wrong shapes, or devices that differ.
        TypeError: x not floating point, slot not an integer tensor.
    """
    check_shape("x", x, "B M C")
    check_floating("x", x)
    check_slot(slot)
    check_same("x", x, "slot", slot)
    if slot.shape[0] != x.shape[0]:
        raise ValueError(f"slot must have x's batch size {x.shape[0]}, got shape {shape_of(slot)}")
    if groups is not None:
        check_groups(groups, slot, x.shape[1])
    return unmerge_tokens_unchecked(x, slot, groups=groups, backend=resolve(backend, x))
