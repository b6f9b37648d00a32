"""Sums and means over the tokens of each slot, and back. Tokens are grouped by slot, so no atomics are needed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._direct import cdiv, direct, next_power_of_2
from ._launch import in_parts, row_warps, strides
from ._norm import (
    SUMMED_ROWS,
    _norm_gradient,
    _store_normed,
    _store_sums,
    _vector,
    added_up,
    backward_tile,
    empty_sums,
    normed_like,
)
from .slots import group_slots

# Slots that a program sums at a time, and that share the loaded weights of a layer or norm. With 4, the weights are a
# tenth of the traffic; more would wait for the largest slot. Two slots of wider rows spill on sm_80.
SHARING_SLOTS = 4
SHARING_CHANNELS = 1024
# The greatest logarithm of a size. In a slot with a greater one, all sizes are divided by one number that brings it to
# this, so no exponential overflows. The mean is the same in float32, as eps vanishes beside e^40.
MAX_LOG_SIZE = tl.constexpr(40.0)


@direct
@triton.jit
def reduce_slots_kernel(
    x,  # (B, N, C)
    size,  # (B, N) or None
    residual,  # (B, M, C) or None
    head,  # (B, P, C) or None: rows that go in front
    log_weight,  # (1, C) or None: the sizes are exp(log_weight . x + log_bias), see MAX_LOG_SIZE
    log_bias,  # (1,) or None
    order,  # (B, N) int32
    offsets,  # (B, M + 1) int32
    out,  # (B, P + M, C), contiguous
    total,  # (B, M) float32: sizes of the slots; None for plain sums
    learned,  # (B, N) float32 or None: the sizes of the tokens by this layer
    weight,  # (C,) or None: of the norm
    bias,  # (C,) or None
    normed,  # (B, P + M, C), contiguous, or None
    statistics,  # (B, P + M, 2) float32 or None
    tokens,
    num_out,
    channels,
    x_strides,
    size_strides,
    residual_strides,
    head_strides,
    EPS: tl.constexpr,
    NORM_EPS: tl.constexpr,
    HEAD: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum or average the tokens of SLOTS slots, each in index order, in each program.

    Grid (blocks of slots, then blocks of head rows; images).
    """
    batch = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * SLOTS
    m = first + tl.arange(0, SLOTS)
    offsets_c = tl.arange(0, BLOCK_C)
    in_channels = offsets_c < channels
    if HEAD > 0:  # noqa: SIM102 - only a condition of constants leaves the branch out
        if first >= num_out:  # slots come first, since they take longer
            row = m.to(tl.int64) - tl.cdiv(num_out, SLOTS) * SLOTS
            in_rows = row < HEAD
            mask = in_rows[:, None] & in_channels[None, :]
            source = head + batch * head_strides[0] + row[:, None] * head_strides[1] + offsets_c[None, :]
            copied = tl.load(source, mask=mask, other=0.0).to(out.dtype.element_ty)
            row += batch * (HEAD + num_out)
            tl.store(out + row[:, None] * channels + offsets_c[None, :], copied, mask=mask)
            if normed is not None:
                _store_normed(
                    copied, mask, row, in_rows, offsets_c, weight, bias, normed, statistics, channels, NORM_EPS
                )
            return
    in_slots = m < num_out
    mask = in_slots[:, None] & in_channels[None, :]
    start = tl.load(offsets + batch * (num_out + 1) + m, mask=in_slots, other=0)
    count = tl.load(offsets + batch * (num_out + 1) + m + 1, mask=in_slots, other=0) - start
    if log_weight is not None:
        direction = tl.load(log_weight + offsets_c, mask=in_channels, other=0.0).to(tl.float32)
        constant = tl.load(log_bias).to(tl.float32)
        shift = tl.zeros((SLOTS,), tl.float32)  # taken off the logarithms of a slot that would overflow
    acc = tl.zeros((SLOTS, BLOCK_C), tl.float32)
    size_sum = tl.zeros((SLOTS,), tl.float32)
    for step in range(tl.max(count, 0)):
        active = step < count
        n = tl.load(order + batch * tokens + start + step, mask=active, other=0).to(tl.int64)
        source = x + batch * x_strides[0] + n[:, None] * x_strides[1] + offsets_c[None, :]
        row = tl.load(source, mask=active[:, None] & in_channels[None, :], other=0.0).to(tl.float32)
        size_n = active.to(tl.float32)
        if size is not None:
            size_n = tl.load(size + batch * size_strides[0] + n * size_strides[1], mask=active, other=0.0).to(
                tl.float32
            )
        if log_weight is not None:
            score = tl.sum(row * direction[None, :], 1) + constant
            new_shift = tl.where(active, tl.maximum(shift, score - MAX_LOG_SIZE), shift)
            rescale = tl.exp(shift - new_shift)
            acc *= rescale[:, None]
            size_sum *= rescale
            shift = new_shift
            size_n = tl.where(active, tl.exp(score - shift), 0.0)
            tl.store(learned + batch * tokens + n, size_n, mask=active)
        acc += size_n[:, None] * row
        size_sum += size_n
    if log_weight is not None:  # noqa: SIM102 - only a condition of constants leaves the branch out
        if tl.max(shift, 0) > 0.0:  # correct sizes that were stored before the greatest one was known
            for step in range(tl.max(count, 0)):
                active = step < count
                n = tl.load(order + batch * tokens + start + step, mask=active, other=0).to(tl.int64)
                source = x + batch * x_strides[0] + n[:, None] * x_strides[1] + offsets_c[None, :]
                row = tl.load(source, mask=active[:, None] & in_channels[None, :], other=0.0).to(tl.float32)
                score = tl.sum(row * direction[None, :], 1) + constant
                tl.store(learned + batch * tokens + n, tl.exp(score - shift), mask=active)
    if total is not None:
        acc = acc / tl.maximum(size_sum + EPS if EPS > 0.0 else size_sum, 1e-30)[:, None]
        tl.store(total + batch * num_out + m, size_sum, mask=in_slots)
    if residual is not None:
        source = residual + batch * residual_strides[0] + m.to(tl.int64)[:, None] * residual_strides[1]
        acc += tl.load(source + offsets_c[None, :], mask=mask, other=0.0).to(tl.float32)
    stored = acc.to(out.dtype.element_ty)
    row = batch * (HEAD + num_out) + HEAD + m
    tl.store(out + row[:, None] * channels + offsets_c[None, :], stored, mask=mask)
    if normed is not None:
        _store_normed(stored, mask, row, in_slots, offsets_c, weight, bias, normed, statistics, channels, NORM_EPS)


@triton.jit
def _drop(
    order,
    offsets,
    out,
    grad_size,
    batch,
    tokens,
    num_slots,
    channels,
    offsets_c,
    SLOTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write zeros for tokens of no slot; the programs of an image share these tokens."""
    order += batch * tokens
    nothing = tl.zeros((SLOTS, BLOCK_C), tl.float32).to(out.dtype.element_ty)
    dropped = tl.load(offsets + batch * (num_slots + 1))
    for start in range(tl.program_id(0) * SLOTS, dropped, tl.num_programs(0) * SLOTS):
        position = start + tl.arange(0, SLOTS)
        active = position < dropped
        n = tl.load(order + position, mask=active, other=0).to(tl.int64) + batch * tokens
        mask = active[:, None] & (offsets_c < channels)[None, :]
        tl.store(out + n[:, None] * channels + offsets_c[None, :], nothing, mask=mask)
        if grad_size is not None:
            tl.store(grad_size + n, tl.zeros((SLOTS,), tl.float32), mask=active)


@triton.jit
def _spread(
    row,  # (SLOTS, BLOCK_C): the rows of slots m
    m,
    in_slots,
    order,
    offsets,
    size,
    total,
    partner,
    log_weight,
    direction,  # (BLOCK_C,): log_weight
    out,
    dots,
    grad_size,
    batch,
    tokens,
    num_slots,
    channels,
    offsets_c,
    size_strides,
    partner_strides,
    EPS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Store ``out[n] = share[n] * row[m]`` for the tokens of slots m; share = size / total, or 1 without totals.

    The gradient of a size is its token's dot less the weighted mean of the dots, divided by the slot's divisor.
    """
    in_channels = offsets_c < channels
    order += batch * tokens
    offsets += batch * (num_slots + 1)
    out += batch * tokens * channels
    if partner is not None:
        partner += batch * partner_strides[0]
        dots += batch * tokens
        grad_size += batch * tokens
    if size is not None:
        size += batch * size_strides[0]
    start = tl.load(offsets + m, mask=in_slots, other=0)
    count = tl.load(offsets + m + 1, mask=in_slots, other=0) - start
    most = tl.max(count, 0)
    if total is not None:
        # Clamped as in the forward pass, so that a slot of size 0 gives its tokens no gradient.
        divisor = tl.load(total + batch * num_slots + m, mask=in_slots, other=1.0)
        share = 1.0 / tl.maximum(divisor + EPS if EPS > 0.0 else divisor, 1e-30)
    if partner is not None:
        weighted = tl.zeros((SLOTS,), tl.float32)
        for step in range(most):
            active = step < count
            n = tl.load(order + start + step, mask=active, other=0).to(tl.int64)
            source = partner + n[:, None] * partner_strides[1] + offsets_c[None, :]
            own = tl.load(source, mask=active[:, None] & in_channels[None, :], other=0.0)
            dot = tl.sum(own.to(tl.float32) * row.to(tl.float32), 1)
            tl.store(dots + n, dot, mask=active)
            weighted += dot * tl.load(size + n * size_strides[1], mask=active, other=0.0).to(tl.float32)
        mean = weighted * share
        tl.debug_barrier()  # all threads load dots that one thread stored
    for step in range(most):
        active = step < count
        n = tl.load(order + start + step, mask=active, other=0).to(tl.int64)
        value = row
        if total is not None:
            size_n = tl.full((SLOTS,), 1.0, tl.float32)
            if size is not None:
                size_n = tl.load(size + n * size_strides[1], mask=active, other=0.0).to(tl.float32)
            result = row.to(tl.float32) * (share * size_n)[:, None]
            if partner is not None:
                gradient = (tl.load(dots + n, mask=active, other=0.0) - mean) * share
                tl.store(grad_size + n, gradient, mask=active)
                if log_weight is not None:
                    result += (gradient * size_n)[:, None] * direction[None, :]
            value = result.to(out.dtype.element_ty)
        mask = active[:, None] & in_channels[None, :]
        tl.store(out + n[:, None] * channels + offsets_c[None, :], value, mask=mask)


@direct
@triton.jit
def spread_slots_kernel(
    x,  # (B, M, C)
    order,  # (B, N) int32
    offsets,  # (B, M + 1) int32
    size,  # (B, N) or None
    total,  # (B, M) float32 or None
    partner,  # (B, N, C) or None: the merged tokens, where sizes get a gradient
    log_weight,  # (1, C) or None: the sizes were exp(log_weight . partner + constant)
    out,  # (B, N, C), contiguous
    dots,  # (B, N) float32 or None: dot of every token with its slot's row, read back below
    grad_size,  # (B, N) float32 or None
    tokens,
    num_slots,
    channels,
    x_strides,
    size_strides,
    partner_strides,
    EPS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Spread the rows of SLOTS slots to their tokens in each program; grid (blocks of slots, images)."""
    batch = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    in_slots = m < num_slots
    offsets_c = tl.arange(0, BLOCK_C)
    _drop(order, offsets, out, grad_size, batch, tokens, num_slots, channels, offsets_c, SLOTS, BLOCK_C)
    source = x + batch * x_strides[0] + m.to(tl.int64)[:, None] * x_strides[1] + offsets_c[None, :]
    row = tl.load(source, mask=in_slots[:, None] & (offsets_c < channels)[None, :], other=0.0)
    _spread(
        *(row, m, in_slots, order, offsets, size, total, partner, log_weight),
        *(_vector(log_weight, offsets_c, channels, 0.0, BLOCK_C), out, dots, grad_size, batch, tokens, num_slots),
        *(channels, offsets_c, size_strides, partner_strides, EPS, SLOTS),
    )


@direct
@triton.jit
def merge_tokens_norm_backward_kernel(
    grad_out,  # (B, P + M, C) or None
    grad_normed,  # (B, P + M, C)
    merged,  # (B, P + M, C), contiguous
    statistics,  # (B, P + M, 2) float32, contiguous
    weight,  # (C,) or None
    order,  # (B, N) int32
    offsets,  # (B, M + 1) int32
    size,  # (B, N) or None
    total,  # (B, M) float32
    partner,  # (B, N, C) or None: the merged tokens, where sizes get a gradient
    log_weight,  # (1, C) or None
    grad_x,  # (B, N, C), contiguous
    dots,  # (B, N) float32 or None
    grad_size,  # (B, N) float32 or None
    grad_rows,  # (B, M, C), contiguous, or None
    grad_head,  # (B, P, C), contiguous, or None
    sums,  # (programs, 2, C) float32 or None: shares of the gradients of weight and bias
    tokens,
    num_slots,
    channels,
    out_strides,
    normed_strides,
    size_strides,
    partner_strides,
    EPS: tl.constexpr,
    HEAD: tl.constexpr,
    SUMMED: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Differentiate SUMMED merged rows, SLOTS at a time, and spread them to their tokens; grid (row blocks, images)."""
    batch = tl.program_id(1).to(tl.int64)
    offsets_c = tl.arange(0, BLOCK_C)
    in_channels = offsets_c < channels
    _drop(order, offsets, grad_x, grad_size, batch, tokens, num_slots, channels, offsets_c, SLOTS, BLOCK_C)
    factor = _vector(weight, offsets_c, channels, 1.0, BLOCK_C)
    direction = _vector(log_weight, offsets_c, channels, 0.0, BLOCK_C)
    weight_sum = tl.zeros((SLOTS, BLOCK_C), tl.float32)
    bias_sum = tl.zeros((SLOTS, BLOCK_C), tl.float32)
    first = tl.program_id(0) * SUMMED
    last = tl.minimum(first + SUMMED, HEAD + num_slots)
    for begin in tl.range(first, last, SLOTS, disable_licm=True):  # hoisted addresses would spill
        row = (begin + tl.arange(0, SLOTS)).to(tl.int64)
        in_rows = row < HEAD + num_slots
        gradient, weight_part, bias_part = _norm_gradient(
            *(grad_out, grad_normed, merged, statistics, factor, batch, row, in_rows, offsets_c, HEAD + num_slots),
            *(channels, out_strides, normed_strides),
        )
        weight_sum += weight_part
        bias_sum += bias_part
        m = row - HEAD
        in_slots = in_rows & (m >= 0)
        if grad_head is not None:
            target = grad_head + (batch * HEAD + row)[:, None] * channels + offsets_c[None, :]
            mask = (row < HEAD)[:, None] & in_channels[None, :]
            tl.store(target, gradient.to(grad_head.dtype.element_ty), mask=mask)
        if grad_rows is not None:
            target = grad_rows + (batch * num_slots + m)[:, None] * channels + offsets_c[None, :]
            mask = in_slots[:, None] & in_channels[None, :]
            tl.store(target, gradient.to(grad_rows.dtype.element_ty), mask=mask)
        _spread(
            *(gradient, m, in_slots, order, offsets, size, total, partner, log_weight, direction, grad_x, dots),
            *(grad_size, batch, tokens, num_slots, channels, offsets_c, size_strides, partner_strides, EPS, SLOTS),
        )
    if sums is not None:
        program = batch * tl.num_programs(0) + tl.program_id(0)
        _store_sums(sums, program, weight_sum, bias_sum, offsets_c, channels)


def _side_by_side(block_c, *shared):
    sharing = block_c <= SHARING_CHANNELS and any(weights is not None for weights in shared)
    return SHARING_SLOTS if sharing else 1


def _reduce(
    x, size, residual, order, offsets, *, mean, eps=0.0, head=None, log_size=(None, None), norm=(None, None, None)
):
    batch, tokens, channels = x.shape
    num_out = offsets.shape[1] - 1
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    rows = 0 if head is None else head.shape[1]
    out = torch.empty(batch, rows + num_out, channels, dtype=dtype, device=x.device)
    total = torch.empty(batch, num_out, dtype=torch.float32, device=x.device) if mean else None
    weight, bias, norm_eps = norm
    learned = None if log_size[0] is None else torch.empty(batch, tokens, dtype=torch.float32, device=x.device)
    normed, statistics = (None, None) if norm_eps is None else normed_like(out)
    if batch and num_out and channels:
        block_c = next_power_of_2(channels)
        slots = _side_by_side(block_c, log_size[0], weight, bias)
        reduce_slots_kernel[(cdiv(num_out, slots) + cdiv(rows, slots), batch)](
            *(x, size, residual, head, *log_size, order, offsets, out, total, learned, weight, bias, normed),
            statistics,
            *(tokens, num_out, channels),
            *(strides(x, 2), strides(size, 2), strides(residual, 2), strides(head, 2)),
            EPS=eps,
            NORM_EPS=norm_eps,
            HEAD=rows,
            SLOTS=slots,
            BLOCK_C=block_c,
            num_warps=slots * row_warps(block_c),
        )
    return out, total, normed, statistics, learned


@in_parts("x", "order", "offsets")
def sum_grouped(x: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Launch once; x (B, N, C) grouped by order and offsets -> (B, M, C), in x's dtype."""
    return _reduce(x, None, None, order, offsets, mean=False)[0]


@in_parts("x", "slot")
def sum_slots(x: torch.Tensor, slot: torch.Tensor, num_out: int) -> torch.Tensor:
    """Launch twice; x (B, N, C), slot (B, N) -> (B, num_out, C), in x's dtype."""
    return sum_grouped(x, *group_slots(slot, num_out))


@in_parts("x", "order", "offsets", "size", "residual", "head")
def merge_tokens(
    x: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    size: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float = 0.0,
    head: torch.Tensor | None = None,
    log_weight: torch.Tensor | None = None,
    log_bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    norm_eps: float | None = None,
) -> tuple[torch.Tensor, ...]:
    """Launch once; x (B, N, C) grouped by order and offsets -> merged (B, P + M, C) and sizes (B, M) float32.

    With a norm_eps also normed (B, P + M, C) and statistics (B, P + M, 2). With log_weight (1, C) and log_bias (1,)
    also the sizes of the tokens (B, N) float32.
    """
    options = {"mean": True, "eps": eps, "head": head, "log_size": (log_weight, log_bias)}
    found = _reduce(x, size, residual, order, offsets, norm=(weight, bias, norm_eps), **options)
    return tuple(one for one in found if one is not None)


def _size_gradients(x, tokens, partner):
    """Allocate the gradients of the sizes and the kernel's dots, if the sizes get gradients."""
    if partner is None:
        return None, None
    # The returned part comes first, since torch.compile assumes that results of operators are aligned.
    return torch.empty(2, x.shape[0], tokens, dtype=torch.float32, device=x.device)


def _launch_spread(x, order, offsets, size=None, total=None, eps=0.0, partner=None, log_weight=None):
    batch, num_slots, channels = x.shape
    tokens = order.shape[1]
    out = torch.empty(batch, tokens, channels, dtype=x.dtype, device=x.device)
    grad_size, dots = _size_gradients(x, tokens, partner)
    if not (out.numel() and num_slots):
        return out.zero_(), None if grad_size is None else grad_size.zero_()
    block_c = next_power_of_2(channels)
    slots = _side_by_side(block_c, log_weight)
    spread_slots_kernel[(cdiv(num_slots, slots), batch)](
        *(x, order, offsets, size, total, partner, log_weight, out, dots, grad_size),
        *(tokens, num_slots, channels),
        *(strides(x, 2), strides(size, 2), strides(partner, 2)),
        EPS=eps,
        SLOTS=slots,
        BLOCK_C=block_c,
        num_warps=slots * row_warps(block_c),
    )
    return out, grad_size


@in_parts("x", "order", "offsets", "size", "total")
def spread_slots(
    x: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    size: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Launch once; x (B, M, C), N tokens grouped by order and offsets -> (B, N, C)."""
    return _launch_spread(x, order, offsets, size, total, eps)[0]


@in_parts("grad", "x", "order", "offsets", "size", "total")
def merge_tokens_size_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    size: torch.Tensor,
    total: torch.Tensor,
    eps: float,
    weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch once; grad (B, M, C), x (B, N, C) -> gradients of x (B, N, C) and of size (B, N) float32.

    With the weight (1, C) of the layer that gave the sizes, the gradient of x includes the part through the layer.
    """
    return _launch_spread(grad, order, offsets, size, total, eps, x, weight)


@in_parts("grad_normed", "grad_out", "merged", "statistics", "x", "order", "offsets", "size", "total", added=(4,))
def merge_tokens_norm_backward(
    grad_out: torch.Tensor | None,
    grad_normed: torch.Tensor,
    merged: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    affine: bool,
    rows: bool,
    head: bool,
    x: torch.Tensor | None,
    order: torch.Tensor,
    offsets: torch.Tensor,
    size: torch.Tensor | None,
    total: torch.Tensor,
    eps: float,
    log_weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch -> gradients of x (B, N, C), size (B, N) float32, merged rows (B, M, C), head (B, P, C), weight and bias.

    Without x, rows or head, these results have no rows. A sum gives the last one, (2, C) float32; (0, C) if not affine.
    """
    batch, num_out, channels = merged.shape
    tokens, num_slots = order.shape[1], offsets.shape[1] - 1
    num_head = num_out - num_slots
    grad_x = merged.new_empty(batch, tokens, channels)
    grad_rows = merged.new_empty(batch, num_slots if rows else 0, channels)
    grad_head = merged.new_empty(batch, num_head if head else 0, channels)
    grad_size, dots = _size_gradients(merged, tokens, x)
    tile = backward_tile(channels)
    programs = cdiv(num_out, SUMMED_ROWS)
    sums = empty_sums(merged, batch * programs, affine)
    if merged.numel():
        merge_tokens_norm_backward_kernel[(programs, batch)](
            *(grad_out, grad_normed, merged, statistics, weight, order, offsets, size, total, x, log_weight, grad_x),
            *(dots, grad_size, grad_rows if rows else None, grad_head if head else None, sums),
            *(tokens, num_slots, channels),
            *(strides(grad_out, 2), strides(grad_normed, 2), strides(size, 2), strides(x, 2)),
            EPS=eps,
            HEAD=num_head,
            SUMMED=SUMMED_ROWS,
            SLOTS=tile["ROWS"],
            BLOCK_C=tile["BLOCK_C"],
            num_warps=tile["num_warps"],
        )
    elif grad_size is not None:
        grad_size.zero_()
    return (
        grad_x,
        total.new_empty(batch, 0) if grad_size is None else grad_size,
        grad_rows,
        grad_head,
        added_up(merged, sums),
    )
