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

__all__ = ["group_slots", "merge_tokens", "prepare_merge", "unmerge_tokens"]


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
    size = reference.learned_sizes(x, weight, bias)
    return *_reference_merge(x, slot, order, offsets, size, residual, eps, head), size


def _triton_merge_backward(grad: Tensor, slot: Tensor, size: Tensor | None, total: Tensor, eps: float) -> Tensor:
    from ..kernels import merge_tokens as kernels

    return kernels.spread_slots(dense_rows(grad), slot, size, total, eps)


def _triton_merge_size_backward(
    grad: Tensor, x: Tensor, slot: Tensor, size: Tensor, total: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from ..kernels import merge_tokens as kernels

    return kernels.merge_tokens_size_backward(dense_rows(grad), dense_rows(x), slot, size, total, eps)


def _triton_unmerge(x: Tensor, slot: Tensor) -> Tensor:
    from ..kernels import merge_tokens as kernels

    return kernels.spread_slots(dense_rows(x), slot)


def _triton_unmerge_backward(grad: Tensor, slot: Tensor, num_slots: int) -> Tensor:
    from ..kernels import merge_tokens as kernels

    return kernels.sum_slots(dense_rows(grad), slot, num_slots)


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
_merge_backward = register(
    "merge_tokens_backward(Tensor grad, Tensor slot, Tensor? size, Tensor total, float eps) -> Tensor",
    triton=_triton_merge_backward,
    reference=reference.merge_tokens_backward,
    fake=lambda grad, slot, size, total, eps: grad.new_empty(grad.shape[0], slot.shape[1], grad.shape[2]),
)
_merge_size_backward = register(
    "merge_tokens_size_backward(Tensor grad, Tensor x, Tensor slot, Tensor size, Tensor total, float eps)"
    " -> (Tensor, Tensor)",
    triton=_triton_merge_size_backward,
    reference=reference.merge_tokens_size_backward,
    fake=lambda grad, x, slot, size, total, eps: (
        grad.new_empty(grad.shape[0], slot.shape[1], grad.shape[2]),
        total.new_empty(slot.shape),
    ),
)
_unmerge = register(
    "unmerge_tokens(Tensor x, Tensor slot) -> Tensor",
    triton=_triton_unmerge,
    reference=reference.unmerge_tokens,
    fake=lambda x, slot: x.new_empty(x.shape[0], slot.shape[1], x.shape[2]),
)
_unmerge_backward = register(
    "unmerge_tokens_backward(Tensor grad, Tensor slot, SymInt num_slots) -> Tensor",
    triton=_triton_unmerge_backward,
    reference=reference.sum_slots,
    fake=lambda grad, slot, num_slots: grad.new_empty(grad.shape[0], num_slots, grad.shape[2]),
)


def _added_gradients(ctx: Any, grad: Tensor, residual: int, head: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradient of the merged rows, and those of residual and head, the inputs at these places, if wanted."""
    merged = grad[:, ctx.num_head :] if ctx.num_head else grad
    return (
        merged,
        merged.to(ctx.residual_dtype) if ctx.needs_input_grad[residual] else None,
        grad[:, : ctx.num_head].to(ctx.x_dtype) if ctx.needs_input_grad[head] else None,
    )


class MergeTokens(torch.autograd.Function):
    """Gradient of x: every token gets its share size / total of its slot's gradient. Slots get none."""

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
    ) -> tuple[Tensor, Tensor]:
        merged, total = _merge(x, slot, order, offsets, size, residual, eps, head)
        ctx.save_for_backward(slot, size, total, x if ctx.needs_input_grad[4] else None)
        ctx.eps = eps
        ctx.x_dtype = x.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.num_head = 0 if head is None else head.shape[1]
        ctx.mark_non_differentiable(total)
        ctx.set_materialize_grads(False)  # no zeros for what has no gradient
        return merged, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 8
        slot, size, total, x = ctx.saved_tensors
        grad_x = grad_size = None
        grad, grad_residual, grad_head = _added_gradients(ctx, grads[0], residual=5, head=7)
        if ctx.needs_input_grad[4]:
            grad_x, grad_size = _merge_size_backward(grad, x, slot, size, total, ctx.eps)
            grad_x, grad_size = grad_x.to(ctx.x_dtype), grad_size.to(size.dtype)
        elif ctx.needs_input_grad[0]:
            grad_x = _merge_backward(grad, slot, size, total, ctx.eps).to(ctx.x_dtype)
        return grad_x, None, None, None, grad_size, grad_residual, None, grad_head


class MergeLearned(torch.autograd.Function):
    """As MergeTokens for sizes exp(weight . x + bias): their gradient goes on to weight, bias and, once more, x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        slot: Tensor,
        order: Tensor,
        offsets: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        eps: float,
        head: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        merged, total, size = _merge_learned(x, slot, order, offsets, weight, bias, residual, eps, head)
        ctx.save_for_backward(x, slot, size, total, weight)
        ctx.eps = eps
        ctx.x_dtype, ctx.bias_dtype = x.dtype, bias.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.num_head = 0 if head is None else head.shape[1]
        ctx.mark_non_differentiable(total)
        ctx.set_materialize_grads(False)  # no zeros for what has no gradient
        return merged, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 9
        x, slot, size, total, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        grad, grad_residual, grad_head = _added_gradients(ctx, grads[0], residual=6, head=8)
        if any(ctx.needs_input_grad[index] for index in (0, 4, 5)):
            grad_x, grad_size = _merge_size_backward(grad, x, slot, size, total, ctx.eps)
            exponent = grad_size * size
            grad_x = torch.addcmul(grad_x.to(x.dtype), exponent.to(x.dtype).unsqueeze(-1), weight.to(x.dtype))
            dtype = torch.promote_types(x.dtype, weight.dtype)  # a layer in float32 wants its gradient so too
            products = torch.bmm(exponent.to(dtype).unsqueeze(1), x.to(dtype))
            grad_weight = products.sum(0, dtype=exponent.dtype).to(weight.dtype)
            grad_bias = exponent.sum().view(1).to(ctx.bias_dtype)
        return grad_x, None, None, None, grad_weight, grad_bias, grad_residual, None, grad_head


class UnmergeTokens(torch.autograd.Function):
    """Gradient: every slot gets the sum over its tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        ctx.num_slots = x.shape[1]
        return _unmerge(x, slot)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _unmerge_backward(grads[0], ctx.saved_tensors[0], ctx.num_slots), None


def _check_slot(slot: Tensor) -> None:
    check_shape("slot", slot, "B N")
    check_index("slot", slot)


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
        (B, num_out), float32 (float64 for float64 x), which carry no gradient.

    Raises:
        ValueError: wrong shapes, devices that differ, ``num_out < 1``, an eps that is negative or not finite, both size
            and log_size.
        TypeError: x or log_size not floating point, log_size not a pair, slot not an integer tensor, head not in x's
            dtype, eps not a number.
    """
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
    if resolve(backend, x, *(() if residual is None else (residual,)), *(log_size or ())) == "reference":
        if log_size is not None:
            size = reference.learned_sizes(x, *log_size)
        return reference.merge_tokens(x, slot, num_out, size, residual, eps, head)
    order, offsets = _group(slot, num_out) if groups is None else groups
    if log_size is not None:
        return MergeLearned.apply(x, slot, order, offsets, *log_size, residual, float(eps), head)
    return MergeTokens.apply(x, slot, order, offsets, size, residual, float(eps), head)


def unmerge_tokens(x: Tensor, slot: Tensor, *, backend: str | None = None) -> Tensor:
    """Give every token the row of its slot, and zeros to those that were dropped.

    Equivalent PyTorch: ``x.gather(1, slot.unsqueeze(-1).expand(-1, -1, C))`` where no slot is -1.

    Args:
        x: (B, M, C) rows.
        slot: (B, N) int64 or int32, values -1 .. M - 1, not checked; -1 gives zeros.
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
    return UnmergeTokens.apply(x, slot)
