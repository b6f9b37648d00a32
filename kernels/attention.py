"""Attention in tiles: no matrix of queries by keys in memory, forward or backward.

Launches: forward 1, backward 2; with a policy 2 (the mean of the values first) and 3 (its gradient summed over heads).
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4e38)  # a finite stand-in for -inf: the difference of two of them is not NaN


@dataclasses.dataclass(frozen=True)
class AttentionTile:
    """Rows that a program owns, rows of the other side at a time, and warps."""

    own: int
    step: int
    num_warps: int


@dataclasses.dataclass(frozen=True)
class AttentionTiles:
    """The three passes: over the keys for the result, over the keys for q, over the queries for k and v."""

    forward: AttentionTile
    grad_queries: AttentionTile
    grad_keys: AttentionTile


# By the padded head dimension, found by compiling: nothing spills for sm_80 and sm_90, with and without a policy.
HALF_TILES = {
    64: AttentionTiles(AttentionTile(64, 64, 4), AttentionTile(64, 32, 4), AttentionTile(64, 32, 4)),
    128: AttentionTiles(AttentionTile(128, 32, 8), AttentionTile(64, 32, 8), AttentionTile(32, 64, 8)),
    256: AttentionTiles(AttentionTile(64, 32, 8), AttentionTile(32, 32, 8), AttentionTile(32, 64, 8)),
}
# Rows that are not aligned to 16 bytes take an address for every element.
UNALIGNED_TILES = {64: AttentionTile(32, 16, 4), 128: AttentionTile(32, 16, 4), 256: AttentionTile(32, 16, 8)}
# Exact dots hold their operands in registers.
FLOAT_TILES = {64: AttentionTile(32, 16, 8), 128: AttentionTile(32, 16, 8), 256: AttentionTile(16, 16, 8)}


def padded_head_dim(head_dim: int) -> int:
    """A power of two, and the least that tensor cores take."""
    return max(16, triton.next_power_of_2(head_dim))


def attention_tiles(head_dim: int, dtype: torch.dtype, aligned: bool) -> AttentionTiles:
    """The tiles of a head dimension up to 256."""
    width = max(64, padded_head_dim(head_dim))
    if aligned and dtype != torch.float32:
        return HALF_TILES[width]
    tile = (FLOAT_TILES if dtype == torch.float32 else UNALIGNED_TILES)[width]
    return AttentionTiles(tile, tile, tile)


def _tiles(*tensors: torch.Tensor) -> AttentionTiles:
    first = tensors[0]
    return attention_tiles(first.shape[-1], first.dtype, all(tensor.stride(2) % 8 == 0 for tensor in tensors))


@dataclasses.dataclass(frozen=True)
class ColumnTile:
    """Rows and columns of one step of a sum over rows."""

    rows: int
    columns: int
    num_warps: int


def mean_tile(head_dim: int) -> ColumnTile:
    """8,192 elements a step, 64 a thread: few programs, so that each must keep many loads in flight."""
    columns = padded_head_dim(head_dim)
    return ColumnTile(rows=8192 // columns, columns=columns, num_warps=4)


@triton.jit
def mean_values_kernel(
    v,  # (B, H, N, D)
    mean,  # (B, H, D) float32, contiguous
    heads,
    keys,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: one head of one image."""
    head = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    offsets_n = tl.arange(0, BLOCK_N)
    offsets_d = tl.arange(0, BLOCK_D)
    in_d = offsets_d < D
    values = v + batch * v_stride_b + head.to(tl.int64) * v_stride_h + offsets_d[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, keys, BLOCK_N):
        rows = start + offsets_n
        mask = (rows < keys)[:, None] & in_d[None, :]
        acc += tl.load(values + rows.to(tl.int64)[:, None] * v_stride_n, mask=mask, other=0.0).to(tl.float32)
    tl.store(mean + (batch * heads + head) * D + offsets_d, tl.sum(acc, 0) / keys, mask=in_d)


@triton.jit
def attention_kernel(
    q,  # (B, H, M, D)
    k,  # (B, H, N, D)
    v,  # (B, H, N, D)
    policy,  # (B, N) or None
    mean,  # (B, H, D) float32, contiguous, or None
    out,  # (B, M, H, D), contiguous
    logsumexp,  # (B, H, M) float32, contiguous
    total,  # (B, H, M) float32, contiguous, or None
    scale_log2,
    eps,
    heads,
    queries,
    keys,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    policy_stride_b,
    policy_stride_n,
    D: tl.constexpr,
    POLICY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_M queries of one head, in units of log 2.

    The policy joins the logits as its logarithm, so that the exponentials are relative to the largest key that is seen:
    relative to a hidden one they might all round to zero in half precision.
    """
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    offsets_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offsets_n = tl.arange(0, BLOCK_N)
    offsets_d = tl.arange(0, BLOCK_D)
    in_m = offsets_m < queries
    in_d = offsets_d < D
    in_md = in_m[:, None] & in_d[None, :]
    rows = q + batch * q_stride_b + head * q_stride_h
    query = tl.load(rows + offsets_m.to(tl.int64)[:, None] * q_stride_m + offsets_d[None, :], mask=in_md, other=0.0)
    key_rows = k + batch * k_stride_b + head * k_stride_h + offsets_d[None, :]
    value_rows = v + batch * v_stride_b + head * v_stride_h + offsets_d[None, :]
    if POLICY:
        policy_row = policy + batch * policy_stride_b
    seen_max = tl.full((BLOCK_M,), LOWEST, tl.float32)
    seen_sum = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), LOWEST, tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, keys, BLOCK_N):
        columns = start + offsets_n
        in_n = columns < keys
        in_nd = in_n[:, None] & in_d[None, :]
        key = tl.load(key_rows + columns.to(tl.int64)[:, None] * k_stride_n, mask=in_nd, other=0.0)
        logit = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        logit = tl.where(in_n[None, :], logit, float("-inf"))
        if POLICY:
            row_max = tl.maximum(row_max, tl.max(logit, 1))
            shown = tl.load(policy_row + columns.to(tl.int64) * policy_stride_n, mask=in_n, other=0.0)
            visible = shown.to(tl.float32)
            visible = tl.log2(tl.where(visible < 0.0, 0.0, visible))
            own = offsets_m[:, None] == columns[None, :]
            logit = tl.where(own, logit, logit + visible[None, :])
        new_max = tl.maximum(seen_max, tl.max(logit, 1))
        rescale = tl.exp2(seen_max - new_max)
        weight = tl.exp2(logit - new_max[:, None])
        seen_sum = seen_sum * rescale + tl.sum(weight, 1)
        value = tl.load(value_rows + columns.to(tl.int64)[:, None] * v_stride_n, mask=in_nd, other=0.0)
        acc = tl.dot(weight.to(value.dtype), value, acc * rescale[:, None], input_precision="ieee")
        seen_max = new_max

    row = (batch * heads + head) * queries + offsets_m
    if POLICY:
        seen = tl.exp2(seen_max - row_max)
        denominator = seen_sum * seen + eps
        average = tl.load(mean + (batch * heads + head) * D + offsets_d, mask=in_d, other=0.0)
        acc = (acc * seen[:, None] + eps * average[None, :]) / denominator[:, None]
        tl.store(total + row, denominator, mask=in_m)
        tl.store(logsumexp + row, (row_max + tl.log2(denominator)) * LN_2, mask=in_m)
    else:
        acc = acc / seen_sum[:, None]
        tl.store(logsumexp + row, (seen_max + tl.log2(seen_sum)) * LN_2, mask=in_m)
    targets = out + ((batch * queries + offsets_m[:, None]) * heads + head) * D + offsets_d[None, :]
    tl.store(targets, acc.to(out.dtype.element_ty), mask=in_md)


@triton.jit
def grad_queries_kernel(
    grad,  # (B, H, M, D)
    q,  # (B, H, M, D)
    k,  # (B, H, N, D)
    v,  # (B, H, N, D)
    policy,  # (B, N) or None
    out,  # (B, H, M, D)
    logsumexp,  # (B, H, M) float32, contiguous
    total,  # (B, H, M) float32, contiguous, or None
    mean,  # (B, H, D) float32, contiguous, or None
    grad_q,  # (B, M, H, D), contiguous
    delta,  # (B, H, M) float32, contiguous
    peak,  # (B, H, M) int32, contiguous, or None
    peak_grad,  # (B, H, M) float32, contiguous, or None
    scale,
    scale_log2,
    log2_e,
    eps,
    heads,
    queries,
    keys,
    grad_stride_b,
    grad_stride_h,
    grad_stride_m,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    out_stride_b,
    out_stride_h,
    out_stride_m,
    policy_stride_b,
    policy_stride_n,
    D: tl.constexpr,
    POLICY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_M queries of one head; it also leaves what the pass over the keys needs of every query.

    With a policy the maximum of a row, over all keys, has a gradient of eps / total: small, unless hidden keys dominate
    the row. It goes to the first key that reaches the maximum.
    """
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    offsets_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offsets_n = tl.arange(0, BLOCK_N)
    offsets_d = tl.arange(0, BLOCK_D)
    in_m = offsets_m < queries
    in_d = offsets_d < D
    in_md = in_m[:, None] & in_d[None, :]
    rows_m = offsets_m.to(tl.int64)[:, None]
    sources = q + batch * q_stride_b + head * q_stride_h + rows_m * q_stride_m + offsets_d[None, :]
    query = tl.load(sources, mask=in_md, other=0.0)
    sources = grad + batch * grad_stride_b + head * grad_stride_h + rows_m * grad_stride_m + offsets_d[None, :]
    upstream = tl.load(sources, mask=in_md, other=0.0)
    sources = out + batch * out_stride_b + head * out_stride_h + rows_m * out_stride_m + offsets_d[None, :]
    result = tl.load(sources, mask=in_md, other=0.0).to(tl.float32)
    row = (batch * heads + head) * queries + offsets_m
    lse = tl.load(logsumexp + row, mask=in_m, other=0.0) * log2_e
    offset = tl.sum(upstream.to(tl.float32) * result, 1)
    tl.store(delta + row, offset, mask=in_m)
    if POLICY:
        average = tl.load(mean + (batch * heads + head) * D + offsets_d, mask=in_d, other=0.0)
        denominator = tl.load(total + row, mask=in_m, other=1.0)
        slope_of_max = (tl.sum(upstream.to(tl.float32) * average[None, :], 1) - offset) * (eps / denominator)
        row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        row_peak = tl.zeros((BLOCK_M,), tl.int32)

    key_rows = k + batch * k_stride_b + head * k_stride_h + offsets_d[None, :]
    value_rows = v + batch * v_stride_b + head * v_stride_h + offsets_d[None, :]
    if POLICY:
        policy_row = policy + batch * policy_stride_b
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, keys, BLOCK_N):
        columns = start + offsets_n
        in_n = columns < keys
        in_nd = in_n[:, None] & in_d[None, :]
        key = tl.load(key_rows + columns.to(tl.int64)[:, None] * k_stride_n, mask=in_nd, other=0.0)
        value = tl.load(value_rows + columns.to(tl.int64)[:, None] * v_stride_n, mask=in_nd, other=0.0)
        logit = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        logit = tl.where(in_n[None, :], logit, float("-inf"))
        weight = tl.exp2(logit - lse[:, None])
        if POLICY:
            tile_max, tile_peak = tl.max(logit, 1, return_indices=True, return_indices_tie_break_left=True)
            row_peak = tl.where(tile_max > row_max, start + tile_peak, row_peak)
            row_max = tl.maximum(row_max, tile_max)
            shown = tl.load(policy_row + columns.to(tl.int64) * policy_stride_n, mask=in_n, other=0.0)
            visible = shown.to(tl.float32)
            own = offsets_m[:, None] == columns[None, :]
            weight = tl.where(own, weight, weight * visible[None, :])
        slope = tl.dot(upstream, tl.trans(value), input_precision="ieee") - offset[:, None]
        acc = tl.dot((weight * slope).to(key.dtype), key, acc, input_precision="ieee")

    if POLICY:
        tl.store(peak + row, row_peak, mask=in_m)
        tl.store(peak_grad + row, slope_of_max, mask=in_m)
        key = tl.load(key_rows + row_peak.to(tl.int64)[:, None] * k_stride_n, mask=in_md, other=0.0).to(tl.float32)
        acc += slope_of_max[:, None] * key
    targets = grad_q + ((batch * queries + offsets_m[:, None]) * heads + head) * D + offsets_d[None, :]
    tl.store(targets, (acc * scale).to(grad_q.dtype.element_ty), mask=in_md)


@triton.jit
def grad_keys_kernel(
    grad,  # (B, H, M, D)
    q,  # (B, H, M, D)
    k,  # (B, H, N, D)
    v,  # (B, H, N, D)
    policy,  # (B, N) or None
    logsumexp,  # (B, H, M) float32, contiguous
    total,  # (B, H, M) float32, contiguous, or None
    delta,  # (B, H, M) float32, contiguous
    peak,  # (B, H, M) int32, contiguous, or None
    peak_grad,  # (B, H, M) float32, contiguous, or None
    grad_k,  # (B, N, H, D), contiguous
    grad_v,  # (B, N, H, D), contiguous
    grad_policy,  # (B, H, N) float32, contiguous, or None
    scale,
    scale_log2,
    log2_e,
    eps,
    heads,
    queries,
    keys,
    grad_stride_b,
    grad_stride_h,
    grad_stride_m,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    policy_stride_b,
    policy_stride_n,
    D: tl.constexpr,
    POLICY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_N keys of one head; logits stand on their side, so that they go into the next dot as they are.

    Rows past the last query have a gradient of zero, so that their weights do not matter.
    """
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    offsets_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets_m = tl.arange(0, BLOCK_M)
    offsets_d = tl.arange(0, BLOCK_D)
    in_n = offsets_n < keys
    in_d = offsets_d < D
    in_nd = in_n[:, None] & in_d[None, :]
    rows_n = offsets_n.to(tl.int64)[:, None]
    sources = k + batch * k_stride_b + head * k_stride_h + rows_n * k_stride_n + offsets_d[None, :]
    key = tl.load(sources, mask=in_nd, other=0.0)
    sources = v + batch * v_stride_b + head * v_stride_h + rows_n * v_stride_n + offsets_d[None, :]
    value = tl.load(sources, mask=in_nd, other=0.0)
    if POLICY:
        sources = policy + batch * policy_stride_b + offsets_n.to(tl.int64) * policy_stride_n
        visible = tl.load(sources, mask=in_n, other=0.0).to(tl.float32)
        acc_policy = tl.zeros((BLOCK_N,), tl.float32)
    query_rows = q + batch * q_stride_b + head * q_stride_h + offsets_d[None, :]
    grad_rows = grad + batch * grad_stride_b + head * grad_stride_h + offsets_d[None, :]
    first_row = (batch * heads + head) * queries
    acc_key = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_value = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, queries, BLOCK_M):
        rows = start + offsets_m
        in_m = rows < queries
        in_md = in_m[:, None] & in_d[None, :]
        query = tl.load(query_rows + rows.to(tl.int64)[:, None] * q_stride_m, mask=in_md, other=0.0)
        upstream = tl.load(grad_rows + rows.to(tl.int64)[:, None] * grad_stride_m, mask=in_md, other=0.0)
        lse = tl.load(logsumexp + first_row + rows, mask=in_m, other=0.0) * log2_e
        offset = tl.load(delta + first_row + rows, mask=in_m, other=0.0)
        logit = tl.dot(key, tl.trans(query), input_precision="ieee") * scale_log2
        weight = tl.exp2(logit - lse[None, :])
        slope = tl.dot(value, tl.trans(upstream), input_precision="ieee") - offset[None, :]
        if POLICY:
            own = offsets_n[:, None] == rows[None, :]
            acc_policy += tl.sum(tl.where(own, 0.0, weight * slope), 1)
            weight = tl.where(own, weight, weight * visible[:, None])
            grad_logit = weight * slope
            of_max = tl.load(peak + first_row + rows, mask=in_m, other=-1)
            slope_of_max = tl.load(peak_grad + first_row + rows, mask=in_m, other=0.0)
            grad_logit += tl.where(offsets_n[:, None] == of_max[None, :], slope_of_max[None, :], 0.0)
            floor = (eps / keys) / tl.load(total + first_row + rows, mask=in_m, other=1.0)
            weight += floor[None, :]
        else:
            grad_logit = weight * slope
        acc_value = tl.dot(weight.to(upstream.dtype), upstream, acc_value, input_precision="ieee")
        acc_key = tl.dot(grad_logit.to(query.dtype), query, acc_key, input_precision="ieee")

    targets = ((batch * keys + offsets_n[:, None]) * heads + head) * D + offsets_d[None, :]
    tl.store(grad_v + targets, acc_value.to(grad_v.dtype.element_ty), mask=in_nd)
    tl.store(grad_k + targets, (acc_key * scale).to(grad_k.dtype.element_ty), mask=in_nd)
    if POLICY:
        tl.store(grad_policy + (batch * heads + head) * keys + offsets_n, acc_policy, mask=in_n)


@triton.jit
def sum_heads_kernel(
    parts,  # (B, H, N) float32, contiguous
    summed,  # (B, N), contiguous
    heads,
    keys,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_N keys, heads in order."""
    batch = tl.program_id(1).to(tl.int64)
    offsets_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = offsets_n < keys
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for head in range(heads):
        acc += tl.load(parts + (batch * heads + head) * keys + offsets_n, mask=in_n, other=0.0)
    tl.store(summed + batch * keys + offsets_n, acc.to(summed.dtype.element_ty), mask=in_n)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, policy: torch.Tensor | None, scale: float, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One launch, two with a policy; q (B, H, M, D), k and v (B, H, N, D), dense last axes, policy (B, N) or None.

    Returns out (B, H, M, D), and for the backward pass logsumexp (B, H, M), total (B, H, M), the mean (B, H, D) of v;
    without a policy the last two are empty.
    """
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    hidden = policy is not None
    out = torch.empty(batch, queries, heads, head_dim, dtype=q.dtype, device=q.device)
    logsumexp = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    total = torch.empty(batch, heads, queries if hidden else 0, dtype=torch.float32, device=q.device)
    mean = torch.empty(batch, heads, head_dim if hidden else 0, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out.transpose(1, 2), logsumexp, total, mean
    if hidden:
        columns = mean_tile(head_dim)
        mean_values_kernel[(heads, batch)](
            v,
            mean,
            heads,
            keys,
            *v.stride()[:3],
            D=head_dim,
            BLOCK_N=columns.rows,
            BLOCK_D=columns.columns,
            num_warps=columns.num_warps,
        )
    tile = _tiles(q, k, v).forward
    attention_kernel[(triton.cdiv(queries, tile.own), heads, batch)](
        q,
        k,
        v,
        policy,
        mean if hidden else None,
        out,
        logsumexp,
        total if hidden else None,
        scale * LOG2_E,
        eps,
        heads,
        queries,
        keys,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *((0, 0) if policy is None else policy.stride()),
        D=head_dim,
        POLICY=hidden,
        BLOCK_M=tile.own,
        BLOCK_N=tile.step,
        BLOCK_D=padded_head_dim(head_dim),
        num_warps=tile.num_warps,
        num_stages=2,
    )
    return out.transpose(1, 2), logsumexp, total, mean


def attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    policy: torch.Tensor | None,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    total: torch.Tensor,
    mean: torch.Tensor,
    scale: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two launches, three with a policy; grad (B, H, M, D) -> gradients of q, k, v and the policy, (B, 0) without."""
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    hidden = policy is not None
    grad_q = torch.empty(batch, queries, heads, head_dim, dtype=q.dtype, device=q.device)
    grad_k = torch.empty(batch, keys, heads, head_dim, dtype=k.dtype, device=k.device)
    grad_v = torch.empty_like(grad_k)
    grad_policy = q.new_empty(batch, 0) if policy is None else policy.new_empty(batch, keys)
    if batch == 0 or queries == 0:
        return grad_q.transpose(1, 2), grad_k.zero_().transpose(1, 2), grad_v.zero_().transpose(1, 2), grad_policy
    delta = torch.empty_like(logsumexp)
    peak_grad = torch.empty_like(logsumexp) if hidden else None
    peak = torch.empty(logsumexp.shape, dtype=torch.int32, device=q.device) if hidden else None
    parts = torch.empty(batch, heads, keys, dtype=torch.float32, device=q.device) if hidden else None
    numbers = (scale, scale * LOG2_E, LOG2_E, eps, heads, queries, keys)
    strides = (*grad.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    policy_strides = (0, 0) if policy is None else policy.stride()
    tiles = _tiles(grad, q, k, v)
    tile = tiles.grad_queries
    grad_queries_kernel[(triton.cdiv(queries, tile.own), heads, batch)](
        grad,
        q,
        k,
        v,
        policy,
        out,
        logsumexp,
        total if hidden else None,
        mean if hidden else None,
        grad_q,
        delta,
        peak,
        peak_grad,
        *numbers,
        *strides,
        *out.stride()[:3],
        *policy_strides,
        D=head_dim,
        POLICY=hidden,
        BLOCK_M=tile.own,
        BLOCK_N=tile.step,
        BLOCK_D=padded_head_dim(head_dim),
        num_warps=tile.num_warps,
        num_stages=2,
    )
    tile = tiles.grad_keys
    grad_keys_kernel[(triton.cdiv(keys, tile.own), heads, batch)](
        grad,
        q,
        k,
        v,
        policy,
        logsumexp,
        total if hidden else None,
        delta,
        peak,
        peak_grad,
        grad_k,
        grad_v,
        parts,
        *numbers,
        *strides,
        *policy_strides,
        D=head_dim,
        POLICY=hidden,
        BLOCK_M=tile.step,
        BLOCK_N=tile.own,
        BLOCK_D=padded_head_dim(head_dim),
        num_warps=tile.num_warps,
        num_stages=2,
    )
    if hidden:
        sum_heads_kernel[(triton.cdiv(keys, 256), batch)](parts, grad_policy, heads, keys, BLOCK_N=256, num_warps=4)
    return grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v.transpose(1, 2), grad_policy
