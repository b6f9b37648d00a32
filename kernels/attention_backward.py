"""Gradients of attention: logits are recomputed in tiles, weights from the saved logsumexp of every row.

There are two launches, and a third that sums the gradient of a policy or of a bias over the heads.
"""

from __future__ import annotations

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
    launches,
    load_bias,
    load_columns,
    load_rows,
    sum_heads,
    takes_whole,
    whole_tile,
)
from ._direct import cdiv, direct
from ._launch import in_parts, strides
from ._rows import head_of, padded_head_dim, steps, unit_of


@triton.jit
def _upstream_of_scores(row, columns, mask, stride, prefix, heads, CLASS: tl.constexpr):
    """Return the gradient of these keys' scores in float32; with CLASS the share of one head of their mean."""
    if CLASS:
        columns -= prefix
        mask = mask & (columns >= 0)
    upstream = tl.load(row + columns.to(tl.int64) * stride, mask=mask, other=0.0).to(tl.float32)
    if CLASS:
        upstream = upstream / heads
    return upstream


@triton.jit
def _logits(query, key, columns, in_n, bias_row, bias_stride_n, scale_log2, log2_e, LAST: tl.constexpr):
    """Return logits (BLOCK_M, BLOCK_N) float32 in units of log 2, -inf past the last key."""
    logit = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
    if bias_row is not None:
        logit += load_bias(bias_row, columns, in_n, bias_stride_n, log2_e)[None, :]
    elif LAST:
        logit = tl.where(in_n[None, :], logit, float("-inf"))  # a logit of 0 might have an infinite weight
    return logit


@triton.jit
def _weigh(
    columns,  # (BLOCK_N,) keys
    last_n,
    query,
    lse,
    key_rows,
    bias_row,
    score_row,
    scale_log2,
    log2_e,
    heads,
    prefix,
    k_strides,
    bias_strides,
    scores_strides,
    CLASS: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LAST: tl.constexpr,
):
    """Return the attention to BLOCK_N keys times the gradient of their scores, summed over these keys."""
    in_n = columns < last_n if LAST else None
    key = load_rows(key_rows + steps(columns, k_strides[2], UNIT), in_n, D, BLOCK_D)
    logit = _logits(query, key, columns, in_n, bias_row, bias_strides[1], scale_log2, log2_e, LAST)
    of_scores = _upstream_of_scores(score_row, columns, columns < last_n, scores_strides[1], prefix, heads, CLASS)
    return tl.sum(tl.exp2(logit - lse[:, None]) * of_scores[None, :], 1)


@triton.jit
def _give(target, rows, weight, factor, columns, last_n, heads, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write gradients of BLOCK_N keys: the queries' ``rows``, summed by ``weight`` and multiplied by ``factor``."""
    offsets_d = tl.arange(0, BLOCK_D)
    found = tl.dot(tl.trans(rows), weight.to(rows.dtype), input_precision="ieee") * factor
    targets = target + columns.to(tl.int64)[None, :] * (heads * D) + offsets_d[:, None]
    tl.store(targets, found.to(target.dtype.element_ty), mask=(columns < last_n)[None, :] & (offsets_d < D)[:, None])


@triton.jit
def _step(
    columns,  # (BLOCK_N,) keys, of the last step some past the end
    last_n,
    query,  # (BLOCK_M, BLOCK_D)
    upstream,  # (BLOCK_M, BLOCK_D)
    offsets_m,
    lse,
    offset,
    key_rows,
    value_rows,
    policy_row,
    bias_row,
    score_row,
    grad_keys,  # pointer to the row of this head's first key in the image, or None
    grad_values,
    parts,
    scale,
    scale_log2,
    log2_e,
    heads,
    prefix,
    k_strides,
    v_strides,
    policy_strides,
    bias_strides,
    scores_strides,
    acc,
    row_max,
    row_peak,
    CLASS: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LAST: tl.constexpr,
):
    """Add the share of BLOCK_N keys to the queries' gradient; given ``grad_keys``, write the keys' gradients too."""
    in_n = columns < last_n if LAST else None
    key = load_rows(key_rows + steps(columns, k_strides[2], UNIT), in_n, D, BLOCK_D)
    value = load_rows(value_rows + steps(columns, v_strides[2], UNIT), in_n, D, BLOCK_D)
    logit = _logits(query, key, columns, in_n, bias_row, bias_strides[1], scale_log2, log2_e, LAST)
    weight = tl.exp2(logit - lse[:, None])
    if grad_keys is not None:  # written here already, which holds fewer registers
        _give(grad_values, upstream, weight, 1.0, columns, last_n, heads, D, BLOCK_D)
    slope = tl.dot(upstream, tl.trans(value), input_precision="ieee") - offset[:, None]
    if score_row is not None:
        of_scores = _upstream_of_scores(score_row, columns, columns < last_n, scores_strides[1], prefix, heads, CLASS)
        slope += tl.where(offsets_m[:, None] == 0, of_scores[None, :], 0.0) if CLASS else of_scores[None, :]
    if policy_row is not None:
        # The first key that reaches a row's largest logit; the last keys come first.
        tile_max, tile_peak = tl.max(logit, 1, return_indices=True, return_indices_tie_break_left=True)
        tile_peak += tl.min(columns, 0)
        sooner = (tile_max > row_max) | ((tile_max == row_max) & (tile_peak < row_peak))
        row_peak = tl.where(sooner, tile_peak, row_peak)
        row_max = tl.maximum(row_max, tile_max)
        visible = load_columns(policy_row, columns, in_n, policy_strides[1])
        own = offsets_m[:, None] == columns[None, :]
        weight = tl.where(own, weight, weight * visible[None, :])
    grad_logit = weight * slope
    if grad_keys is not None:
        if parts is not None:
            tl.store(parts + columns, tl.sum(grad_logit, 0), mask=columns < last_n)
        _give(grad_keys, query, grad_logit, scale, columns, last_n, heads, D, BLOCK_D)
    acc = tl.dot(grad_logit.to(key.dtype), key, acc, input_precision="ieee")
    return acc, row_max, row_peak


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
    grad_scores,  # (B, N), with CLASS (B, N - prefix), or None
    out,  # (B, H, M, D)
    logsumexp,  # (B, H, M) float32, contiguous
    total,  # (B, H, M) float32, contiguous, or None
    mean,  # (B, H, D) float32, contiguous, or None
    grad_q,  # (B, M, H, D), contiguous
    grad_k,  # (B, N, H, D), contiguous, or None
    grad_v,  # (B, N, H, D), contiguous, or None
    parts,  # (B, H, N) float32, contiguous: of the policy's or the bias's gradient, or None
    delta,  # (B, H, M) float32, contiguous, or None
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
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    policy_strides,
    bias_strides,
    index_strides,
    scores_strides,
    out_strides,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    CLASS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LAST_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the gradients of BLOCK_M queries of one head in each program; grid (blocks of queries, heads, images).

    Given ``grad_k`` and ``grad_v``, a program has all queries of the head, and writes the gradients of the keys too.
    Otherwise it writes ``delta`` (and ``peak``) of every query for the pass over the keys. With a policy the maximum
    of a row over all keys has a gradient too, which goes to the first key that reaches it.
    """
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    first_m, last_m, first_n, last_n = 0, queries, 0, keys
    if index is not None:
        index += batch * index_strides[0]
    if query_offsets is not None:
        first_m, last_m = tl.load(query_offsets + batch), tl.load(query_offsets + batch + 1)
        first_n, last_n = tl.load(key_offsets + batch), tl.load(key_offsets + batch + 1)
        if grad_k is None:
            last_n = tl.where(first_m + tl.program_id(0) * BLOCK_M < last_m, last_n, first_n)  # nothing to do
        batch = tl.full((), 0, tl.int64)
    offsets_m = first_m + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offsets_d = tl.arange(0, BLOCK_D)
    in_m = offsets_m < last_m
    in_d = offsets_d < D
    in_md = in_m[:, None] & in_d[None, :]
    rows_q = offsets_m
    if index is not None:
        rows_q = chosen_rows(offsets_m - first_m, index, index_strides[1], prefix, in_m, first_n)
    query_rows = head_of(q, batch, head, q_strides, UNIT) + offsets_d[None, :]
    query = tl.load(query_rows + steps(rows_q, q_strides[2], UNIT), mask=in_md, other=0.0)
    grad_rows = head_of(grad, batch, head, grad_strides, UNIT) + offsets_d[None, :]
    upstream = tl.load(grad_rows + steps(offsets_m, grad_strides[2], UNIT), mask=in_md, other=0.0)
    out_rows = head_of(out, batch, head, out_strides, UNIT) + offsets_d[None, :]
    result = tl.load(out_rows + steps(offsets_m, out_strides[2], UNIT), mask=in_md, other=0.0).to(tl.float32)
    row = (batch * heads + head) * queries + offsets_m
    lse = tl.load(logsumexp + row, mask=in_m, other=float("inf")) * log2_e
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # no key: weights of zero
    key_rows = head_of(k, batch, head, k_strides, UNIT) + offsets_d[None, :]
    value_rows = head_of(v, batch, head, v_strides, UNIT) + offsets_d[None, :]
    policy_row, bias_row, score_row, grad_keys, grad_values, of_keys = policy, bias, grad_scores, grad_k, grad_v, parts
    if policy is not None:
        policy_row = policy + batch * policy_strides[0]
    if bias is not None:
        bias_row = bias + batch * bias_strides[0]
    if grad_scores is not None:
        score_row = grad_scores + batch * scores_strides[0]
    if grad_k is not None:
        first = (batch * keys * heads + head) * D
        grad_keys, grad_values = grad_k + first, grad_v + first
    if parts is not None:
        of_keys = parts + (batch * heads + head) * keys
    offset = tl.sum(upstream.to(tl.float32) * result, 1)
    MASKED: tl.constexpr = LAST_N < 0
    whole = last_n if MASKED else first_n + (last_n - first_n) // BLOCK_N * BLOCK_N
    if query_offsets is not None:
        whole = tl.maximum(whole, first_n + 1)  # an image without keys takes a step in which all are masked
    if grad_scores is not None:
        # The attention times the gradient of the scores. With CLASS it is zero in all rows but the first.
        weighted = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(first_n, tl.where(tl.program_id(0) == 0, whole, 0) if CLASS else whole, BLOCK_N):
            weighted += _weigh(
                *(start + tl.arange(0, BLOCK_N), last_n, query, lse, key_rows, bias_row, score_row, scale_log2, log2_e),
                *(heads, prefix, k_strides, bias_strides, scores_strides, CLASS, D, UNIT, BLOCK_D, MASKED),
            )
        if LAST_N > 0:
            weighted += _weigh(
                *(whole + tl.arange(0, LAST_N), last_n, query, lse, key_rows, bias_row, score_row, scale_log2, log2_e),
                *(heads, prefix, k_strides, bias_strides, scores_strides, CLASS, D, UNIT, BLOCK_D, True),
            )
        offset += tl.where(offsets_m == 0, weighted, 0.0) if CLASS else weighted

    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_peak = tl.zeros((BLOCK_M,), tl.int32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if LAST_N > 0:
        acc, row_max, row_peak = _step(
            *(whole + tl.arange(0, LAST_N), last_n, query, upstream, offsets_m, lse, offset, key_rows, value_rows),
            *(policy_row, bias_row, score_row, grad_keys, grad_values, of_keys, scale, scale_log2, log2_e, heads),
            *(prefix, k_strides, v_strides, policy_strides, bias_strides, scores_strides),
            *(acc, row_max, row_peak, CLASS, D, UNIT, BLOCK_D, True),
        )
    tl.assume(whole > first_n)  # see the forward kernel
    for start in range(first_n, whole, BLOCK_N):
        acc, row_max, row_peak = _step(
            *(start + tl.arange(0, BLOCK_N), last_n, query, upstream, offsets_m, lse, offset, key_rows, value_rows),
            *(policy_row, bias_row, score_row, grad_keys, grad_values, of_keys, scale, scale_log2, log2_e, heads),
            *(prefix, k_strides, v_strides, policy_strides, bias_strides, scores_strides),
            *(acc, row_max, row_peak, CLASS, D, UNIT, BLOCK_D, MASKED),
        )

    if grad_k is None:
        tl.store(delta + row, offset, mask=in_m)
    if policy is not None:
        average = tl.load(mean + (batch * heads + head) * D + offsets_d, mask=in_d, other=0.0)
        denominator = tl.load(total + row, mask=in_m, other=1.0)
        slope_of_max = (tl.sum(upstream.to(tl.float32) * average[None, :], 1) - offset) * (eps / denominator)
        tl.store(peak + row, row_peak, mask=in_m)
        tl.store(peak_grad + row, slope_of_max, mask=in_m)
        key = tl.load(key_rows + steps(row_peak, k_strides[2], UNIT), mask=in_md, other=0.0).to(tl.float32)
        acc += slope_of_max[:, None] * key
    targets = grad_q + ((batch * queries + offsets_m[:, None]) * heads + head) * D + offsets_d[None, :]
    tl.store(targets, (acc * scale).to(grad_q.dtype.element_ty), mask=in_md)
    if query_offsets is not None:
        clear_rows(grad_q, query_offsets, queries, heads, D, BLOCK_M, BLOCK_D)
        if grad_k is not None:
            clear_rows(grad_k, key_offsets, keys, heads, D, BLOCK_N, BLOCK_D)
            clear_rows(grad_v, key_offsets, keys, heads, D, BLOCK_N, BLOCK_D)


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
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    policy_strides,
    bias_strides,
    index_strides,
    scores_strides,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    POLICY: tl.constexpr,
    CLASS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the gradients of BLOCK_N keys of one head in each program; grid (blocks of keys, heads, images).

    Logits are (BLOCK_N, BLOCK_M), so that the next dot takes them without a transposition.
    Rows past the last query have a gradient of zero, so their weights do not matter.
    """
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    first_m, last_m, first_n, last_n = 0, queries, 0, keys
    if index is not None:
        index += batch * index_strides[0]
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
    key_rows = head_of(k, batch, head, k_strides, UNIT) + offsets_d[None, :]
    key = tl.load(key_rows + steps(offsets_n, k_strides[2], UNIT), mask=in_nd, other=0.0)
    value_rows = head_of(v, batch, head, v_strides, UNIT) + offsets_d[None, :]
    value = tl.load(value_rows + steps(offsets_n, v_strides[2], UNIT), mask=in_nd, other=0.0)
    if POLICY:
        sources = policy + batch * policy_strides[0] + offsets_n.to(tl.int64) * policy_strides[1]
        visible = tl.load(sources, mask=in_n, other=0.0).to(tl.float32)
    if bias is not None:
        added = load_bias(bias + batch * bias_strides[0], offsets_n, in_n, bias_strides[1], log2_e)
    if grad_scores is not None:
        score_row = grad_scores + batch * scores_strides[0]
        of_scores = _upstream_of_scores(score_row, offsets_n, in_n, scores_strides[1], prefix, heads, CLASS)[:, None]
    if parts is not None:
        acc_part = tl.zeros((BLOCK_N,), tl.float32)
    query_rows = head_of(q, batch, head, q_strides, UNIT) + offsets_d[None, :]
    grad_rows = head_of(grad, batch, head, grad_strides, UNIT) + offsets_d[None, :]
    first_row = (batch * heads + head) * queries
    acc_key = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_value = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(first_m, last_m, BLOCK_M):
        rows = start + offsets_m
        in_m = rows < last_m
        in_md = in_m[:, None] & in_d[None, :]
        rows_q = rows
        if index is not None:
            rows_q = chosen_rows(rows - first_m, index, index_strides[1], prefix, in_m, first_n)
        query = tl.load(query_rows + steps(rows_q, q_strides[2], UNIT), mask=in_md, other=0.0)
        upstream = tl.load(grad_rows + steps(rows, grad_strides[2], UNIT), mask=in_md, other=0.0)
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
        clear_rows(grad_k, key_offsets, keys, heads, D, BLOCK_N, BLOCK_D)
        clear_rows(grad_v, key_offsets, keys, heads, D, BLOCK_N, BLOCK_D)


_SAVED = ("out", "logsumexp")  # by the forward pass


@in_parts("grad", "q", "k", "v", *_SAVED, "bias", "index", "grad_scores")
def attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    prefix: int = 0,
    query_offsets: torch.Tensor | None = None,
    key_offsets: torch.Tensor | None = None,
    longest_queries: int = 0,
    longest_keys: int = 0,
    grad_scores: torch.Tensor | None = None,
    kind: str = "",
    with_bias: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch twice; grad (B, H, M, D) -> gradients of q, k, v and of the bias (B, N).

    The bias has its gradient from a third launch if ``with_bias``; otherwise it is (B, 0). With an index, the gradient
    of q is the one of the chosen queries, (B, H, prefix + K, D). ``grad_scores`` is the gradient of :func:`key_scores`.
    """
    of_keys = bias if with_bias else None
    offsets = None if query_offsets is None or key_offsets is None else (query_offsets, key_offsets)
    longest = longest_queries, longest_keys
    grad_q, grad_k, grad_v, grad_bias = _backward(
        *(grad, q, k, v, None, out, logsumexp, None, None, scale, 0.0),
        *(bias, index, prefix, offsets, longest, grad_scores, kind, of_keys),
    )
    if grad_bias is None:
        grad_bias = torch.empty(grad.shape[0], 0, dtype=(q if bias is None else bias).dtype, device=q.device)
    return grad_q, grad_k, grad_v, grad_bias


@in_parts("grad", "q", "k", "v", "policy", *_SAVED, "total", "mean")
def attention_policy_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    policy: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    total: torch.Tensor,
    mean: torch.Tensor,
    scale: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch three times; grad (B, H, N, D) -> gradients of q, k, v (B, H, N, D) and of the policy (B, N)."""
    grad_q, grad_k, grad_v, grad_policy = _backward(
        *(grad, q, k, v, policy, out, logsumexp, total, mean, scale, eps),
        *(None, None, 0, None, (0, 0), None, "", policy),
    )
    assert grad_policy is not None
    return grad_q, grad_k, grad_v, grad_policy


def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    policy: torch.Tensor | None,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    total: torch.Tensor | None,
    mean: torch.Tensor | None,
    scale: float,
    eps: float,
    bias: torch.Tensor | None,
    index: torch.Tensor | None,
    prefix: int,
    offsets: tuple[torch.Tensor, torch.Tensor] | None,
    longest: tuple[int, int],
    grad_scores: torch.Tensor | None,
    kind: str,
    of_keys: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Launch, and return the gradients of q, k, v and of ``of_keys``: the policy, the bias, or None."""
    batch, heads, queries, head_dim = grad.shape
    keys = k.shape[2]
    hidden = policy is not None
    grad_q = torch.empty(batch, queries, heads, head_dim, dtype=q.dtype, device=q.device)
    grad_k = torch.empty(batch, keys, heads, head_dim, dtype=k.dtype, device=k.device)
    grad_v = torch.empty_like(grad_k)
    grad_of_keys = None if of_keys is None else torch.empty(batch, keys, dtype=of_keys.dtype, device=q.device)
    images, rows, columns = batch, queries, keys
    if offsets is not None:
        images, rows, columns = offsets[0].shape[0] - 1, max(1, longest[0]), max(1, longest[1])
    if images == 0 or queries == 0:
        for gradient in (grad_q, grad_k, grad_v, grad_of_keys):
            if gradient is not None:
                gradient.zero_()
        return grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v.transpose(1, 2), grad_of_keys
    parts = None if of_keys is None else torch.empty(batch, heads, keys, dtype=torch.float32, device=q.device)
    numbers = (scale, scale * LOG2_E, LOG2_E, eps, heads, queries, keys, prefix)
    all_strides = (
        *(strides(grad, 3), strides(q, 3), strides(k, 3), strides(v, 3)),
        *(strides(policy, 2), strides(bias, 2), strides(index, 2), strides(grad_scores, 2)),
    )
    unit = unit_of(grad, q, k, v, out)
    used = bias is not None or index is not None or offsets is not None or grad_scores is not None
    shape = {"D": head_dim, "UNIT": unit, "CLASS": kind == "class", "BLOCK_D": padded_head_dim(head_dim)}
    _, queries_tile, keys_tile = attention_tiles(head_dim, q.dtype, unit > 1, with_options=used)
    alone = not hidden and grad_scores is None and takes_whole()
    at_once = whole_tile(rows, head_dim, q.dtype, unit > 1) if alone else None
    whole, tile = at_once is not None, at_once or queries_tile
    apart = not whole and has_last_step(head_dim, q.dtype, unit)
    delta = peak = peak_grad = None
    if not whole:
        delta = torch.empty_like(logsumexp)
        if hidden:
            peak_grad = torch.empty_like(logsumexp)
            peak = torch.empty(logsumexp.shape, dtype=torch.int32, device=q.device)
    for count, chosen, bounds in launches(images, index, *(offsets or (None, None))):
        grad_queries_kernel[(cdiv(rows, tile["BLOCK_M"]), heads, count)](
            *(grad, q, k, v, policy, bias, chosen, *bounds, grad_scores, out, logsumexp, total, mean, grad_q),
            *(grad_k if whole else None, grad_v if whole else None, parts if whole else None, delta, peak, peak_grad),
            *numbers,
            *(*all_strides, strides(out, 3)),
            LAST_N=last_keys(keys, tile["BLOCK_N"]) if apart and offsets is None else -1,
            **shape,
            **tile,
        )
    for count, chosen, bounds in () if whole else launches(images, index, *(offsets or (None, None))):
        grad_keys_kernel[(cdiv(columns, keys_tile["BLOCK_N"]), heads, count)](
            *(grad, q, k, v, policy, bias, chosen, *bounds, grad_scores, logsumexp, total, delta, peak, peak_grad),
            *(grad_k, grad_v),
            *(parts, *numbers),
            *all_strides,
            POLICY=hidden,
            **shape,
            **keys_tile,
        )
    if parts is not None and grad_of_keys is not None:
        sum_heads(parts, grad_of_keys, None if offsets is None else offsets[1])
    return grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v.transpose(1, 2), grad_of_keys
