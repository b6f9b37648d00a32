"""``merge_tokens`` and ``unmerge_tokens``: the size-weighted mean of every slot, and back to one row a token."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import resolve
from ._check import check_count, check_floating, check_index, check_same, check_shape, shape_of
from ._library import dense_rows, register
from ._norm import (
    affine_gradients,
    check_norm,
    dense_gradients,
    fake_norm,
    fake_sums,
    rows_if,
    save_norm,
    wants_affine,
)

__all__ = ["group_slots", "merge_tokens", "merge_tokens_norm", "prepare_merge", "unmerge_tokens"]


def _triton_group(slot: Tensor, num_out: int) -> tuple[Tensor, Tensor]:
    from ..kernels import merge_tokens as kernels

    return kernels.group_slots(slot, num_out)


def _triton_merge(
    x: Tensor,
    slot: Tensor,
    order: Tensor,
    offsets: Tensor,
    size: Tensor | None,
    residual: Tensor | None,
    eps: float,
    head: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from ..kernels import merge_tokens as kernels

    residual, head = (None if rows is None else dense_rows(rows) for rows in (residual, head))
    return kernels.merge_tokens(dense_rows(x), order, offsets, size, residual, eps, head)


def _reference_merge(
    x: Tensor,
    slot: Tensor,
    order: Tensor,
    offsets: Tensor,
    size: Tensor | None,
    residual: Tensor | None,
    eps: float,
    head: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return reference.merge_tokens(x, slot, offsets.shape[1] - 1, size, residual, eps, head)


def _triton_merge_learned(
    x: Tensor,
    slot: Tensor,
    order: Tensor,
    offsets: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    eps: float,
    head: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels import merge_tokens as kernels

    residual, head = (None if rows is None else dense_rows(rows) for rows in (residual, head))
    return kernels.merge_tokens_learned(dense_rows(x), order, offsets, dense_rows(weight), bias, residual, eps, head)


def _reference_merge_learned(
    x: Tensor,
    slot: Tensor,
    order: Tensor,
    offsets: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    eps: float,
    head: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    size = reference.learned_sizes(x, weight, bias, slot, offsets.shape[1] - 1)
    return *_reference_merge(x, slot, order, offsets, size, residual, eps, head), size


def _triton_merge_norm(
    x: Tensor,
    slot: Tensor,
    order: Tensor,
    offsets: Tensor,
    size: Tensor | None,
    residual: Tensor | None,
    eps: float,
    head: Tensor | None,
    log_weight: Tensor | None,
    log_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from ..kernels import merge_tokens as kernels

    given = residual, head, log_weight, weight, bias
    residual, head, log_weight, weight, bias = (None if rows is None else dense_rows(rows) for rows in given)
    log_size, norm = (log_weight, log_bias), (weight, bias, norm_eps)
    return kernels.merge_tokens_norm(dense_rows(x), order, offsets, size, residual, eps, head, log_size, norm)


def _reference_merge_norm(
    x: Tensor,
    slot: Tensor,
    order: Tensor,
    offsets: Tensor,
    size: Tensor | None,
    residual: Tensor | None,
    eps: float,
    head: Tensor | None,
    log_weight: Tensor | None,
    log_bias: Tensor | None,
    *norm: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    learned = x.new_empty(x.shape[0], 0, dtype=reference.accumulator(x.dtype))
    if log_weight is not None and log_bias is not None:
        size = learned = reference.learned_sizes(x, log_weight, log_bias, slot, offsets.shape[1] - 1)
    merged, total = _reference_merge(x, slot, order, offsets, size, residual, eps, head)
    merged, normed, statistics = reference.with_norm(merged, *norm)
    return merged, total, learned, normed, statistics


def _triton_merge_backward(
    grad: Tensor, slot: Tensor, order: Tensor, offsets: Tensor, size: Tensor | None, total: Tensor, eps: float
) -> Tensor:
    from ..kernels import merge_tokens as kernels

    return kernels.spread_slots(dense_rows(grad), order, offsets, size, total, eps)


def _triton_merge_size_backward(
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
    from ..kernels import merge_tokens as kernels

    weight = None if weight is None else dense_rows(weight)
    rows = dense_rows(grad), dense_rows(x)
    return kernels.merge_tokens_size_backward(*rows, order, offsets, size, total, eps, weight)


def _triton_norm_backward(
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
    from ..kernels import merge_tokens as kernels

    norm = *dense_gradients(grad_out, grad_normed, merged, statistics, weight), affine
    x, log_weight = (None if given is None else dense_rows(given) for given in (x, log_weight))
    return kernels.merge_tokens_norm_backward(*norm, rows, head, x, order, offsets, size, total, eps, log_weight)


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


def _fake_norm_backward(
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
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, num_out, channels = merged.shape
    tokens, num_slots = slot.shape[1], total.shape[1]
    grad_size = total.new_empty(batch, 0 if x is None else tokens)
    grad_rows = merged.new_empty(batch, num_slots if rows else 0, channels)
    grad_head = merged.new_empty(batch, num_out - num_slots if head else 0, channels)
    sums = fake_sums(statistics, merged, affine)
    return merged.new_empty(batch, tokens, channels), grad_size, grad_rows, grad_head, sums


def _triton_unmerge(x: Tensor, slot: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    from ..kernels import merge_tokens as kernels

    return kernels.spread_slots(dense_rows(x), order, offsets)


def _triton_unmerge_backward(grad: Tensor, slot: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    from ..kernels import merge_tokens as kernels

    return kernels.sum_grouped(dense_rows(grad), order, offsets)


def _fake_group(slot: Tensor, num_out: int) -> tuple[Tensor, Tensor]:
    batch, tokens = slot.shape
    return slot.new_empty(batch, tokens, dtype=torch.int32), slot.new_empty(batch, num_out + 1, dtype=torch.int32)


def _fake_merge(
    x: Tensor,
    slot: Tensor,
    order: Tensor,
    offsets: Tensor,
    size: Tensor | None,
    residual: Tensor | None,
    eps: float,
    head: Tensor | None,
) -> tuple[Tensor, Tensor]:
    num_out = offsets.shape[1] - 1
    rows = num_out if head is None else head.shape[1] + num_out
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    merged = x.new_empty(x.shape[0], rows, x.shape[2], dtype=dtype)
    return merged, x.new_empty(x.shape[0], num_out, dtype=reference.accumulator(x.dtype))


def _fake_merge_learned(
    x: Tensor,
    slot: Tensor,
    order: Tensor,
    offsets: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    eps: float,
    head: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    merged, total = _fake_merge(x, slot, order, offsets, None, residual, eps, head)
    return merged, total, total.new_empty(slot.shape)


def _fake_merge_norm(
    x: Tensor,
    slot: Tensor,
    order: Tensor,
    offsets: Tensor,
    size: Tensor | None,
    residual: Tensor | None,
    eps: float,
    head: Tensor | None,
    log_weight: Tensor | None,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    merged, total = _fake_merge(x, slot, order, offsets, None, residual, eps, head)
    learned = total.new_empty(x.shape[0], 0) if log_weight is None else total.new_empty(slot.shape)
    merged, normed, statistics = fake_norm(merged)
    return merged, total, learned, normed, statistics


_group = register(
    "group_slots(Tensor slot, SymInt num_out) -> (Tensor, Tensor)",
    triton=_triton_group,
    reference=lambda slot, num_out: reference.group_slots(slot.contiguous(), num_out),  # a sort keeps the strides
    fake=_fake_group,
)
_merge = register(
    "merge_tokens(Tensor x, Tensor slot, Tensor order, Tensor offsets, Tensor? size, Tensor? residual, float eps,"
    " Tensor? head) -> (Tensor, Tensor)",
    triton=_triton_merge,
    reference=_reference_merge,
    fake=_fake_merge,
)
_merge_learned = register(
    "merge_tokens_learned(Tensor x, Tensor slot, Tensor order, Tensor offsets, Tensor weight, Tensor bias,"
    " Tensor? residual, float eps, Tensor? head) -> (Tensor, Tensor, Tensor)",
    triton=_triton_merge_learned,
    reference=_reference_merge_learned,
    fake=_fake_merge_learned,
)
_merge_norm = register(
    "merge_tokens_norm(Tensor x, Tensor slot, Tensor order, Tensor offsets, Tensor? size, Tensor? residual, float eps,"
    " Tensor? head, Tensor? log_weight, Tensor? log_bias, Tensor? weight, Tensor? bias, float norm_eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    triton=_triton_merge_norm,
    reference=_reference_merge_norm,
    fake=_fake_merge_norm,
)
_merge_backward = register(
    "merge_tokens_backward(Tensor grad, Tensor slot, Tensor order, Tensor offsets, Tensor? size, Tensor total,"
    " float eps) -> Tensor",
    triton=_triton_merge_backward,
    reference=lambda grad, slot, order, offsets, *others: reference.merge_tokens_backward(grad, slot, *others),
    fake=lambda grad, slot, *others: grad.new_empty(grad.shape[0], slot.shape[1], grad.shape[2]),
)
_merge_size_backward = register(
    "merge_tokens_size_backward(Tensor grad, Tensor x, Tensor slot, Tensor order, Tensor offsets, Tensor size,"
    " Tensor total, float eps, Tensor? weight) -> (Tensor, Tensor)",
    triton=_triton_merge_size_backward,
    reference=lambda grad, x, slot, order, offsets, *others: reference.merge_tokens_size_backward(
        grad, x, slot, *others
    ),
    fake=lambda grad, x, slot, order, offsets, size, total, *others: (
        grad.new_empty(grad.shape[0], slot.shape[1], grad.shape[2]),
        total.new_empty(slot.shape),
    ),
)
_norm_backward = register(
    "merge_tokens_norm_backward(Tensor? grad_out, Tensor grad_normed, Tensor merged, Tensor statistics, Tensor? weight,"
    " bool affine, bool rows, bool head, Tensor? x, Tensor slot, Tensor order, Tensor offsets, Tensor? size,"
    " Tensor total, float eps, Tensor? log_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    triton=_triton_norm_backward,
    reference=_reference_norm_backward,
    fake=_fake_norm_backward,
)
_unmerge = register(
    "unmerge_tokens(Tensor x, Tensor slot, Tensor order, Tensor offsets) -> Tensor",
    triton=_triton_unmerge,
    reference=lambda x, slot, order, offsets: reference.unmerge_tokens(x, slot),
    fake=lambda x, slot, order, offsets: x.new_empty(x.shape[0], slot.shape[1], x.shape[2]),
)
_unmerge_backward = register(
    "unmerge_tokens_backward(Tensor grad, Tensor slot, Tensor order, Tensor offsets) -> Tensor",
    triton=_triton_unmerge_backward,
    reference=lambda grad, slot, order, offsets: reference.sum_slots(grad, slot, offsets.shape[1] - 1),
    fake=lambda grad, slot, order, offsets: grad.new_empty(grad.shape[0], offsets.shape[1] - 1, grad.shape[2]),
)


class MergeTokens(torch.autograd.Function):
    """Gradient of x: every token gets its share size / total of its slot's gradient. Slots get none.

    With a layer, sizes are exp(log_weight . x + log_bias): their gradient goes on to the layer and, once more, x. With
    a norm_eps, the rows are also normalised.
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
        arguments = x, slot, order, offsets
        needs_x = ctx.needs_input_grad[4] or log_weight is not None
        extra: tuple[Tensor, ...] = ()
        if norm_eps is not None:
            options = size, residual, eps, head, log_weight, log_bias, weight, bias, norm_eps
            merged, total, learned, *extra = _merge_norm(*arguments, *options)
        elif log_weight is not None:
            merged, total, learned = _merge_learned(*arguments, log_weight, log_bias, residual, eps, head)
        else:
            merged, total = _merge(*arguments, size, residual, eps, head)
        if log_weight is not None:
            size = learned
        kept = (merged, extra[1], weight) if extra else ()
        ctx.save_for_backward(x if needs_x else None, slot, order, offsets, size, total, log_weight, *kept)
        save_norm(ctx, 10, weight, bias)
        ctx.eps = eps
        ctx.x_dtype = x.dtype
        ctx.log_bias_dtype = None if log_bias is None else log_bias.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.num_head = 0 if head is None else head.shape[1]
        ctx.mark_non_differentiable(total)
        return merged, total, *extra[:1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, slot, order, offsets, size, total, log_weight, *kept = ctx.saved_tensors
        grad, grad_normed = grads[0], grads[2] if kept else None
        if grad is None and grad_normed is None:
            return (None,) * 13
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
            exponent = grad_size * size
            dtype = torch.promote_types(x.dtype, log_weight.dtype)  # a layer in float32 wants its gradient so too
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


class UnmergeTokens(torch.autograd.Function):
    """Gradient: every slot gets the sum over its tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(slot, order, offsets)
        return _unmerge(x, slot, order, offsets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _unmerge_backward(grads[0], *ctx.saved_tensors), None, None, None


def _check_slot(slot: Tensor) -> None:
    check_shape("slot", slot, "B N")
    check_index("slot", slot)


def _check_merge(
    x: Tensor,
    slot: Tensor,
    num_out: int,
    size: Tensor | None,
    log_size: tuple[Tensor, Tensor] | None,
    residual: Tensor | None,
    eps: float,
    head: Tensor | None,
) -> list[Tensor]:
    """Raise if they do not fit together; returns those whose dtype and device decide about the backend."""
    check_shape("x", x, "B N C")
    check_floating("x", x)
    _check_slot(slot)
    check_same("x", x, "slot", slot)
    check_count("num_out", num_out, 1, 2**31 - 2)
    if shape_of(slot) != shape_of(x)[:2]:
        raise ValueError(f"slot must have shape {shape_of(x)[:2]}, got {shape_of(slot)}")
    if size is not None:
        check_same("x", x, "size", size)
        if shape_of(size) != shape_of(slot):
            raise ValueError(f"size must have shape {shape_of(slot)}, got {shape_of(size)}")
    if log_size is not None:
        if size is not None:
            raise ValueError("size and log_size exclude each other, got both")
        if not isinstance(log_size, tuple) or len(log_size) != 2:
            raise TypeError(f"log_size must be a pair of weight and bias, got {type(log_size).__name__}")
        for name, tensor, layout, shape in (
            ("weight", log_size[0], "1 C", (1, x.shape[2])),
            ("bias", log_size[1], "1", (1,)),
        ):
            check_shape(name, tensor, layout)
            check_floating(name, tensor)
            check_same("x", x, name, tensor)
            if shape_of(tensor) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {shape_of(tensor)}")
    if residual is not None:
        check_same("x", x, "residual", residual)
        expected = (x.shape[0], num_out, x.shape[2])
        if shape_of(residual) != expected:
            raise ValueError(f"residual must have shape {expected}, got {shape_of(residual)}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a number, got {eps!r}")
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps must be at least 0 and finite, got {eps}")
    if head is not None:
        check_shape("head", head, "B P C")
        check_same("x", x, "head", head, dtype=True)
        if (head.shape[0], head.shape[2]) != (x.shape[0], x.shape[2]):
            raise ValueError(f"head must have shape ({x.shape[0]}, P, {x.shape[2]}), got {shape_of(head)}")
    return [x, *(() if residual is None else (residual,)), *(log_size or ())]


def group_slots(slot: Tensor, num_out: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Group tokens by slot, for several :func:`merge_tokens` over the same slots.

    Args:
        slot: (B, N) int64 or int32, values -1 .. num_out - 1; -1 belongs nowhere.
        num_out: number of slots.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        order (B, N) and offsets (B, num_out + 1), int32: slot m holds the tokens
        ``order[b, offsets[b, m] : offsets[b, m + 1]]``, in ascending index.
    """
    _check_slot(slot)
    check_count("num_out", num_out, 1, 2**31 - 2)
    if resolve(backend, slot) == "reference":
        return reference.group_slots(slot, num_out)
    return _group(slot, num_out)


def prepare_merge(slot: Tensor, num_out: int, *, backend: str | None = None) -> tuple[Tensor, Tensor] | None:
    """What several :func:`merge_tokens` over one slot share: the groups for the kernels, None for the reference."""
    return None if resolve(backend, slot) == "reference" else group_slots(slot, num_out, backend=backend)


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Replace the tokens of every slot by their size-weighted mean, and add a residual (ToMe, section 3).

    ``merged[m] = sum(size[n] * x[n]) / (sum(size[n]) + eps) + residual[m]`` over the tokens n with ``slot[n] == m``.

    Args:
        x: (B, N, C) tokens. float32, float16, bfloat16 (reference: any); sums are float32.
        slot: (B, N) int64 or int32, values 0 .. num_out - 1, not checked. An empty slot gives zeros and size 0.
        num_out: number of slots.
        size: (B, N), the weights of the tokens, or None for ones: in ToMe how many patches each stands for, in TCFormer
            learned ones. Differentiable if it requires a gradient.
        log_size: in place of size, weight (1, C) and bias (1,) of a linear layer that gives its logarithm,
            ``size[n] = exp(weight @ x[n] + bias)``: the kernels compute it in the same launch, in float32.
        residual: (B, num_out, C) to be added, or None.
        groups: what :func:`group_slots` returned for this slot, to save that step; the reference does not need it.
        eps: added to what the sums are divided by, not to the sizes that are returned.
        head: (B, P, C) rows, in x's dtype, to be put in front of the merged ones as they are, or None.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        merged (B, P + num_out, C), differentiable in x, size, log_size, residual and head, and the new sizes
        (B, num_out), float32 (float64 for float64 x), which carry no gradient: the sums of the sizes. Of a slot whose
        greatest logarithm by log_size is above 40 it is the sum divided by ``exp(greatest - 40)``, as the sum itself
        may be beyond float32; the merged row is the mean all the same.

    Raises:
        ValueError: wrong shapes, devices that differ, ``num_out < 1``, an eps that is negative or not finite, both size
            and log_size.
        TypeError: x or log_size not floating point, log_size not a pair, slot not an integer tensor, head not in x's
            dtype, eps not a number.
    """
    tensors = _check_merge(x, slot, num_out, size, log_size, residual, eps, head)
    if resolve(backend, *tensors) == "reference":
        if log_size is not None:
            size = reference.learned_sizes(x, *log_size, slot, num_out)
        return reference.merge_tokens(x, slot, num_out, size, residual, eps, head)
    order, offsets = _group(slot, num_out) if groups is None else groups
    return MergeTokens.apply(x, slot, order, offsets, size, residual, float(eps), head, *(log_size or ()))


def merge_tokens_norm(
    x: Tensor,
    slot: Tensor,
    num_out: int,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    size: Tensor | None = None,
    log_size: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    groups: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    head: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`merge_tokens`, with its arguments, and the layer normalisation that follows it, in one pass over memory.

    Equivalent PyTorch::

        merged, size = merge_tokens(x, slot, num_out, size=size, residual=residual, head=head, ...)
        merged, size, F.layer_norm(merged, (C,), weight, bias, norm_eps)

    Args:
        x: (B, N, C) tokens.
        slot: (B, N) the slot of every token.
        num_out: number of slots.
        weight: (C,) what the normalised rows are multiplied with, of any floating dtype, or None for ones.
        bias: (C,) what is added to them, of any floating dtype, or None for zeros.
        norm_eps: added to the variance.
        size: (B, N) the weights of the tokens, or None for ones.
        log_size: weight (1, C) and bias (1,) of a layer that gives their logarithm, in place of size.
        residual: (B, num_out, C) to be added to the merged rows, or None.
        groups: what :func:`group_slots` returned for this slot.
        eps: added to what the sums are divided by.
        head: (B, P, C) rows to be put in front of the merged ones; they are normalised too.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        merged (B, P + num_out, C) and the new sizes (B, num_out) of :func:`merge_tokens`, and normed
        (B, P + num_out, C) in merged's dtype; the statistics are float32 and those of merged as it is stored.
        Differentiable in x, size, log_size, residual, head, weight and bias.

    Raises:
        ValueError: as in :func:`merge_tokens`; weight or bias of another shape, norm_eps negative or not finite.
        TypeError: as in :func:`merge_tokens`; weight or bias not floating point, norm_eps not a number.
    """
    tensors = _check_merge(x, slot, num_out, size, log_size, residual, eps, head)
    tensors += check_norm(x, weight, bias, norm_eps)
    if resolve(backend, *tensors) == "reference":
        if log_size is not None:
            size = reference.learned_sizes(x, *log_size, slot, num_out)
        merged, total = reference.merge_tokens(x, slot, num_out, size, residual, eps, head)
        return merged, total, reference.layer_norm(merged, weight, bias, norm_eps)
    order, offsets = _group(slot, num_out) if groups is None else groups
    arguments = x, slot, order, offsets, size, residual, float(eps), head, *(log_size or (None, None))
    return MergeTokens.apply(*arguments, weight, bias, float(norm_eps))


def unmerge_tokens(
    x: Tensor, slot: Tensor, *, groups: tuple[Tensor, Tensor] | None = None, backend: str | None = None
) -> Tensor:
    """Give every token the row of its slot, and zeros to those that were dropped.

    Equivalent PyTorch: ``x.gather(1, slot.unsqueeze(-1).expand(-1, -1, C))`` where no slot is -1.

    Args:
        x: (B, M, C) rows.
        slot: (B, N) int64 or int32, values -1 .. M - 1, not checked; -1 gives zeros.
        groups: what :func:`group_slots` returned for this slot and M slots, to save that step; the reference does not
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
    _check_slot(slot)
    check_same("x", x, "slot", slot)
    if slot.shape[0] != x.shape[0]:
        raise ValueError(f"slot must have x's batch size {x.shape[0]}, got shape {shape_of(slot)}")
    if resolve(backend, x) == "reference":
        return reference.unmerge_tokens(x, slot)
    order, offsets = _group(slot, x.shape[1]) if groups is None else groups
    return UnmergeTokens.apply(x, slot, order, offsets)
