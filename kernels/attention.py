"""Attention in tiles: no matrix of queries by keys in memory, forward or backward.

Launches: forward 1, backward 2; with a policy 2 (the mean of the values first) and 3 (its gradient summed over heads),
as with a bias that needs a gradient. What keys get of the attention: 1 for the class token's, 2 for all.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl

from ._direct import cdiv, direct, is_compiled, next_power_of_2
from ._launch import in_parts, parts_of_images
from ._rows import head_of, steps, unit_of

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4e38)  # a finite stand-in for -inf: the difference of two of them is not NaN


@dataclasses.dataclass(frozen=True)
class AttentionTile:
    """Rows that a program owns, rows of the other side at a time, warps, and whether registers are given out freely.

    Else the assembler spills a few words where a few registers less let one more program run.
    """

    own: int
    step: int
    num_warps: int
    all_registers: bool = False


@dataclasses.dataclass(frozen=True)
class AttentionTiles:
    """The three passes: over the keys for the result, over the keys for q, over the queries for k and v."""

    forward: AttentionTile
    grad_queries: AttentionTile
    grad_keys: AttentionTile


# By the padded head dimension, found by compiling: nothing spills for sm_80 and sm_90, whatever the options.
HALF_TILES = {
    64: AttentionTiles(AttentionTile(64, 64, 4), AttentionTile(64, 32, 4), AttentionTile(64, 32, 4)),
    128: AttentionTiles(AttentionTile(128, 32, 8), AttentionTile(64, 32, 8), AttentionTile(64, 32, 8)),
    256: AttentionTiles(AttentionTile(64, 32, 8), AttentionTile(32, 32, 8), AttentionTile(32, 64, 8)),
}
# At 128 channels a few words would spill, of an index or scores with a bias on sm_80.
SHORT_GRAD_QUERIES = AttentionTile(64, 16, 8)
# Rows that are not aligned to 16 bytes take an address for every element, and with twice as many a few words spill;
# of float32 at 128 channels with any option too.
SMALL_HALF = AttentionTile(16, 16, 4, all_registers=True)
SMALL_FLOAT = AttentionTile(16, 16, 8, all_registers=True)
# Exact dots hold their operands in registers, those of two gradients the most.
FLOAT_TILES = {
    64: AttentionTiles(AttentionTile(32, 16, 8), AttentionTile(32, 16, 8), AttentionTile(32, 16, 8)),
    128: AttentionTiles(AttentionTile(32, 16, 8), AttentionTile(32, 16, 8), SMALL_FLOAT),
    256: AttentionTiles(SMALL_FLOAT, SMALL_FLOAT, SMALL_FLOAT),
}
FLOAT_WITH_OPTIONS = AttentionTile(32, 16, 8, all_registers=True)


def padded_head_dim(head_dim: int) -> int:
    """A power of two, and the least that tensor cores take."""
    return max(16, next_power_of_2(head_dim))


@functools.cache
def attention_tiles(head_dim: int, dtype: torch.dtype, aligned: bool, *, with_options: bool = False) -> AttentionTiles:
    """The tiles of a head dimension up to 256.

    ``with_options``: keys have a bias, queries an index, images offsets, or scores a gradient.
    """
    width = max(64, padded_head_dim(head_dim))
    if aligned and dtype != torch.float32:
        tiles = HALF_TILES[width]
        return dataclasses.replace(tiles, grad_queries=SHORT_GRAD_QUERIES) if width == 128 and with_options else tiles
    if dtype != torch.float32:
        return AttentionTiles(SMALL_HALF, SMALL_HALF, SMALL_HALF)
    if aligned and not with_options:
        return FLOAT_TILES[width]
    tile = FLOAT_WITH_OPTIONS if aligned and width == 64 else SMALL_FLOAT
    # 16 rows of 32 channels are 16 bytes for each of 128 threads.
    grad_keys = dataclasses.replace(SMALL_FLOAT, num_warps=4) if head_dim <= 32 else SMALL_FLOAT
    return AttentionTiles(tile, tile, grad_keys)


def _settings(tile: AttentionTile) -> dict[str, int]:
    settings = {"num_warps": tile.num_warps, "num_stages": 2}
    compiles = tile.all_registers and is_compiled(attention_kernel)
    if compiles and triton.runtime.driver.active.get_current_target().backend == "cuda":
        settings["maxnreg"] = 255
    return settings


@dataclasses.dataclass(frozen=True)
class ColumnTile:
    """Rows and columns of one step of a sum over rows."""

    rows: int
    columns: int
    num_warps: int


@functools.cache
def mean_tile(head_dim: int, aligned: bool) -> ColumnTile:
    """8,192 elements a step, 64 a thread: few programs, so that each must keep many loads in flight.

    Of rows that are not aligned a quarter, as 64 addresses a thread would spill.
    """
    columns = padded_head_dim(head_dim)
    return ColumnTile(rows=(8192 if aligned else 2048) // columns, columns=columns, num_warps=4)


@functools.cache
def key_tile(head_dim: int) -> ColumnTile:
    """2,048 elements a head, 16 a thread: heads follow one another, so that there are many programs."""
    columns = padded_head_dim(head_dim)
    return ColumnTile(rows=2048 // columns, columns=columns, num_warps=4)


@direct
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
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: one head of one image."""
    head = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    offsets_n = tl.arange(0, BLOCK_N)
    offsets_d = tl.arange(0, BLOCK_D)
    in_d = offsets_d < D
    values = head_of(v, batch, head.to(tl.int64), v_stride_b, v_stride_h, UNIT) + offsets_d[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, keys, BLOCK_N):
        rows = start + offsets_n
        mask = (rows < keys)[:, None] & in_d[None, :]
        acc += tl.load(values + steps(rows, v_stride_n, UNIT), mask=mask, other=0.0).to(tl.float32)
    tl.store(mean + (batch * heads + head) * D + offsets_d, tl.sum(acc, 0) / keys, mask=in_d)


@triton.jit
def _bias(row, columns, mask, stride, log2_e):
    """Of these keys, in units of log 2; -inf past the end."""
    return tl.load(row + columns.to(tl.int64) * stride, mask=mask, other=float("-inf")).to(tl.float32) * log2_e


@triton.jit
def _chosen_rows(places, index, index_stride_k, prefix, mask, first):
    """Rows of q for places in this image, which begins at ``first``: of the prefix, then those that the index names."""
    patches = places - prefix
    chosen = tl.load(index + patches.to(tl.int64) * index_stride_k, mask=mask & (patches >= 0), other=0)
    return tl.where(patches >= 0, chosen.to(tl.int64) + prefix, places.to(tl.int64)) + first


@triton.jit
def _clear_rows(target, offsets, rows, heads, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Zeros in this head's rows past the last image: all programs of a head share them."""
    first = tl.load(offsets + tl.num_programs(2))
    part = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    offsets_d = tl.arange(0, BLOCK_D)
    for start in range(first + part * BLOCK, rows, tl.num_programs(0) * tl.num_programs(2) * BLOCK):
        past = start + tl.arange(0, BLOCK)
        targets = target + (past.to(tl.int64)[:, None] * heads + tl.program_id(1)) * D + offsets_d[None, :]
        nothing = tl.zeros((BLOCK, BLOCK_D), target.dtype.element_ty)
        tl.store(targets, nothing, mask=(past < rows)[:, None] & (offsets_d < D)[None, :])


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
    scale_log2,
    log2_e,
    eps,
    heads,
    queries,
    keys,
    prefix,
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
    bias_stride_b,
    bias_stride_n,
    index_stride_b,
    index_stride_k,
    D: tl.constexpr,
    UNIT: tl.constexpr,
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
    first_m, last_m, first_n, last_n = 0, queries, 0, keys
    if index is not None:
        index += batch * index_stride_b
    if query_offsets is not None:
        first_m, last_m = tl.load(query_offsets + batch), tl.load(query_offsets + batch + 1)
        first_n, last_n = tl.load(key_offsets + batch), tl.load(key_offsets + batch + 1)
        last_n = tl.where(first_m + tl.program_id(0) * BLOCK_M < last_m, last_n, first_n)  # nothing to do
        batch = tl.full((), 0, tl.int64)
    offsets_m = first_m + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offsets_n = tl.arange(0, BLOCK_N)
    offsets_d = tl.arange(0, BLOCK_D)
    in_m = offsets_m < last_m
    in_d = offsets_d < D
    in_md = in_m[:, None] & in_d[None, :]
    query_rows = head_of(q, batch, head, q_stride_b, q_stride_h, UNIT) + offsets_d[None, :]
    rows_q = offsets_m
    if index is not None:
        rows_q = _chosen_rows(offsets_m - first_m, index, index_stride_k, prefix, in_m, first_n)
    query = tl.load(query_rows + steps(rows_q, q_stride_m, UNIT), mask=in_md, other=0.0)
    key_rows = head_of(k, batch, head, k_stride_b, k_stride_h, UNIT) + offsets_d[None, :]
    value_rows = head_of(v, batch, head, v_stride_b, v_stride_h, UNIT) + offsets_d[None, :]
    if POLICY:
        policy_row = policy + batch * policy_stride_b
    if bias is not None:
        bias_row = bias + batch * bias_stride_b
    seen_max = tl.full((BLOCK_M,), LOWEST, tl.float32)
    seen_sum = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), LOWEST, tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(first_n, last_n, BLOCK_N):
        columns = start + offsets_n
        in_n = columns < last_n
        in_nd = in_n[:, None] & in_d[None, :]
        key = tl.load(key_rows + steps(columns, k_stride_n, UNIT), mask=in_nd, other=0.0)
        logit = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        if bias is not None:
            logit += _bias(bias_row, columns, in_n, bias_stride_n, log2_e)[None, :]
        else:
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
        value = tl.load(value_rows + steps(columns, v_stride_n, UNIT), mask=in_nd, other=0.0)
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
        tl.store(logsumexp + row, (seen_max + tl.log2(seen_sum)) * LN_2, mask=in_m)
        if bias is not None or key_offsets is not None:
            seen_sum = tl.where(seen_sum == 0.0, 1.0, seen_sum)  # no key: a result of zeros
        acc = acc / seen_sum[:, None]
    targets = out + ((batch * queries + offsets_m[:, None]) * heads + head) * D + offsets_d[None, :]
    tl.store(targets, acc.to(out.dtype.element_ty), mask=in_md)
    if query_offsets is not None:
        _clear_rows(out, query_offsets, queries, heads, D, BLOCK_M, BLOCK_D)


@triton.jit
def _upstream_of_scores(row, columns, mask, stride, prefix, heads, CLASS: tl.constexpr):
    """The gradient of the scores of these keys; of the class token's, what one head adds to them."""
    if CLASS:
        columns -= prefix
        mask = mask & (columns >= 0)
    upstream = tl.load(row + columns.to(tl.int64) * stride, mask=mask, other=0.0).to(tl.float32)
    if CLASS:
        upstream = upstream / heads
    return upstream


@direct
@triton.jit
def grad_queries_kernel(
    grad,  # (B, H, M, D)
    q,  # (B, H, M, D), with an index (B, H, any, D)
    k,  # (B, H, N, D)
    v,  # (B, H, N, D)
    policy,  # (B, N) or None
    bias,  # (B, N) or None
    index,  # (B, M - prefix), of packed images (images, K), or None
    query_offsets,  # (images + 1,) int32 or None; then B is 1
    key_offsets,  # (images + 1,) int32 or None
    grad_logsumexp,  # (B, H, M), contiguous, or None
    grad_scores,  # (B, N), with CLASS (B, N - prefix), or None
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
    prefix,
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
    bias_stride_b,
    bias_stride_n,
    index_stride_b,
    index_stride_k,
    scores_stride_b,
    scores_stride_n,
    out_stride_b,
    out_stride_h,
    out_stride_m,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    POLICY: tl.constexpr,
    CLASS: tl.constexpr,
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
    first_m, last_m, first_n, last_n = 0, queries, 0, keys
    if index is not None:
        index += batch * index_stride_b
    if query_offsets is not None:
        first_m, last_m = tl.load(query_offsets + batch), tl.load(query_offsets + batch + 1)
        first_n, last_n = tl.load(key_offsets + batch), tl.load(key_offsets + batch + 1)
        last_n = tl.where(first_m + tl.program_id(0) * BLOCK_M < last_m, last_n, first_n)  # nothing to do
        batch = tl.full((), 0, tl.int64)
    offsets_m = first_m + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offsets_n = tl.arange(0, BLOCK_N)
    offsets_d = tl.arange(0, BLOCK_D)
    in_m = offsets_m < last_m
    in_d = offsets_d < D
    in_md = in_m[:, None] & in_d[None, :]
    rows_q = offsets_m
    if index is not None:
        rows_q = _chosen_rows(offsets_m - first_m, index, index_stride_k, prefix, in_m, first_n)
    query_rows = head_of(q, batch, head, q_stride_b, q_stride_h, UNIT) + offsets_d[None, :]
    query = tl.load(query_rows + steps(rows_q, q_stride_m, UNIT), mask=in_md, other=0.0)
    grad_rows = head_of(grad, batch, head, grad_stride_b, grad_stride_h, UNIT) + offsets_d[None, :]
    upstream = tl.load(grad_rows + steps(offsets_m, grad_stride_m, UNIT), mask=in_md, other=0.0)
    out_rows = head_of(out, batch, head, out_stride_b, out_stride_h, UNIT) + offsets_d[None, :]
    result = tl.load(out_rows + steps(offsets_m, out_stride_m, UNIT), mask=in_md, other=0.0).to(tl.float32)
    row = (batch * heads + head) * queries + offsets_m
    lse = tl.load(logsumexp + row, mask=in_m, other=0.0) * log2_e
    if bias is not None:
        bias_row = bias + batch * bias_stride_b
        lse = tl.where(lse == float("-inf"), float("inf"), lse)  # no key: weights of zero
    key_rows = head_of(k, batch, head, k_stride_b, k_stride_h, UNIT) + offsets_d[None, :]
    offset = tl.sum(upstream.to(tl.float32) * result, 1)
    if grad_logsumexp is not None:
        offset -= tl.load(grad_logsumexp + row, mask=in_m, other=0.0).to(tl.float32)
    if grad_scores is not None:
        score_row = grad_scores + batch * scores_stride_b
        # The mean of the scores' gradient under the attention; of the class token's only the first row has one.
        end = tl.where(tl.program_id(0) == 0, last_n, 0) if CLASS else last_n
        weighted = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, end, BLOCK_N):
            columns = start + offsets_n
            in_n = columns < last_n
            mask = in_n[:, None] & in_d[None, :]
            key = tl.load(key_rows + steps(columns, k_stride_n, UNIT), mask=mask, other=0.0)
            logit = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
            if bias is not None:
                logit += _bias(bias_row, columns, in_n, bias_stride_n, log2_e)[None, :]
            else:
                logit = tl.where(in_n[None, :], logit, float("-inf"))  # else 0, whose weight may be infinite
            of_scores = _upstream_of_scores(score_row, columns, in_n, scores_stride_n, prefix, heads, CLASS)
            weighted += tl.sum(tl.exp2(logit - lse[:, None]) * of_scores[None, :], 1)
        offset += tl.where(offsets_m == 0, weighted, 0.0) if CLASS else weighted
    tl.store(delta + row, offset, mask=in_m)
    if POLICY:
        average = tl.load(mean + (batch * heads + head) * D + offsets_d, mask=in_d, other=0.0)
        denominator = tl.load(total + row, mask=in_m, other=1.0)
        slope_of_max = (tl.sum(upstream.to(tl.float32) * average[None, :], 1) - offset) * (eps / denominator)
        row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        row_peak = tl.zeros((BLOCK_M,), tl.int32)

    value_rows = head_of(v, batch, head, v_stride_b, v_stride_h, UNIT) + offsets_d[None, :]
    if POLICY:
        policy_row = policy + batch * policy_stride_b
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(first_n, last_n, BLOCK_N):
        columns = start + offsets_n
        in_n = columns < last_n
        in_nd = in_n[:, None] & in_d[None, :]
        key = tl.load(key_rows + steps(columns, k_stride_n, UNIT), mask=in_nd, other=0.0)
        value = tl.load(value_rows + steps(columns, v_stride_n, UNIT), mask=in_nd, other=0.0)
        logit = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        if bias is not None:
            logit += _bias(bias_row, columns, in_n, bias_stride_n, log2_e)[None, :]
        else:
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
        if grad_scores is not None:
            of_scores = _upstream_of_scores(score_row, columns, in_n, scores_stride_n, prefix, heads, CLASS)[None, :]
            slope += tl.where(offsets_m[:, None] == 0, of_scores, 0.0) if CLASS else of_scores
        acc = tl.dot((weight * slope).to(key.dtype), key, acc, input_precision="ieee")

    if POLICY:
        tl.store(peak + row, row_peak, mask=in_m)
        tl.store(peak_grad + row, slope_of_max, mask=in_m)
        key = tl.load(key_rows + steps(row_peak, k_stride_n, UNIT), mask=in_md, other=0.0).to(tl.float32)
        acc += slope_of_max[:, None] * key
    targets = grad_q + ((batch * queries + offsets_m[:, None]) * heads + head) * D + offsets_d[None, :]
    tl.store(targets, (acc * scale).to(grad_q.dtype.element_ty), mask=in_md)
    if query_offsets is not None:
        _clear_rows(grad_q, query_offsets, queries, heads, D, BLOCK_M, BLOCK_D)


@direct
@triton.jit
def grad_keys_kernel(
    grad,  # (B, H, M, D)
    q,  # (B, H, M, D), with an index (B, H, any, D)
    k,  # (B, H, N, D)
    v,  # (B, H, N, D)
    policy,  # (B, N) or None
    bias,  # (B, N) or None
    index,  # (B, M - prefix), of packed images (images, K), or None
    query_offsets,  # (images + 1,) int32 or None; then B is 1
    key_offsets,  # (images + 1,) int32 or None
    grad_scores,  # (B, N), with CLASS (B, N - prefix), or None
    logsumexp,  # (B, H, M) float32, contiguous
    total,  # (B, H, M) float32, contiguous, or None
    delta,  # (B, H, M) float32, contiguous
    peak,  # (B, H, M) int32, contiguous, or None
    peak_grad,  # (B, H, M) float32, contiguous, or None
    grad_k,  # (B, N, H, D), contiguous
    grad_v,  # (B, N, H, D), contiguous
    parts,  # (B, H, N) float32, contiguous: of the policy's or the bias's gradient, or None
    scale,
    scale_log2,
    log2_e,
    eps,
    heads,
    queries,
    keys,
    prefix,
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
    bias_stride_b,
    bias_stride_n,
    index_stride_b,
    index_stride_k,
    scores_stride_b,
    scores_stride_n,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    POLICY: tl.constexpr,
    CLASS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_N keys of one head; logits stand on their side, so that they go into the next dot as they are.

    Rows past the last query have a gradient of zero, so that their weights do not matter.
    """
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    first_m, last_m, first_n, last_n = 0, queries, 0, keys
    if index is not None:
        index += batch * index_stride_b
    if query_offsets is not None:
        first_m, last_m = tl.load(query_offsets + batch), tl.load(query_offsets + batch + 1)
        first_n, last_n = tl.load(key_offsets + batch), tl.load(key_offsets + batch + 1)
        last_m = tl.where(first_n + tl.program_id(0) * BLOCK_N < last_n, last_m, first_m)  # nothing to do
        batch = tl.full((), 0, tl.int64)
    offsets_n = first_n + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets_m = tl.arange(0, BLOCK_M)
    offsets_d = tl.arange(0, BLOCK_D)
    in_n = offsets_n < last_n
    in_d = offsets_d < D
    in_nd = in_n[:, None] & in_d[None, :]
    key_rows = head_of(k, batch, head, k_stride_b, k_stride_h, UNIT) + offsets_d[None, :]
    key = tl.load(key_rows + steps(offsets_n, k_stride_n, UNIT), mask=in_nd, other=0.0)
    value_rows = head_of(v, batch, head, v_stride_b, v_stride_h, UNIT) + offsets_d[None, :]
    value = tl.load(value_rows + steps(offsets_n, v_stride_n, UNIT), mask=in_nd, other=0.0)
    if POLICY:
        sources = policy + batch * policy_stride_b + offsets_n.to(tl.int64) * policy_stride_n
        visible = tl.load(sources, mask=in_n, other=0.0).to(tl.float32)
    if bias is not None:
        added = _bias(bias + batch * bias_stride_b, offsets_n, in_n, bias_stride_n, log2_e)
    if grad_scores is not None:
        score_row = grad_scores + batch * scores_stride_b
        of_scores = _upstream_of_scores(score_row, offsets_n, in_n, scores_stride_n, prefix, heads, CLASS)[:, None]
    if parts is not None:
        acc_part = tl.zeros((BLOCK_N,), tl.float32)
    query_rows = head_of(q, batch, head, q_stride_b, q_stride_h, UNIT) + offsets_d[None, :]
    grad_rows = head_of(grad, batch, head, grad_stride_b, grad_stride_h, UNIT) + offsets_d[None, :]
    first_row = (batch * heads + head) * queries
    acc_key = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_value = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(first_m, last_m, BLOCK_M):
        rows = start + offsets_m
        in_m = rows < last_m
        in_md = in_m[:, None] & in_d[None, :]
        rows_q = rows
        if index is not None:
            rows_q = _chosen_rows(rows - first_m, index, index_stride_k, prefix, in_m, first_n)
        query = tl.load(query_rows + steps(rows_q, q_stride_m, UNIT), mask=in_md, other=0.0)
        upstream = tl.load(grad_rows + steps(rows, grad_stride_m, UNIT), mask=in_md, other=0.0)
        lse = tl.load(logsumexp + first_row + rows, mask=in_m, other=0.0) * log2_e
        offset = tl.load(delta + first_row + rows, mask=in_m, other=0.0)
        logit = tl.dot(key, tl.trans(query), input_precision="ieee") * scale_log2
        if bias is not None:
            logit += added[:, None]
            lse = tl.where(in_m & (lse > float("-inf")), lse, float("inf"))  # no key, or no query: weights of zero
        weight = tl.exp2(logit - lse[None, :])
        slope = tl.dot(value, tl.trans(upstream), input_precision="ieee") - offset[None, :]
        if grad_scores is not None:
            slope += tl.where(rows[None, :] == 0, of_scores, 0.0) if CLASS else of_scores
        if POLICY:
            own = offsets_n[:, None] == rows[None, :]
            acc_part += tl.sum(tl.where(own, 0.0, weight * slope), 1)
            weight = tl.where(own, weight, weight * visible[:, None])
            grad_logit = weight * slope
            of_max = tl.load(peak + first_row + rows, mask=in_m, other=-1)
            slope_of_max = tl.load(peak_grad + first_row + rows, mask=in_m, other=0.0)
            grad_logit += tl.where(offsets_n[:, None] == of_max[None, :], slope_of_max[None, :], 0.0)
            floor = (eps / keys) / tl.load(total + first_row + rows, mask=in_m, other=1.0)
            weight += floor[None, :]
        else:
            grad_logit = weight * slope
            if parts is not None:
                acc_part += tl.sum(grad_logit, 1)
        acc_value = tl.dot(weight.to(upstream.dtype), upstream, acc_value, input_precision="ieee")
        acc_key = tl.dot(grad_logit.to(query.dtype), query, acc_key, input_precision="ieee")

    targets = ((batch * keys + offsets_n[:, None]) * heads + head) * D + offsets_d[None, :]
    tl.store(grad_v + targets, acc_value.to(grad_v.dtype.element_ty), mask=in_nd)
    tl.store(grad_k + targets, (acc_key * scale).to(grad_k.dtype.element_ty), mask=in_nd)
    if parts is not None:
        tl.store(parts + (batch * heads + head) * keys + offsets_n, acc_part, mask=in_n)
    if key_offsets is not None:
        _clear_rows(grad_k, key_offsets, keys, heads, D, BLOCK_N, BLOCK_D)
        _clear_rows(grad_v, key_offsets, keys, heads, D, BLOCK_N, BLOCK_D)


@direct
@triton.jit
def sum_heads_kernel(
    parts,  # (B, H, N) float32, contiguous
    offsets,  # (images + 1,) int32 or None: only keys before the last of them have parts
    summed,  # (B, N), contiguous
    images,
    heads,
    keys,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_N keys, heads in order."""
    batch = tl.program_id(1).to(tl.int64)
    offsets_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = offsets_n < keys
    with_parts = in_n
    if offsets is not None:
        with_parts = offsets_n < tl.load(offsets + images)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for head in range(heads):
        acc += tl.load(parts + (batch * heads + head) * keys + offsets_n, mask=with_parts, other=0.0)
    tl.store(summed + batch * keys + offsets_n, acc.to(summed.dtype.element_ty), mask=in_n)


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
    q_stride_b,
    q_stride_h,
    q_stride_m,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    bias_stride_b,
    bias_stride_n,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_N keys of one head, over the queries."""
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    offsets_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets_m = tl.arange(0, BLOCK_M)
    offsets_d = tl.arange(0, BLOCK_D)
    in_n = offsets_n < keys
    in_d = offsets_d < D
    key_rows = head_of(k, batch, head, k_stride_b, k_stride_h, UNIT) + offsets_d[None, :]
    in_nd = in_n[:, None] & in_d[None, :]
    key = tl.load(key_rows + steps(offsets_n, k_stride_n, UNIT), mask=in_nd, other=0.0)
    if bias is not None:
        added = _bias(bias + batch * bias_stride_b, offsets_n, in_n, bias_stride_n, log2_e)
    query_rows = head_of(q, batch, head, q_stride_b, q_stride_h, UNIT) + offsets_d[None, :]
    first_row = (batch * heads + head) * queries
    received = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, queries, BLOCK_M):
        rows = start + offsets_m
        in_m = rows < queries
        mask = in_m[:, None] & in_d[None, :]
        query = tl.load(query_rows + steps(rows, q_stride_m, UNIT), mask=mask, other=0.0)
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
    q_stride_b,
    q_stride_h,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    bias_stride_b,
    bias_stride_n,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_N keys of one image, over the heads."""
    batch = tl.program_id(1).to(tl.int64)
    offsets_n = prefix + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets_d = tl.arange(0, BLOCK_D)
    in_n = offsets_n < keys
    in_d = offsets_d < D
    query_row = q + batch * q_stride_b + offsets_d
    if bias is not None:
        added = _bias(bias + batch * bias_stride_b, offsets_n, in_n, bias_stride_n, log2_e)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    first_head = k + tl.multiple_of(batch * k_stride_b, UNIT)
    key_rows = first_head + steps(offsets_n, k_stride_n, UNIT) + offsets_d[None, :]
    next_head = tl.multiple_of(tl.cast(k_stride_h, tl.int64), UNIT)
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
        query_row += q_stride_h
    tl.store(scores + batch * (keys - prefix) + offsets_n - prefix, acc / heads, mask=in_n)


_SAVED = ("out", "logsumexp", "total", "mean")  # by the forward pass


def _launches(images, index, offsets):
    """Number, index and offsets of the images of each launch: several for more packed ones than a grid takes."""
    parts = parts_of_images(images)
    if len(parts) == 1:
        return [(images, index, offsets or (None, None))]
    return [
        (
            part.stop - part.start,
            None if index is None else index[part],
            tuple(bounds[part.start : part.stop + 1] for bounds in offsets),
        )
        for part in parts
    ]


def _strides(tensor: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0) if tensor is None else tensor.stride()


@in_parts("q", "k", "v", "policy", "bias", "index")
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    policy: torch.Tensor | None,
    scale: float,
    eps: float,
    bias: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    prefix: int = 0,
    offsets: tuple[torch.Tensor, torch.Tensor] | None = None,
    longest: tuple[int, int] = (0, 0),
    num_out: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One launch, two with a policy; q (B, H, M, D), k and v (B, H, N, D), dense last axes, policy (B, N) or None.

    A bias is (B, N), an index (B, K): then M is prefix + K in what follows. With offsets of the queries and the keys,
    (images + 1,) int32 each, B is 1, and ``longest`` says how many of either an image has at most. With both, the index
    is (images, K), M is ``num_out``, and the queries are chosen from where the image's keys are.

    Returns out (B, H, M, D), and for the backward pass logsumexp (B, H, M), total (B, H, M), the mean (B, H, D) of v;
    without a policy the last two are empty.
    """
    batch, heads, queries, head_dim = q.shape
    if index is not None:
        queries = prefix + index.shape[1] if offsets is None else num_out
    keys = k.shape[2]
    hidden = policy is not None
    out = torch.empty(batch, queries, heads, head_dim, dtype=q.dtype, device=q.device)
    logsumexp = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    total = torch.empty(batch, heads, queries if hidden else 0, dtype=torch.float32, device=q.device)
    mean = torch.empty(batch, heads, head_dim if hidden else 0, dtype=torch.float32, device=q.device)
    images, most = (batch, queries) if offsets is None else (offsets[0].shape[0] - 1, max(1, longest[0]))
    if out.numel() == 0 or images == 0:
        return out.zero_().transpose(1, 2), logsumexp, total, mean
    if hidden:
        unit = unit_of(v)
        columns = mean_tile(head_dim, unit > 1)
        mean_values_kernel[(heads, batch)](
            v,
            mean,
            heads,
            keys,
            *v.stride()[:3],
            D=head_dim,
            UNIT=unit,
            BLOCK_N=columns.rows,
            BLOCK_D=columns.columns,
            num_warps=columns.num_warps,
        )
    unit = unit_of(q, k, v)
    used = any(option is not None for option in (bias, index, offsets))
    tile = attention_tiles(head_dim, q.dtype, unit > 1, with_options=used).forward
    for count, chosen, bounds in _launches(images, index, offsets):
        attention_kernel[(cdiv(most, tile.own), heads, count)](
            q,
            k,
            v,
            policy,
            bias,
            chosen,
            *bounds,
            mean if hidden else None,
            out,
            logsumexp,
            total if hidden else None,
            scale * LOG2_E,
            LOG2_E,
            eps,
            heads,
            queries,
            keys,
            prefix,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *_strides(policy),
            *_strides(bias),
            *_strides(index),
            D=head_dim,
            UNIT=unit,
            POLICY=hidden,
            BLOCK_M=tile.own,
            BLOCK_N=tile.step,
            BLOCK_D=padded_head_dim(head_dim),
            **_settings(tile),
        )
    return out.transpose(1, 2), logsumexp, total, mean


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
    """What keys get of the attention whose logsumexp (B, H, M) this is: of the first query's, averaged over heads.

    One launch -> (B, N - prefix). ``kind="received"``: of all, summed over heads and queries; two -> (B, N).
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
        class_tile = key_tile(head_dim)
        class_kernel[(cdiv(keys - prefix, class_tile.rows), batch)](
            q,
            k,
            bias,
            logsumexp,
            scores,
            *numbers,
            prefix,
            *q.stride()[:2],
            *k.stride()[:3],
            *_strides(bias),
            D=head_dim,
            UNIT=unit,
            BLOCK_N=class_tile.rows,
            BLOCK_D=class_tile.columns,
            num_warps=class_tile.num_warps,
        )
        return scores
    parts = torch.empty(batch, heads, keys, dtype=torch.float32, device=q.device)
    tile = attention_tiles(head_dim, q.dtype, unit > 1, with_options=bias is not None).forward
    received_kernel[(cdiv(keys, tile.own), heads, batch)](
        q,
        k,
        bias,
        logsumexp,
        parts,
        *numbers,
        *q.stride()[:3],
        *k.stride()[:3],
        *_strides(bias),
        D=head_dim,
        UNIT=unit,
        BLOCK_M=tile.step,
        BLOCK_N=tile.own,
        BLOCK_D=padded_head_dim(head_dim),
        **_settings(tile),
    )
    _sum_heads(parts, scores)
    return scores


def _sum_heads(parts: torch.Tensor, summed: torch.Tensor, offsets: torch.Tensor | None = None) -> None:
    batch, heads, keys = parts.shape
    images = 0 if offsets is None else offsets.shape[0] - 1
    sum_heads_kernel[(cdiv(keys, 256), batch)](parts, offsets, summed, images, heads, keys, BLOCK_N=256, num_warps=4)


@in_parts("grad", "q", "k", "v", *_SAVED, "policy", "bias", "index", "grad_logsumexp", "grad_scores")
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
    bias: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    prefix: int = 0,
    offsets: tuple[torch.Tensor, torch.Tensor] | None = None,
    longest: tuple[int, int] = (0, 0),
    grad_logsumexp: torch.Tensor | None = None,
    grad_scores: torch.Tensor | None = None,
    kind: str = "",
    with_bias: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two launches; grad (B, H, M, D) -> gradients of q, k, v and the policy or the bias, (B, 0) without.

    A third with a policy, or with a bias if ``with_bias``. With an index the first gradient is that of the chosen
    queries, (B, H, prefix + K, D). Gradients of the logsumexp (B, H, M) and of the ``kind`` of :func:`key_scores` join.
    """
    batch, heads, queries, head_dim = grad.shape
    keys = k.shape[2]
    hidden = policy is not None
    of_keys = policy if policy is not None else bias if with_bias else None
    grad_q = torch.empty(batch, queries, heads, head_dim, dtype=q.dtype, device=q.device)
    grad_k = torch.empty(batch, keys, heads, head_dim, dtype=k.dtype, device=k.device)
    grad_v = torch.empty_like(grad_k)
    if of_keys is None:
        dtype = q.dtype if bias is None else bias.dtype
        grad_of_keys = torch.empty(batch, 0, dtype=dtype, device=q.device)
    else:
        grad_of_keys = torch.empty(batch, keys, dtype=of_keys.dtype, device=q.device)
    images, rows, columns = batch, queries, keys
    if offsets is not None:
        images, rows, columns = offsets[0].shape[0] - 1, max(1, longest[0]), max(1, longest[1])
    if images == 0 or queries == 0:
        for gradient in (grad_q, grad_k, grad_v, grad_of_keys):
            gradient.zero_()
        return grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v.transpose(1, 2), grad_of_keys
    delta = torch.empty_like(logsumexp)
    peak_grad = torch.empty_like(logsumexp) if hidden else None
    peak = torch.empty(logsumexp.shape, dtype=torch.int32, device=q.device) if hidden else None
    parts = None if of_keys is None else torch.empty(batch, heads, keys, dtype=torch.float32, device=q.device)
    numbers = (scale, scale * LOG2_E, LOG2_E, eps, heads, queries, keys, prefix)
    strides = (
        *(*grad.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
        *(*_strides(policy), *_strides(bias), *_strides(index), *_strides(grad_scores)),
    )
    unit = unit_of(grad, q, k, v, out)
    used = any(option is not None for option in (bias, index, offsets, grad_scores))
    tiles = attention_tiles(head_dim, q.dtype, unit > 1, with_options=used)
    settings = {
        "D": head_dim,
        "UNIT": unit,
        "POLICY": hidden,
        "CLASS": kind == "class",
        "BLOCK_D": padded_head_dim(head_dim),
    }
    tile = tiles.grad_queries
    for count, chosen, bounds in _launches(images, index, offsets):
        grad_queries_kernel[(cdiv(rows, tile.own), heads, count)](
            grad,
            q,
            k,
            v,
            policy,
            bias,
            chosen,
            *bounds,
            None if grad_logsumexp is None else grad_logsumexp.contiguous(),
            grad_scores,
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
            BLOCK_M=tile.own,
            BLOCK_N=tile.step,
            **settings,
            **_settings(tile),
        )
    tile = tiles.grad_keys
    for count, chosen, bounds in _launches(images, index, offsets):
        grad_keys_kernel[(cdiv(columns, tile.own), heads, count)](
            grad,
            q,
            k,
            v,
            policy,
            bias,
            chosen,
            *bounds,
            grad_scores,
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
            BLOCK_M=tile.step,
            BLOCK_N=tile.own,
            **settings,
            **_settings(tile),
        )
    if parts is not None:
        _sum_heads(parts, grad_of_keys, None if offsets is None else offsets[1])
    return grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v.transpose(1, 2), grad_of_keys
