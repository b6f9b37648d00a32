"""Segmented sums and means over tokens, without atomics: group by slot, then one program walks each slot."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import row_tile


@triton.jit
def _group(slot, order, offsets, start_i, tokens, num_out, slot_stride_n, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """Stable counting sort by ranks: BLOCK_I tokens of one image (and as many slot bounds) against all."""
    i = start_i + tl.arange(0, BLOCK_I)
    in_i = i < tokens
    slot_i = tl.load(slot + i * slot_stride_n, mask=in_i, other=0).to(tl.int32)
    before = tl.zeros((BLOCK_I, BLOCK_J), tl.int32)
    below = tl.zeros((BLOCK_I, BLOCK_J), tl.int32)
    for start in range(0, tokens, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        in_j = j < tokens
        slot_j = tl.load(slot + j * slot_stride_n, mask=in_j, other=0x7FFFFFFF).to(tl.int32)  # beyond every slot
        smaller = slot_j[None, :] < slot_i[:, None]
        tied = (slot_j[None, :] == slot_i[:, None]) & (j[None, :] < i[:, None])
        before += (smaller | tied).to(tl.int32)
        below += (slot_j[None, :] < i[:, None]).to(tl.int32)
    tl.store(order + tl.sum(before, 1), i, mask=in_i)
    tl.store(offsets + i, tl.sum(below, 1), mask=i <= num_out)


@triton.jit
def group_slots_kernel(
    slot,  # (B, N), -1 for tokens that belong nowhere
    order,  # (B, N) int32
    offsets,  # (B, M + 1) int32
    tokens,
    num_out,
    slot_stride_b,
    slot_stride_n,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One program ranks BLOCK_I tokens of one image."""
    batch = tl.program_id(1).to(tl.int64)
    slot += batch * slot_stride_b
    order += batch * tokens
    offsets += batch * (num_out + 1)
    _group(slot, order, offsets, tl.program_id(0) * BLOCK_I, tokens, num_out, slot_stride_n, BLOCK_I, BLOCK_J)


@triton.jit
def _dot(row, weight, channels, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of the whole row: every program that holds a chunk of it finds the same bits."""
    products = tl.zeros((BLOCK_C,), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        offsets_c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = offsets_c < channels
        value = tl.load(row + offsets_c, mask=mask, other=0.0).to(tl.float32)
        products += value * tl.load(weight + offsets_c, mask=mask, other=0.0).to(tl.float32)
    return tl.sum(products, 0)


@triton.jit
def reduce_slots_kernel(
    x,  # (B, N, C)
    size,  # (B, N) or None
    residual,  # (B, M, C) or None
    head,  # (B, P, C) or None: rows to put in front
    weight,  # (1, C) or None: the sizes are exp(weight . x + bias)
    bias,  # (1,) or None
    order,  # (B, N) int32
    offsets,  # (B, M + 1) int32
    out,  # (B, P + M, C), contiguous
    total,  # (B, M) float32 or None: then plain sums are wanted
    learned,  # (B, N) float32 or None: these sizes
    tokens,
    num_out,
    channels,
    x_stride_b,
    x_stride_n,
    size_stride_b,
    size_stride_n,
    residual_stride_b,
    residual_stride_m,
    head_stride_b,
    head_stride_p,
    EPS: tl.constexpr,
    HEAD: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program walks the tokens of one slot in index order: deterministic, no shared memory."""
    m = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    offsets_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = offsets_c < channels
    if HEAD > 0:  # noqa: SIM102 - only a condition of constants leaves the branch out
        if m >= num_out:  # the slots first: theirs is the longer work
            row = m - num_out
            copied = tl.load(head + batch * head_stride_b + row * head_stride_p + offsets_c, mask=mask, other=0.0)
            target = out + (batch * (HEAD + num_out) + row) * channels + offsets_c
            tl.store(target, copied.to(out.dtype.element_ty), mask=mask)
            return
    start = tl.load(offsets + batch * (num_out + 1) + m)
    end = tl.load(offsets + batch * (num_out + 1) + m + 1)
    acc = tl.zeros((BLOCK_C,), tl.float32)
    size_sum = 0.0
    for position in range(start, end):
        n = tl.load(order + batch * tokens + position).to(tl.int64)
        pointer = x + batch * x_stride_b + n * x_stride_n
        row = tl.load(pointer + offsets_c, mask=mask, other=0.0).to(tl.float32)
        size_n = 1.0
        if size is not None:
            size_n = tl.load(size + batch * size_stride_b + n * size_stride_n).to(tl.float32)
        if weight is not None:
            if CHUNKS == 1:  # the row is here; the weights, kept over the loop, would spill with Triton 3.6
                logarithm = tl.sum(row * tl.load(weight + offsets_c, mask=mask, other=0.0).to(tl.float32), 0)
            else:
                logarithm = _dot(pointer, weight, channels, CHUNKS, BLOCK_C)
            size_n = tl.exp(logarithm + tl.load(bias).to(tl.float32))
            if tl.program_id(2) == 0:
                tl.store(learned + batch * tokens + n, size_n)
        acc += size_n * row
        size_sum += size_n
    if total is not None:
        acc = acc / tl.maximum(size_sum + EPS if EPS > 0.0 else size_sum, 1e-30)
        if tl.program_id(2) == 0:
            tl.store(total + batch * num_out + m, size_sum)
    if residual is not None:
        acc += tl.load(
            residual + batch * residual_stride_b + m * residual_stride_m + offsets_c, mask=mask, other=0.0
        ).to(tl.float32)
    target = out + (batch * (HEAD + num_out) + HEAD + m) * channels + offsets_c
    tl.store(target, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def spread_slots_kernel(
    x,  # (B, M, C)
    slot,  # (B, N)
    size,  # (B, N) or None
    total,  # (B, M) float32 or None
    partner,  # (B, N, C) or None: rows to multiply with those of their slots
    out,  # (B, N, C), contiguous
    dots,  # (B, N, chunks of C) float32 or None: the products' sums
    tokens,
    num_slots,
    channels,
    x_stride_b,
    x_stride_m,
    slot_stride_b,
    slot_stride_n,
    size_stride_b,
    size_stride_n,
    partner_stride_b,
    partner_stride_n,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``out[n] = share[n] * x[slot[n]]``, zeros where the slot is -1; share = size / total, or 1 without totals."""
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offsets_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_rows = rows < tokens
    in_channels = offsets_c < channels
    source = tl.load(slot + batch * slot_stride_b + rows * slot_stride_n, mask=in_rows, other=-1).to(tl.int64)
    found = in_rows & (source >= 0)
    value = tl.load(
        x + batch * x_stride_b + source[:, None] * x_stride_m + offsets_c[None, :],
        mask=found[:, None] & in_channels[None, :],
        other=0.0,
    )
    if partner is not None:
        own = tl.load(
            partner + batch * partner_stride_b + rows[:, None].to(tl.int64) * partner_stride_n + offsets_c[None, :],
            mask=in_rows[:, None] & in_channels[None, :],
            other=0.0,
        )
        dot = tl.sum(value.to(tl.float32) * own.to(tl.float32), 1)
        tl.store(dots + (batch * tokens + rows) * tl.num_programs(2) + tl.program_id(2), dot, mask=in_rows)
    if total is not None:
        # Clamped as in the forward pass: a slot of size 0 gives its tokens no gradient.
        divisor = tl.load(total + batch * num_slots + source, mask=found, other=1.0)
        share = 1.0 / tl.maximum(divisor + EPS if EPS > 0.0 else divisor, 1e-30)
        if size is not None:
            weight = tl.load(size + batch * size_stride_b + rows * size_stride_n, mask=in_rows, other=0.0)
            share = share * weight.to(tl.float32)
        value = (value.to(tl.float32) * share[:, None]).to(out.dtype.element_ty)
    target = out + (batch * tokens + rows[:, None]) * channels + offsets_c[None, :]
    tl.store(target, value, mask=in_rows[:, None] & in_channels[None, :])


@triton.jit
def size_gradient_kernel(
    dots,  # (B, N, CHUNKS) float32: every token's row times its slot's gradient
    slot,  # (B, N)
    size,  # (B, N)
    total,  # (B, M) float32
    out,  # (B, N) float32, contiguous
    tokens,
    num_slots,
    slot_stride_b,
    slot_stride_n,
    size_stride_b,
    size_stride_n,
    EPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """What a token's dot differs by from the weighted mean of its slot's, over what the slot is divided by."""
    batch = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    in_i = i < tokens
    slot += batch * slot_stride_b
    size += batch * size_stride_b
    dots += batch * tokens * CHUNKS
    slot_i = tl.load(slot + i * slot_stride_n, mask=in_i, other=0).to(tl.int32)
    weighted = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    for start in range(0, tokens, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        in_j = j < tokens
        slot_j = tl.load(slot + j * slot_stride_n, mask=in_j, other=-1).to(tl.int32)
        dot_j = tl.zeros((BLOCK_J,), tl.float32)
        for chunk in tl.static_range(CHUNKS):
            dot_j += tl.load(dots + j * CHUNKS + chunk, mask=in_j, other=0.0)
        dot_j *= tl.load(size + j * size_stride_n, mask=in_j, other=0.0).to(tl.float32)
        weighted += tl.where(slot_j[None, :] == slot_i[:, None], dot_j[None, :], 0.0)
    divisor = tl.load(total + batch * num_slots + slot_i, mask=in_i, other=1.0)
    divisor = tl.maximum(divisor + EPS if EPS > 0.0 else divisor, 1e-30)
    dot_i = tl.zeros((BLOCK_I,), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        dot_i += tl.load(dots + i * CHUNKS + chunk, mask=in_i, other=0.0)
    tl.store(out + batch * tokens + i, (dot_i - tl.sum(weighted, 1) / divisor) / divisor, mask=in_i)


def group_slots(slot: torch.Tensor, num_out: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch; slot (B, N) -> order (B, N) and offsets (B, num_out + 1), both int32."""
    batch, tokens = slot.shape
    order = torch.empty(batch, tokens, dtype=torch.int32, device=slot.device)
    offsets = torch.empty(batch, num_out + 1, dtype=torch.int32, device=slot.device)
    if batch:
        grid = (triton.cdiv(max(tokens, num_out + 1), 32), batch)
        group_slots_kernel[grid](
            slot, order, offsets, tokens, num_out, *slot.stride(), BLOCK_I=32, BLOCK_J=64, num_warps=4
        )
    return order, offsets


def _reduce(x, size, residual, order, offsets, *, mean, eps=0.0, head=None, log_size=(None, None)):
    batch, tokens, channels = x.shape
    num_out = offsets.shape[1] - 1
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    first = 0 if head is None else head.shape[1]
    out = torch.empty(batch, first + num_out, channels, dtype=dtype, device=x.device)
    total = torch.empty(batch, num_out, dtype=torch.float32, device=x.device) if mean else None
    learned = None if log_size[0] is None else torch.empty(batch, tokens, dtype=torch.float32, device=x.device)
    if batch and num_out:
        tile = row_tile(channels)
        chunks = triton.cdiv(channels, tile.block_c)
        reduce_slots_kernel[(first + num_out, batch, chunks)](
            x,
            size,
            residual,
            head,
            *log_size,
            order,
            offsets,
            out,
            total,
            learned,
            tokens,
            num_out,
            channels,
            *x.stride()[:2],
            *((0, 0) if size is None else size.stride()),
            *((0, 0) if residual is None else residual.stride()[:2]),
            *((0, 0) if head is None else head.stride()[:2]),
            EPS=eps,
            HEAD=first,
            CHUNKS=chunks,
            BLOCK_C=tile.block_c,
            num_warps=max(1, tile.block_c // 256),  # 8 channels a thread: one 16-byte load of half precision
        )
    return out, total, learned


def sum_slots(x: torch.Tensor, slot: torch.Tensor, num_out: int) -> torch.Tensor:
    """Two launches; x (B, N, C), slot (B, N) -> (B, num_out, C), in x's dtype."""
    return _reduce(x, None, None, *group_slots(slot, num_out), mean=False)[0]


def merge_tokens(
    x: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    size: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float = 0.0,
    head: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch; x (B, N, C) grouped by order and offsets -> merged (B, P + M, C) and sizes (B, M) float32."""
    return _reduce(x, size, residual, order, offsets, mean=True, eps=eps, head=head)[:2]


def merge_tokens_learned(
    x: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float = 0.0,
    head: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch; weight (1, C) and bias (1,) -> as merge_tokens, and the sizes (B, N) float32 that they give."""
    return _reduce(x, None, residual, order, offsets, mean=True, eps=eps, head=head, log_size=(weight, bias))


def _spread(x, slot, size=None, total=None, eps=0.0, partner=None):
    batch, num_slots, channels = x.shape
    tokens = slot.shape[1]
    out = torch.empty(batch, tokens, channels, dtype=x.dtype, device=x.device)
    dots = None
    if out.numel():
        tile = row_tile(channels)
        chunks = triton.cdiv(channels, tile.block_c)
        if partner is not None:
            dots = torch.empty(batch, tokens, chunks, dtype=torch.float32, device=x.device)
        spread_slots_kernel[(triton.cdiv(tokens, tile.rows), batch, chunks)](
            x,
            slot,
            size,
            total,
            partner,
            out,
            dots,
            tokens,
            num_slots,
            channels,
            *x.stride()[:2],
            *slot.stride(),
            *((0, 0) if size is None else size.stride()),
            *((0, 0) if partner is None else partner.stride()[:2]),
            EPS=eps,
            ROWS=tile.rows,
            BLOCK_C=tile.block_c,
            num_warps=tile.num_warps if channels % 8 == 0 else 8,  # unaligned: every element its own address, 4 spill
        )
    return out, dots


def spread_slots(
    x: torch.Tensor,
    slot: torch.Tensor,
    size: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Launch; x (B, M, C), slot (B, N) -> (B, N, C)."""
    return _spread(x, slot, size, total, eps)[0]


def merge_tokens_size_backward(
    grad: torch.Tensor, x: torch.Tensor, slot: torch.Tensor, size: torch.Tensor, total: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two launches; grad (B, M, C), x (B, N, C) -> gradients of x (B, N, C) and of size (B, N) float32."""
    batch, tokens = slot.shape
    grad_x, dots = _spread(grad, slot, size, total, eps, x)
    grad_size = torch.empty(batch, tokens, dtype=torch.float32, device=x.device)
    if dots is None:  # no tokens, or no channels
        return grad_x, grad_size.zero_()
    size_gradient_kernel[(triton.cdiv(tokens, 32), batch)](
        dots,
        slot,
        size,
        total,
        grad_size,
        tokens,
        total.shape[1],
        *slot.stride(),
        *size.stride(),
        EPS=eps,
        CHUNKS=dots.shape[2],
        BLOCK_I=32,
        BLOCK_J=64,
        num_warps=4,
    )
    return grad_x, grad_size
