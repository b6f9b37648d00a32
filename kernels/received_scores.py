"""Attention that every key receives, without the attention matrix: two launches forward, two backward.

Up to ``MAX_PARTS`` blocks of queries, the programs that normalise the rows also leave the column sums of their block,
and a second launch adds these up: parallel over heads, images and blocks of queries. Up to 256 keys (64 in float32) a
logit is computed once. Longer sequences would make too many partial sums: the second launch computes the logits again,
one program for every block of keys.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from ._launch import in_parts
from ._rows import head_of, steps, unit_of

LOWEST = tl.constexpr(-3.4e38)  # a finite stand-in for -inf: the difference of two of them is not NaN
MAX_PARTS = 32  # the partial sums of 2,048 tokens are a third of a packed qkv of half precision


@dataclasses.dataclass(frozen=True)
class LogitTile:
    """Rows that a program owns, rows that it walks over, and channels of one step of a dot product."""

    block_own: int
    block_other: int
    block_d: int
    num_warps: int
    num_stages: int


def logit_tile(block_own: int, block_other: int, head_dim: int, dtype: torch.dtype) -> LogitTile:
    """Found by compiling: settings that never spill for sm_80 and sm_90, head dimensions 16 to 256."""
    # Exact dots hold their operands in registers: 32 channels a step spill. Tensor cores take all, and 16 at least.
    block_d = 16 if dtype == torch.float32 else max(triton.next_power_of_2(head_dim), 16)
    return LogitTile(block_own, block_other, block_d, num_warps=8, num_stages=2)


def row_tile(keys: int, head_dim: int, dtype: torch.dtype) -> LogitTile:
    """All keys in one step where 64 accumulators a thread hold them; exact dots leave room for 16."""
    most = 64 if dtype == torch.float32 else 256
    block_other = max(triton.next_power_of_2(keys), 16) if keys <= most else 64
    return logit_tile(64, block_other, head_dim, dtype)


def column_tile(head_dim: int, dtype: torch.dtype) -> LogitTile:
    """16 partial sums a thread."""
    return logit_tile(64, 64, head_dim, dtype)


def gradient_tile(head_dim: int, dtype: torch.dtype) -> LogitTile:
    """The accumulator of a gradient takes up to 32 registers a thread; 64 rows spill at some head dimensions.

    Of float32 whose last 16 channels are not all there, 32 of the other rows spill a few words too.
    """
    short = dtype == torch.float32 and head_dim > 64 and head_dim % 16 != 0
    return logit_tile(32, 16 if short else 32, head_dim, dtype)


@triton.jit
def _dots(
    own_rows,  # (BLOCK_OWN, 1) pointers
    own,  # (BLOCK_OWN, BLOCK_D) the first channels of these rows
    other_rows,  # (BLOCK_OTHER, 1) pointers
    D: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(BLOCK_OWN, BLOCK_OTHER) dot products; where one step takes all channels, ``own`` holds them already."""
    offsets_d = tl.arange(0, BLOCK_D)
    dots = tl.zeros((BLOCK_OWN, BLOCK_OTHER), tl.float32)
    if BLOCK_D >= D:
        other = tl.load(other_rows + offsets_d[None, :], mask=(offsets_d < D)[None, :], other=0.0)
        dots = tl.dot(own, tl.trans(other), dots, input_precision="ieee")
    else:
        for start_d in range(0, D, BLOCK_D):
            in_d = (start_d + offsets_d < D)[None, :]
            a = tl.load(own_rows + start_d + offsets_d[None, :], mask=in_d, other=0.0)
            b = tl.load(other_rows + start_d + offsets_d[None, :], mask=in_d, other=0.0)
            dots = tl.dot(a, tl.trans(b), dots, input_precision="ieee")
    return dots


@triton.jit
def row_softmax_kernel(
    q,  # (B, H, M, D)
    k,  # (B, H, N, D)
    logsumexp,  # (B, H, M) float32, contiguous
    parts,  # (B, H, P, W) float32, contiguous, W >= N
    scale,
    queries,
    keys,
    width,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    WITH_PARTS: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_M queries of one head. The logsumexp of each, and what every key receives from them all."""
    part = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    row = batch * tl.num_programs(1) + head
    offsets_m = part * BLOCK_M + tl.arange(0, BLOCK_M)
    offsets_d = tl.arange(0, BLOCK_D)
    in_m = offsets_m < queries
    # Rows past the end repeat the last one, and are ignored: a mask of their own costs registers.
    q_rows = head_of(q, batch, head, q_stride_b, q_stride_h, UNIT)
    q_rows = q_rows + steps(tl.minimum(offsets_m, queries - 1), q_stride_m, UNIT)
    query = tl.load(q_rows + offsets_d[None, :], mask=(offsets_d < D)[None, :], other=0.0)
    k_rows = head_of(k, batch, head, k_stride_b, k_stride_h, UNIT)
    received = parts + (row * tl.num_programs(0) + part) * width
    if ONE_TILE:
        offsets_n = tl.arange(0, BLOCK_N)
        in_n = offsets_n < keys
        rows = k_rows + steps(tl.minimum(offsets_n, keys - 1), k_stride_n, UNIT)
        logits = _dots(q_rows, query, rows, D, BLOCK_M, BLOCK_N, BLOCK_D) * scale
        logits = tl.where(in_n[None, :], logits, float("-inf"))
        maximum = tl.max(logits, 1)
        weights = tl.exp(logits - maximum[:, None])
        total = tl.sum(weights, 1)
        tl.store(logsumexp + row * queries + offsets_m, maximum + tl.log(total), mask=in_m)
        inverse = tl.where(in_m, 1.0 / total, 0.0)
        tl.store(received + offsets_n, tl.sum(weights * inverse[:, None], 0), mask=offsets_n < width)
    else:
        running_max = tl.full((BLOCK_M,), LOWEST, tl.float32)
        running_sum = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, keys, BLOCK_N):
            offsets_n = start + tl.arange(0, BLOCK_N)
            rows = k_rows + steps(tl.minimum(offsets_n, keys - 1), k_stride_n, UNIT)
            logits = _dots(q_rows, query, rows, D, BLOCK_M, BLOCK_N, BLOCK_D) * scale
            logits = tl.where((offsets_n < keys)[None, :], logits, float("-inf"))
            new_max = tl.maximum(running_max, tl.max(logits, 1))
            running_sum = running_sum * tl.exp(running_max - new_max)
            running_sum += tl.sum(tl.exp(logits - new_max[:, None]), 1)
            running_max = new_max
        lse = running_max + tl.log(running_sum)
        tl.store(logsumexp + row * queries + offsets_m, lse, mask=in_m)
        if WITH_PARTS:
            lse = tl.where(in_m, lse, float("inf"))
            for start in range(0, keys, BLOCK_N):
                offsets_n = start + tl.arange(0, BLOCK_N)
                rows = k_rows + steps(tl.minimum(offsets_n, keys - 1), k_stride_n, UNIT)
                logits = _dots(q_rows, query, rows, D, BLOCK_M, BLOCK_N, BLOCK_D) * scale
                tl.store(received + offsets_n, tl.sum(tl.exp(logits - lse[:, None]), 0), mask=offsets_n < width)


@triton.jit
def sum_parts_kernel(
    parts,  # (B, P, W) float32, contiguous, W >= N
    scores,  # (B, N) float32, contiguous
    num_parts,
    keys,
    width,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_N keys of one image, over heads and blocks of queries."""
    batch = tl.program_id(1).to(tl.int64)
    offsets_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sources = parts + batch * num_parts * width + offsets_n[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, num_parts, BLOCK_P):
        offsets_p = start + tl.arange(0, BLOCK_P)
        mask = (offsets_p < num_parts)[:, None] & (offsets_n < width)[None, :]
        total += tl.load(sources + offsets_p.to(tl.int64)[:, None] * width, mask=mask, other=0.0)
    tl.store(scores + batch * keys + offsets_n, tl.sum(total, 0), mask=offsets_n < keys)


@triton.jit
def column_sum_kernel(
    q,  # (B, H, M, D)
    k,  # (B, H, N, D)
    logsumexp,  # (B, H, M) float32, contiguous
    scores,  # (B, N) float32, contiguous
    scale,
    heads,
    queries,
    keys,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_N keys of one image, over heads and queries."""
    batch = tl.program_id(1).to(tl.int64)
    offsets_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets_d = tl.arange(0, BLOCK_D)
    row_n = steps(tl.minimum(offsets_n, keys - 1), k_stride_n, UNIT)
    k_rows = k + tl.multiple_of(batch * k_stride_b, UNIT) + row_n
    q_head = q + tl.multiple_of(batch * q_stride_b, UNIT)
    lse_head = logsumexp + batch * heads * queries
    received = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    next_key = tl.multiple_of(tl.cast(k_stride_h, tl.int64), UNIT)
    next_query = tl.multiple_of(tl.cast(q_stride_h, tl.int64), UNIT)
    for _ in range(heads):
        key = tl.load(k_rows + offsets_d[None, :], mask=(offsets_d < D)[None, :], other=0.0)
        for start in range(0, queries, BLOCK_M):
            offsets_m = start + tl.arange(0, BLOCK_M)
            rows = q_head + steps(tl.minimum(offsets_m, queries - 1), q_stride_m, UNIT)
            lse = tl.load(lse_head + offsets_m, mask=offsets_m < queries, other=float("inf"))
            logits = _dots(k_rows, key, rows, D, BLOCK_N, BLOCK_M, BLOCK_D) * scale
            received += tl.exp(logits - lse[None, :])
        k_rows += next_key
        q_head += next_query
        lse_head += queries
    tl.store(scores + batch * keys + offsets_n, tl.sum(received, 1), mask=offsets_n < keys)


@triton.jit
def grad_q_kernel(
    grad,  # (B, N)
    q,  # (B, H, M, D)
    k,  # (B, H, N, D)
    logsumexp,  # (B, H, M) float32, contiguous
    mean,  # (B, H, M) float32, contiguous
    grad_q,  # (B, M, H, D), contiguous
    scale,
    queries,
    keys,
    grad_stride_b,
    grad_stride_n,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALL_D: tl.constexpr,
):
    """One program: BLOCK_M queries of one head. First the mean of the upstream gradient under their attention."""
    head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    offsets_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offsets_d = tl.arange(0, BLOCK_D)
    channels = tl.arange(0, ALL_D)
    in_m = offsets_m < queries
    q_rows = head_of(q, batch, head, q_stride_b, q_stride_h, UNIT)
    q_rows = q_rows + steps(tl.minimum(offsets_m, queries - 1), q_stride_m, UNIT)
    query = tl.load(q_rows + offsets_d[None, :], mask=(offsets_d < D)[None, :], other=0.0)
    k_rows = head_of(k, batch, head, k_stride_b, k_stride_h, UNIT)
    saved = (batch * heads + head) * queries + offsets_m
    lse = tl.load(logsumexp + saved, mask=in_m, other=float("inf"))[:, None]
    upstream = grad + batch * grad_stride_b

    weighted = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, keys, BLOCK_N):
        offsets_n = start + tl.arange(0, BLOCK_N)
        rows = k_rows + steps(tl.minimum(offsets_n, keys - 1), k_stride_n, UNIT)
        slope = tl.load(upstream + offsets_n.to(tl.int64) * grad_stride_n, mask=offsets_n < keys, other=0.0)
        attention = tl.exp(_dots(q_rows, query, rows, D, BLOCK_M, BLOCK_N, BLOCK_D) * scale - lse)
        weighted += tl.sum(attention * slope.to(tl.float32)[None, :], 1)
    tl.store(mean + saved, weighted, mask=in_m)

    acc = tl.zeros((BLOCK_M, ALL_D), tl.float32)
    for start in range(0, keys, BLOCK_N):
        offsets_n = start + tl.arange(0, BLOCK_N)
        in_n = offsets_n < keys
        rows = k_rows + steps(tl.minimum(offsets_n, keys - 1), k_stride_n, UNIT)
        slope = tl.load(upstream + offsets_n.to(tl.int64) * grad_stride_n, mask=in_n, other=0.0)
        attention = tl.exp(_dots(q_rows, query, rows, D, BLOCK_M, BLOCK_N, BLOCK_D) * scale - lse)
        grad_logits = attention * (slope.to(tl.float32)[None, :] - weighted[:, None])
        grad_logits = tl.where(in_n[None, :], grad_logits, 0.0)
        key = tl.load(rows + channels[None, :], mask=(channels < D)[None, :], other=0.0)
        acc = tl.dot(grad_logits, key.to(tl.float32), acc, input_precision=PRECISION)
    target = ((batch * queries + offsets_m[:, None]) * heads + head) * D + channels[None, :]
    mask = in_m[:, None] & (channels < D)[None, :]
    tl.store(grad_q + target, (acc * scale).to(grad_q.dtype.element_ty), mask=mask)


@triton.jit
def grad_k_kernel(
    grad,  # (B, N)
    q,  # (B, H, M, D)
    k,  # (B, H, N, D)
    logsumexp,  # (B, H, M) float32, contiguous
    mean,  # (B, H, M) float32, contiguous
    grad_k,  # (B, N, H, D), contiguous
    scale,
    queries,
    keys,
    grad_stride_b,
    grad_stride_n,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALL_D: tl.constexpr,
):
    """One program: BLOCK_N keys of one head, over the queries."""
    head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    offsets_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets_d = tl.arange(0, BLOCK_D)
    channels = tl.arange(0, ALL_D)
    in_n = offsets_n < keys
    k_rows = head_of(k, batch, head, k_stride_b, k_stride_h, UNIT)
    k_rows = k_rows + steps(tl.minimum(offsets_n, keys - 1), k_stride_n, UNIT)
    key = tl.load(k_rows + offsets_d[None, :], mask=(offsets_d < D)[None, :], other=0.0)
    q_rows = head_of(q, batch, head, q_stride_b, q_stride_h, UNIT)
    slope = tl.load(grad + batch * grad_stride_b + offsets_n.to(tl.int64) * grad_stride_n, mask=in_n, other=0.0)
    slope = slope.to(tl.float32)[:, None]

    acc = tl.zeros((BLOCK_N, ALL_D), tl.float32)
    for start in range(0, queries, BLOCK_M):
        offsets_m = start + tl.arange(0, BLOCK_M)
        in_m = offsets_m < queries
        rows = q_rows + steps(tl.minimum(offsets_m, queries - 1), q_stride_m, UNIT)
        saved = (batch * heads + head) * queries + offsets_m
        lse = tl.load(logsumexp + saved, mask=in_m, other=float("inf"))
        weighted = tl.load(mean + saved, mask=in_m, other=0.0)
        attention = tl.exp(_dots(k_rows, key, rows, D, BLOCK_N, BLOCK_M, BLOCK_D) * scale - lse[None, :])
        grad_logits = attention * (slope - weighted[None, :])
        query = tl.load(rows + channels[None, :], mask=(channels < D)[None, :], other=0.0)
        acc = tl.dot(grad_logits, query.to(tl.float32), acc, input_precision=PRECISION)
    target = ((batch * keys + offsets_n[:, None]) * heads + head) * D + channels[None, :]
    mask = in_n[:, None] & (channels < D)[None, :]
    tl.store(grad_k + target, (acc * scale).to(grad_k.dtype.element_ty), mask=mask)


@in_parts("q", "k")
def received_scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two launches; q (B, H, M, D), k (B, H, N, D), dense last axes -> scores (B, N), logsumexp (B, H, M)."""
    batch, heads, keys, head_dim = k.shape
    queries = q.shape[2]
    scores = torch.empty(batch, keys, dtype=torch.float32, device=k.device)
    logsumexp = torch.empty(batch, heads, queries, dtype=torch.float32, device=k.device)
    if logsumexp.numel() == 0:
        return scores.zero_(), logsumexp
    tile = row_tile(keys, head_dim, q.dtype)
    num_parts = triton.cdiv(queries, tile.block_own)
    with_parts = num_parts <= MAX_PARTS
    width = 16 * triton.cdiv(keys, 16)  # aligned rows: wide loads
    parts = torch.empty(batch, heads, num_parts if with_parts else 0, width, dtype=torch.float32, device=k.device)
    # Blocks of queries vary fastest: neighbouring programs read the same keys.
    row_softmax_kernel[(num_parts, heads, batch)](
        q,
        k,
        logsumexp,
        parts,
        scale,
        queries,
        keys,
        width,
        *q.stride()[:3],
        *k.stride()[:3],
        D=head_dim,
        UNIT=unit_of(q, k),
        WITH_PARTS=with_parts,
        ONE_TILE=with_parts and keys <= tile.block_other,
        BLOCK_M=tile.block_own,
        BLOCK_N=tile.block_other,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if with_parts:
        sum_parts_kernel[(triton.cdiv(keys, 64), batch)](
            parts, scores, heads * num_parts, keys, width, BLOCK_P=16, BLOCK_N=64, num_warps=4
        )
        return scores, logsumexp
    tile = column_tile(head_dim, q.dtype)
    column_sum_kernel[(triton.cdiv(keys, tile.block_own), batch)](
        q,
        k,
        logsumexp,
        scores,
        scale,
        heads,
        queries,
        keys,
        *q.stride()[:3],
        *k.stride()[:3],
        D=head_dim,
        UNIT=unit_of(q, k),
        BLOCK_N=tile.block_own,
        BLOCK_M=tile.block_other,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return scores, logsumexp


@in_parts("grad", "q", "k", "logsumexp")
def received_scores_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, logsumexp: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two launches; grad (B, N) of any strides -> gradients of q (B, H, M, D) and of k (B, H, N, D)."""
    batch, heads, keys, head_dim = k.shape
    queries = q.shape[2]
    grad_q = torch.empty(batch, queries, heads, head_dim, dtype=q.dtype, device=q.device)
    grad_k = torch.empty(batch, keys, heads, head_dim, dtype=k.dtype, device=k.device)
    if logsumexp.numel() == 0:
        return grad_q.transpose(1, 2), grad_k.zero_().transpose(1, 2)
    mean = torch.empty_like(logsumexp)
    tile = gradient_tile(head_dim, q.dtype)
    shape = (scale, queries, keys, *grad.stride(), *q.stride()[:3], *k.stride()[:3])
    settings = {
        "D": head_dim,
        "UNIT": unit_of(q, k),
        # Half precision would lose small gradients on the way; the ten bits of tf32 keep float32's range.
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "BLOCK_D": tile.block_d,
        "ALL_D": max(triton.next_power_of_2(head_dim), 16),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    grad_q_kernel[(triton.cdiv(queries, tile.block_own), heads, batch)](
        grad, q, k, logsumexp, mean, grad_q, *shape, BLOCK_M=tile.block_own, BLOCK_N=tile.block_other, **settings
    )
    grad_k_kernel[(triton.cdiv(keys, tile.block_own), heads, batch)](
        grad, q, k, logsumexp, mean, grad_k, *shape, BLOCK_M=tile.block_other, BLOCK_N=tile.block_own, **settings
    )
    return grad_q.transpose(1, 2), grad_k.transpose(1, 2)
