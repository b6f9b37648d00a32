"""Attention that every key receives, without the attention matrix: two launches.

Up to ``MAX_PARTS`` blocks of queries, the programs that normalise the rows also write the column sums of their block,
and a second launch adds these up. Up to 256 keys (64 in float32) a logit is computed once. Longer sequences would make
too many partial sums: there the second launch computes the logits again, one program for each block of keys.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ._direct import cdiv, direct, next_power_of_2
from ._launch import Tile, in_parts, strides
from ._rows import LOWEST, head_of, padded_head_dim, steps, unit_of

MAX_PARTS = 32  # at 2,048 tokens the partial sums are a third of a packed qkv in half precision


@functools.cache
def logit_tile(head_dim: int, dtype: torch.dtype, keys: int = 64) -> Tile:
    """Choose settings, found by compiling, that never spill for sm_80 and sm_90, head dimensions 16 to 256.

    One step takes all keys if a thread holds them in 64 accumulators; exact dots leave room for 16.
    """
    most = 64 if dtype == torch.float32 else 256
    block_n = max(next_power_of_2(keys), 16) if keys <= most else 64
    # Exact dots hold their operands in registers: 32 channels a step spill. Tensor cores take all channels.
    block_d = 16 if dtype == torch.float32 else padded_head_dim(head_dim)
    return Tile(BLOCK_M=64, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=8, num_stages=2)


@triton.jit
def _dots(
    own_rows,  # (BLOCK_OWN, 1) pointers
    own,  # (BLOCK_OWN, BLOCK_D) first channels of own_rows
    other_rows,  # (BLOCK_OTHER, 1) pointers
    D: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return dot products (BLOCK_OWN, BLOCK_OTHER); if one step takes all channels, ``own`` holds them."""
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


@direct
@triton.jit
def row_softmax_kernel(
    q,  # (B, H, M, D)
    k,  # (B, H, N, D)
    logsumexp,  # (B, H, M) float32, contiguous, or None with parts
    parts,  # (B, H, P, W) float32, contiguous, W >= N, or None
    scale,
    queries,
    keys,
    width,
    q_strides,
    k_strides,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum the attention of BLOCK_M queries of one head to every key in each program, or store their logsumexp.

    Grid (blocks of queries, heads, images).
    """
    part = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    row = batch * tl.num_programs(1) + head
    offsets_m = part * BLOCK_M + tl.arange(0, BLOCK_M)
    offsets_d = tl.arange(0, BLOCK_D)
    in_m = offsets_m < queries
    # Rows past the end repeat the last one, and are ignored: a mask for them would cost registers.
    q_rows = head_of(q, batch, head, q_strides, UNIT)
    q_rows = q_rows + steps(tl.minimum(offsets_m, queries - 1), q_strides[2], UNIT)
    query = tl.load(q_rows + offsets_d[None, :], mask=(offsets_d < D)[None, :], other=0.0)
    k_rows = head_of(k, batch, head, k_strides, UNIT)
    if parts is not None:
        received = parts + (row * tl.num_programs(0) + part) * width
    if ONE_TILE:
        offsets_n = tl.arange(0, BLOCK_N)
        in_n = offsets_n < keys
        rows = k_rows + steps(tl.minimum(offsets_n, keys - 1), k_strides[2], UNIT)
        logits = _dots(q_rows, query, rows, D, BLOCK_M, BLOCK_N, BLOCK_D) * scale
        logits = tl.where(in_n[None, :], logits, float("-inf"))
        maximum = tl.max(logits, 1)
        weights = tl.exp(logits - maximum[:, None])
        total = tl.sum(weights, 1)
        inverse = tl.where(in_m, 1.0 / total, 0.0)
        tl.store(received + offsets_n, tl.sum(weights * inverse[:, None], 0), mask=offsets_n < width)
    else:
        running_max = tl.full((BLOCK_M,), LOWEST, tl.float32)
        running_sum = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, keys, BLOCK_N):
            offsets_n = start + tl.arange(0, BLOCK_N)
            rows = k_rows + steps(tl.minimum(offsets_n, keys - 1), k_strides[2], UNIT)
            logits = _dots(q_rows, query, rows, D, BLOCK_M, BLOCK_N, BLOCK_D) * scale
            logits = tl.where((offsets_n < keys)[None, :], logits, float("-inf"))
            new_max = tl.maximum(running_max, tl.max(logits, 1))
            running_sum = running_sum * tl.exp(running_max - new_max)
            running_sum += tl.sum(tl.exp(logits - new_max[:, None]), 1)
            running_max = new_max
        lse = running_max + tl.log(running_sum)
        if logsumexp is not None:
            tl.store(logsumexp + row * queries + offsets_m, lse, mask=in_m)
        if parts is not None:
            lse = tl.where(in_m, lse, float("inf"))
            for start in range(0, keys, BLOCK_N):
                offsets_n = start + tl.arange(0, BLOCK_N)
                rows = k_rows + steps(tl.minimum(offsets_n, keys - 1), k_strides[2], UNIT)
                logits = _dots(q_rows, query, rows, D, BLOCK_M, BLOCK_N, BLOCK_D) * scale
                tl.store(received + offsets_n, tl.sum(tl.exp(logits - lse[:, None]), 0), mask=offsets_n < width)


@direct
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
    """Sum the parts of BLOCK_N keys over heads and blocks of queries in each program; grid (key blocks, images)."""
    batch = tl.program_id(1).to(tl.int64)
    offsets_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sources = parts + batch * num_parts * width + offsets_n[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, num_parts, BLOCK_P):
        offsets_p = start + tl.arange(0, BLOCK_P)
        mask = (offsets_p < num_parts)[:, None] & (offsets_n < width)[None, :]
        total += tl.load(sources + offsets_p.to(tl.int64)[:, None] * width, mask=mask, other=0.0)
    tl.store(scores + batch * keys + offsets_n, tl.sum(total, 0), mask=offsets_n < keys)


@direct
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
    q_strides,
    k_strides,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum the attention to BLOCK_N keys over heads and queries in each program; grid (blocks of keys, images)."""
    batch = tl.program_id(1).to(tl.int64)
    offsets_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets_d = tl.arange(0, BLOCK_D)
    row_n = steps(tl.minimum(offsets_n, keys - 1), k_strides[2], UNIT)
    k_rows = k + tl.multiple_of(batch * k_strides[0], UNIT) + row_n
    q_head = q + tl.multiple_of(batch * q_strides[0], UNIT)
    lse_head = logsumexp + batch * heads * queries
    received = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    next_key = tl.multiple_of(tl.cast(k_strides[1], tl.int64), UNIT)
    next_query = tl.multiple_of(tl.cast(q_strides[1], tl.int64), UNIT)
    for _ in range(heads):
        key = tl.load(k_rows + offsets_d[None, :], mask=(offsets_d < D)[None, :], other=0.0)
        for start in range(0, queries, BLOCK_M):
            offsets_m = start + tl.arange(0, BLOCK_M)
            rows = q_head + steps(tl.minimum(offsets_m, queries - 1), q_strides[2], UNIT)
            lse = tl.load(lse_head + offsets_m, mask=offsets_m < queries, other=float("inf"))
            logits = _dots(k_rows, key, rows, D, BLOCK_N, BLOCK_M, BLOCK_D) * scale
            received += tl.exp(logits - lse[None, :])
        k_rows += next_key
        q_head += next_query
        lse_head += queries
    tl.store(scores + batch * keys + offsets_n, tl.sum(received, 1), mask=offsets_n < keys)


@in_parts("q", "k")
def received_scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Launch twice; q (B, H, M, D), k (B, H, N, D), dense last axes -> scores (B, N)."""
    batch, heads, keys, head_dim = k.shape
    queries = q.shape[2]
    scores = torch.empty(batch, keys, dtype=torch.float32, device=k.device)
    if batch == 0 or queries == 0:
        return scores.zero_()
    tile = logit_tile(head_dim, q.dtype, keys)
    num_parts = cdiv(queries, tile["BLOCK_M"])
    with_parts = num_parts <= MAX_PARTS
    width = 16 * cdiv(keys, 16)  # aligned rows: wide loads
    logsumexp = parts = None
    if with_parts:
        parts = torch.empty(batch, heads, num_parts, width, dtype=torch.float32, device=k.device)
    else:
        logsumexp = torch.empty(batch, heads, queries, dtype=torch.float32, device=k.device)
    # Blocks of queries vary fastest, so that neighbouring programs read the same keys.
    row_softmax_kernel[(num_parts, heads, batch)](
        *(q, k, logsumexp),
        *(parts, scale, queries, keys, width),
        *(strides(q, 3), strides(k, 3)),
        D=head_dim,
        UNIT=unit_of(q, k),
        ONE_TILE=with_parts and keys <= tile["BLOCK_N"],
        **tile,
    )
    if with_parts:
        sum_parts_kernel[(cdiv(keys, 64), batch)](
            parts, scores, heads * num_parts, keys, width, BLOCK_P=16, BLOCK_N=64, num_warps=4
        )
        return scores
    tile = logit_tile(head_dim, q.dtype)
    column_sum_kernel[(cdiv(keys, tile["BLOCK_N"]), batch)](
        *(q, k, logsumexp, scores),
        *(scale, heads, queries, keys),
        *(strides(q, 3), strides(k, 3)),
        D=head_dim,
        UNIT=unit_of(q, k),
        **tile,
    )
    return scores
