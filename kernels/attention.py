"""Attention in tiles, without a matrix of queries by keys in memory, and the scores of the keys.

``attention`` takes one launch; ``attention_policy`` takes two, the mean of the values first. ``key_scores`` takes one
for the class token's attention, and two for the received attention.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ._attention import (
    LOG2_E,
    attention_tiles,
    chosen_rows,
    clear_rows,
    has_last_step,
    last_keys,
    last_rows,
    launches,
    load_bias,
    load_columns,
    load_rows,
    sum_heads,
)
from ._direct import cdiv, direct
from ._launch import Tile, in_parts, strides
from ._rows import LOWEST, head_of, head_rows, padded_head_dim, steps, unit_of

LN_2 = tl.constexpr(0.6931471805599453)


@direct
@triton.jit
def mean_values_kernel(
    v,  # (B, H, N, D)
    mean,  # (B, H, D) float32, contiguous
    heads,
    keys,
    v_strides,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Average v over the tokens of one head of one image in each program; grid (heads, images)."""
    head = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    offsets_n = tl.arange(0, BLOCK_N)
    offsets_d = tl.arange(0, BLOCK_D)
    in_d = offsets_d < D
    values = head_of(v, batch, head.to(tl.int64), v_strides, UNIT) + offsets_d[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, keys, BLOCK_N):
        rows = start + offsets_n
        mask = (rows < keys)[:, None] & in_d[None, :]
        acc += tl.load(values + steps(rows, v_strides[2], UNIT), mask=mask, other=0.0).to(tl.float32)
    tl.store(mean + (batch * heads + head) * D + offsets_d, tl.sum(acc, 0) / keys, mask=in_d)


@triton.jit
def _step(
    columns,  # (BLOCK_N,) keys, of the last step some past the end
    last_n,
    query,  # (BLOCK_M, BLOCK_D)
    offsets_m,
    key_rows,
    value_rows,
    policy_row,
    bias_row,
    scale_log2,
    log2_e,
    k_strides,
    v_strides,
    policy_strides,
    bias_strides,
    acc,
    seen_max,
    seen_sum,
    row_max,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LAST: tl.constexpr,
):
    """Add BLOCK_N keys to the running softmax; with LAST, the keys past the end are masked."""
    in_n = columns < last_n if LAST else None
    key = load_rows(key_rows + steps(columns, k_strides[2], UNIT), in_n, D, BLOCK_D)
    logit = tl.dot(query, tl.trans(key), input_precision="ieee")
    if LAST or bias_row is not None or policy_row is not None:
        logit *= scale_log2
        if bias_row is not None:
            logit += load_bias(bias_row, columns, in_n, bias_strides[1], log2_e)[None, :]
        elif LAST:
            logit = tl.where((columns < last_n)[None, :], logit, float("-inf"))
        if policy_row is not None:
            row_max = tl.maximum(row_max, tl.max(logit, 1))
            visible = load_columns(policy_row, columns, in_n, policy_strides[1])
            visible = tl.log2(tl.where(visible < 0.0, 0.0, visible))
            own = offsets_m[:, None] == columns[None, :]
            logit = tl.where(own, logit, logit + visible[None, :])
        new_max = tl.maximum(seen_max, tl.max(logit, 1))
        weight = tl.exp2(logit - new_max[:, None])
    else:  # the scale is not negative, so one instruction multiplies by it and takes off the maximum
        new_max = tl.maximum(seen_max, tl.max(logit, 1) * scale_log2)
        weight = tl.exp2(logit * scale_log2 - new_max[:, None])
    rescale = tl.exp2(seen_max - new_max)
    seen_sum = seen_sum * rescale + tl.sum(weight, 1)
    value = load_rows(value_rows + steps(columns, v_strides[2], UNIT), in_n, D, BLOCK_D)
    acc = tl.dot(weight.to(value.dtype), value, acc * rescale[:, None], input_precision="ieee")
    return acc, new_max, seen_sum, row_max


@triton.jit
def _attend_rows(
    offsets_m,  # (BLOCK_M,) queries
    first_m,
    last_m,
    first_n,
    last_n,
    head,
    batch,
    q,
    k,
    v,
    policy,
    bias,
    index,
    mean,
    out,
    logsumexp,
    total,
    scale_log2,
    log2_e,
    eps,
    heads,
    queries,
    prefix,
    q_strides,
    k_strides,
    v_strides,
    policy_strides,
    bias_strides,
    index_strides,
    PACKED: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LAST_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attend for BLOCK_M queries of one head, with logits in units of log 2.

    The logarithm of the policy is added to the logits, so that exponentials are relative to the largest visible key.
    Relative to a hidden key they might all round to zero in half precision.
    """
    offsets_d = tl.arange(0, BLOCK_D)
    in_m = offsets_m < last_m
    in_d = offsets_d < D
    in_md = in_m[:, None] & in_d[None, :]
    query_rows = head_of(q, batch, head, q_strides, UNIT) + offsets_d[None, :]
    rows_q = offsets_m
    if index is not None:
        rows_q = chosen_rows(offsets_m - first_m, index, index_strides[1], prefix, in_m, first_n)
    query = tl.load(query_rows + steps(rows_q, q_strides[2], UNIT), mask=in_md, other=0.0)
    key_rows = head_of(k, batch, head, k_strides, UNIT) + offsets_d[None, :]
    value_rows = head_of(v, batch, head, v_strides, UNIT) + offsets_d[None, :]
    policy_row, bias_row = policy, bias
    if policy is not None:
        policy_row = policy + batch * policy_strides[0]
    if bias is not None:
        bias_row = bias + batch * bias_strides[0]
    seen_max = tl.full((BLOCK_M,), LOWEST, tl.float32)
    seen_sum = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), LOWEST, tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    MASKED: tl.constexpr = LAST_N < 0  # every step
    whole = last_n if MASKED else first_n + (last_n - first_n) // BLOCK_N * BLOCK_N
    if LAST_N > 0:  # first of all: a product behind the loop would read the loop's accumulators while they are filled
        acc, seen_max, seen_sum, row_max = _step(
            *(whole + tl.arange(0, LAST_N), last_n, query, offsets_m, key_rows, value_rows, policy_row, bias_row),
            *(scale_log2, log2_e, k_strides, v_strides, policy_strides, bias_strides),
            *(acc, seen_max, seen_sum, row_max, D, UNIT, BLOCK_D, True),
        )
    if not PACKED:
        tl.assume(whole > first_n)  # ptxas lets products overlap where the loop cannot be skipped
    for start in range(first_n, whole, BLOCK_N):
        acc, seen_max, seen_sum, row_max = _step(
            *(start + tl.arange(0, BLOCK_N), last_n, query, offsets_m, key_rows, value_rows, policy_row, bias_row),
            *(scale_log2, log2_e, k_strides, v_strides, policy_strides, bias_strides),
            *(acc, seen_max, seen_sum, row_max, D, UNIT, BLOCK_D, MASKED),
        )

    row = (batch * heads + head) * queries + offsets_m
    if policy is not None:
        seen = tl.exp2(seen_max - row_max)
        denominator = seen_sum * seen + eps
        average = tl.load(mean + (batch * heads + head) * D + offsets_d, mask=in_d, other=0.0)
        acc = (acc * seen[:, None] + eps * average[None, :]) / denominator[:, None]
        tl.store(total + row, denominator, mask=in_m)
        tl.store(logsumexp + row, (row_max + tl.log2(denominator)) * LN_2, mask=in_m)
    else:
        tl.store(logsumexp + row, (seen_max + tl.log2(seen_sum)) * LN_2, mask=in_m)
        if bias is not None or PACKED:
            seen_sum = tl.where(seen_sum == 0.0, 1.0, seen_sum)  # no key: the result is zero
        acc = acc / seen_sum[:, None]
    targets = out + ((batch * queries + offsets_m[:, None]) * heads + head) * D + offsets_d[None, :]
    tl.store(targets, acc.to(out.dtype.element_ty), mask=in_md)


@direct
@triton.jit
def attention_kernel(
    q,  # (B, H, M, D), with an index (B, H, any, D)
    k,  # (B, H, N, D)
    v,  # (B, H, N, D)
    policy,  # (B, N) or None
    bias,  # (B, N) or None
    index,  # (B, M - prefix), of packed images (images, K), or None
    query_offsets,  # (images + 1,) int32 or None; then B is 1
    key_offsets,  # (images + 1,) int32 or None
    mean,  # (B, H, D) float32, contiguous, or None
    out,  # (B, M, H, D), contiguous
    logsumexp,  # (B, H, M) float32, contiguous
    total,  # (B, H, M) float32, contiguous, or None
    scale_log2,  # not negative
    log2_e,
    eps,
    heads,
    queries,
    keys,
    prefix,
    q_strides,
    k_strides,
    v_strides,
    policy_strides,
    bias_strides,
    index_strides,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LAST_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LAST_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attend for BLOCK_M queries of one head in each program; grid (blocks of queries, heads, images).

    The last program of a head has LAST_M queries.
    """
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    first_m, last_m, first_n, last_n = 0, queries, 0, keys
    if index is not None:
        index += batch * index_strides[0]
    if query_offsets is not None:
        first_m, last_m = tl.load(query_offsets + batch), tl.load(query_offsets + batch + 1)
        first_n, last_n = tl.load(key_offsets + batch), tl.load(key_offsets + batch + 1)
        last_n = tl.where(first_m + tl.program_id(0) * BLOCK_M < last_m, last_n, first_n)  # nothing to do
        batch = tl.full((), 0, tl.int64)
    PACKED: tl.constexpr = key_offsets is not None
    begin = first_m + tl.program_id(0) * BLOCK_M
    if LAST_M < BLOCK_M and begin + BLOCK_M > last_m:
        _attend_rows(
            *(begin + tl.arange(0, LAST_M), first_m, last_m, first_n, last_n, head, batch, q, k, v, policy, bias),
            *(index, mean, out, logsumexp, total, scale_log2, log2_e, eps, heads, queries, prefix),
            *(q_strides, k_strides, v_strides, policy_strides, bias_strides, index_strides),
            *(PACKED, D, UNIT, LAST_M, BLOCK_N, LAST_N, BLOCK_D),
        )
    else:
        _attend_rows(
            *(begin + tl.arange(0, BLOCK_M), first_m, last_m, first_n, last_n, head, batch, q, k, v, policy, bias),
            *(index, mean, out, logsumexp, total, scale_log2, log2_e, eps, heads, queries, prefix),
            *(q_strides, k_strides, v_strides, policy_strides, bias_strides, index_strides),
            *(PACKED, D, UNIT, BLOCK_M, BLOCK_N, LAST_N, BLOCK_D),
        )
    if query_offsets is not None:
        clear_rows(out, query_offsets, queries, heads, D, BLOCK_M, BLOCK_D)


@direct
@triton.jit
def received_kernel(
    q,  # (B, H, M, D)
    k,  # (B, H, N, D)
    bias,  # (B, N) or None
    logsumexp,  # (B, H, M) float32, contiguous
    parts,  # (B, H, N) float32, contiguous
    scale_log2,
    log2_e,
    heads,
    queries,
    keys,
    q_strides,
    k_strides,
    bias_strides,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum one head's attention to BLOCK_N keys over all queries, in each program; grid (key blocks, heads, images)."""
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    offsets_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets_m = tl.arange(0, BLOCK_M)
    offsets_d = tl.arange(0, BLOCK_D)
    in_n = offsets_n < keys
    in_d = offsets_d < D
    key_rows = head_of(k, batch, head, k_strides, UNIT) + offsets_d[None, :]
    in_nd = in_n[:, None] & in_d[None, :]
    key = tl.load(key_rows + steps(offsets_n, k_strides[2], UNIT), mask=in_nd, other=0.0)
    if bias is not None:
        added = load_bias(bias + batch * bias_strides[0], offsets_n, in_n, bias_strides[1], log2_e)
    query_rows = head_of(q, batch, head, q_strides, UNIT) + offsets_d[None, :]
    first_row = (batch * heads + head) * queries
    received = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, queries, BLOCK_M):
        rows = start + offsets_m
        in_m = rows < queries
        mask = in_m[:, None] & in_d[None, :]
        query = tl.load(query_rows + steps(rows, q_strides[2], UNIT), mask=mask, other=0.0)
        lse = tl.load(logsumexp + first_row + rows, mask=in_m, other=float("inf")) * log2_e
        logit = tl.dot(key, tl.trans(query), input_precision="ieee") * scale_log2
        if bias is not None:
            logit += added[:, None]
            lse = tl.where(lse == float("-inf"), float("inf"), lse)  # no key: weights of zero
        received += tl.exp2(logit - lse[None, :])
    tl.store(parts + (batch * heads + head) * keys + offsets_n, tl.sum(received, 1), mask=in_n)


@direct
@triton.jit
def class_kernel(
    q,  # (B, H, M, D)
    k,  # (B, H, N, D)
    bias,  # (B, N) or None
    logsumexp,  # (B, H, M) float32, contiguous
    scores,  # (B, N - prefix) float32, contiguous
    scale_log2,
    log2_e,
    heads,
    queries,
    keys,
    prefix,
    q_strides,
    k_strides,
    bias_strides,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Average the class token's attention to BLOCK_N keys over heads, in each program; grid (key blocks, images)."""
    batch = tl.program_id(1).to(tl.int64)
    offsets_n = prefix + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets_d = tl.arange(0, BLOCK_D)
    in_n = offsets_n < keys
    in_d = offsets_d < D
    query_row = q + batch * q_strides[0] + offsets_d
    if bias is not None:
        added = load_bias(bias + batch * bias_strides[0], offsets_n, in_n, bias_strides[1], log2_e)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    first_head = k + tl.multiple_of(batch * k_strides[0], UNIT)
    key_rows = first_head + steps(offsets_n, k_strides[2], UNIT) + offsets_d[None, :]
    next_head = tl.multiple_of(tl.cast(k_strides[1], tl.int64), UNIT)
    for head in range(heads):
        key = tl.load(key_rows, mask=in_n[:, None] & in_d[None, :], other=0.0).to(tl.float32)
        query = tl.load(query_row, mask=in_d, other=0.0).to(tl.float32)
        lse = tl.load(logsumexp + (batch * heads + head) * queries) * log2_e
        logit = tl.sum(key * query[None, :], 1) * scale_log2
        if bias is not None:
            logit += added
            lse = tl.where(lse == float("-inf"), float("inf"), lse)  # no key: weights of zero
        acc += tl.exp2(logit - lse)
        key_rows += next_head
        query_row += q_strides[1]
    tl.store(scores + batch * (keys - prefix) + offsets_n - prefix, acc / heads, mask=in_n)


@functools.lru_cache(4096)
def _forward_tile(
    queries: int, keys: int, head_dim: int, dtype: torch.dtype, unit: int, used: bool, packed: bool
) -> Tile:
    """Return the tile and the constants that the kernel is compiled for."""
    tile, _, _ = attention_tiles(head_dim, dtype, unit > 1, with_options=used or packed)
    own, step, apart = tile["BLOCK_M"], tile["BLOCK_N"], has_last_step(head_dim, dtype, unit)
    return Tile(
        tile,
        D=head_dim,
        UNIT=unit,
        LAST_M=(not packed and apart and last_rows(queries, own)) or own,
        LAST_N=last_keys(keys, step) if apart and not packed else -1,
        BLOCK_D=padded_head_dim(head_dim),
    )


@in_parts("q", "k", "v", "bias", "index")
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    prefix: int = 0,
    query_offsets: torch.Tensor | None = None,
    key_offsets: torch.Tensor | None = None,
    longest_queries: int = 0,
    longest_keys: int = 0,
    num_out: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch once; q (B, H, M, D), k and v (B, H, N, D), dense last axes -> out (B, H, M, D), logsumexp (B, H, M).

    A bias is (B, N). With an index (B, K), M of the results is prefix + K. With offsets of the queries and of the keys,
    each (images + 1,) int32, B is 1, and ``longest_queries`` and ``longest_keys`` bound the counts of an image. With an
    index and offsets, the index is (images, K), M of the results is ``num_out``, and q has a row for every key.
    """
    batch, heads, queries, head_dim = q.shape
    if index is not None:
        queries = prefix + index.shape[1] if query_offsets is None else num_out
    out = torch.empty(batch, queries, heads, head_dim, dtype=q.dtype, device=q.device)
    logsumexp = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    images, most = (batch, queries) if query_offsets is None else (query_offsets.shape[0] - 1, max(1, longest_queries))
    if out.numel() == 0 or images == 0:
        return out.zero_().transpose(1, 2), logsumexp
    if query_offsets is None:
        nothing = (None, None)
        _attend(batch, queries, q, k, v, None, bias, index, *nothing, out, logsumexp, *nothing, scale, 0.0, prefix)
        return out.transpose(1, 2), logsumexp
    for count, chosen, bounds in launches(images, index, query_offsets, key_offsets):
        _attend(count, most, q, k, v, None, bias, chosen, *bounds, out, logsumexp, None, None, scale, 0.0, prefix)
    return out.transpose(1, 2), logsumexp


@in_parts("q", "k", "v", "policy")
def attention_policy(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, policy: torch.Tensor, scale: float, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch twice; q, k, v (B, H, N, D), dense last axes, policy (B, N) -> out (B, H, N, D) and three more tensors.

    The gradient needs these: the logsumexp (B, H, N), the total (B, H, N) and the mean of v (B, H, D), all float32.
    """
    batch, heads, tokens, head_dim = q.shape
    out = torch.empty(batch, tokens, heads, head_dim, dtype=q.dtype, device=q.device)
    logsumexp = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    total = torch.empty_like(logsumexp)
    mean = torch.empty(batch, heads, head_dim, dtype=torch.float32, device=q.device)
    if batch:
        unit = unit_of(v)
        # There are few programs, so each keeps many loads in flight; 64 addresses a thread would spill.
        tile = head_rows(head_dim, 8192 if unit > 1 else 2048)
        mean_values_kernel[(heads, batch)](v, mean, heads, tokens, strides(v, 3), D=head_dim, UNIT=unit, **tile)
        nothing = (None,) * 4
        _attend(batch, tokens, q, k, v, policy, *nothing, out, logsumexp, total, mean, scale, eps, 0)
    return out.transpose(1, 2), logsumexp, total, mean


def _attend(
    images: int,
    most: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    policy: torch.Tensor | None,
    bias: torch.Tensor | None,
    index: torch.Tensor | None,
    query_offsets: torch.Tensor | None,
    key_offsets: torch.Tensor | None,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    total: torch.Tensor | None,
    mean: torch.Tensor | None,
    scale: float,
    eps: float,
    prefix: int,
) -> None:
    """Launch for ``images`` images, of ``most`` queries at most."""
    _, queries, heads, head_dim = out.shape
    keys = k.shape[2]
    if scale < 0.0:
        q, scale = -q, -scale
    used = bias is not None or index is not None
    tile = _forward_tile(queries, keys, head_dim, q.dtype, unit_of(q, k, v), used, query_offsets is not None)
    attention_kernel[(cdiv(most, tile["BLOCK_M"]), heads, images)](
        *(q, k, v, policy, bias, index, query_offsets, key_offsets, mean, out, logsumexp, total),
        scale * LOG2_E,
        LOG2_E,
        *(eps, heads, queries, keys, prefix),
        *(strides(q, 3), strides(k, 3), strides(v, 3), strides(policy, 2), strides(bias, 2), strides(index, 2)),
        **tile,
    )


@in_parts("q", "k", "logsumexp", "bias")
def key_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    logsumexp: torch.Tensor,
    kind: str,
    bias: torch.Tensor | None,
    prefix: int,
    scale: float,
) -> torch.Tensor:
    """Return the attention that each key gets, float32, recomputed from q, k and the saved logsumexp (B, H, M).

    ``kind="class"``: from the first query, averaged over heads, (B, N - prefix), one launch.
    ``kind="received"``: summed over all queries and heads, (B, N), two launches.
    """
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    received = kind == "received"
    scores = torch.empty(batch, keys if received else keys - prefix, dtype=torch.float32, device=q.device)
    if scores.numel() == 0 or queries == 0:
        return scores.zero_()
    numbers = (scale * LOG2_E, LOG2_E, heads, queries, keys)
    unit = unit_of(q, k)
    if not received:
        tile = head_rows(head_dim, 2048)  # a program loops over the heads, so small tiles keep the programs many
        class_kernel[(cdiv(keys - prefix, tile["BLOCK_N"]), batch)](
            *(q, k, bias, logsumexp, scores),
            *(*numbers, prefix),
            *(strides(q, 2), strides(k, 3), strides(bias, 2)),
            D=head_dim,
            UNIT=unit,
            **tile,
        )
        return scores
    parts = torch.empty(batch, heads, keys, dtype=torch.float32, device=q.device)
    tile, _, _ = attention_tiles(head_dim, q.dtype, unit > 1, with_options=bias is not None)
    tile = Tile(tile, BLOCK_M=tile["BLOCK_N"], BLOCK_N=tile["BLOCK_M"])  # a program owns keys and loops over queries
    received_kernel[(cdiv(keys, tile["BLOCK_N"]), heads, batch)](
        *(q, k, bias, logsumexp),
        *(parts, *numbers),
        *(strides(q, 3), strides(k, 3), strides(bias, 2)),
        D=head_dim,
        UNIT=unit,
        BLOCK_D=padded_head_dim(head_dim),
        **tile,
    )
    sum_heads(parts, scores)
    return scores
