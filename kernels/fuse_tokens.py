"""Kept rows and one score-weighted sum of the others, in one pass with the residual addition and the next norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._direct import cdiv, direct
from ._launch import Tile, in_parts, row_tile, strides, whole_rows
from ._norm import (
    SUMMED_ROWS,
    _norm_gradient,
    _store_normed,
    _store_sums,
    _vector,
    added_up,
    backward_tile,
    empty_sums,
    norm_rows,
    normed_like,
)

# Sum of the rest: narrow channel blocks give a small batch many programs; 64 rows are four 16-byte loads a thread.
SUM_TILE = Tile(SUM_ROWS=64, SUM_BLOCK_C=64, num_warps=4)
# With a norm one program sums whole rows, 32 elements a thread and step. Beyond this many rows an image would wait for
# it, so the norm takes a launch of its own.
NORM_WARPS = 8
NORM_ELEMENTS = 8192
MOST_SUMMED = 512
# Backward: whole rows in steps of 128 channels, which divide most widths; the fused row is read once.
SHARE_TILE = Tile(ROWS=16, BLOCK_C=128, num_warps=4)
SHARE_TILE_BIAS = Tile(SHARE_TILE, ROWS=8)  # float32: with 16 rows, triton 3.8 spills on sm_90


@triton.jit
def _copy_kept(
    x,
    order,
    residual,
    out,
    num_kept,
    channels,
    x_strides,
    order_strides,
    residual_strides,
    weight,
    bias,
    normed,
    statistics,
    row_block,
    channel_block,
    NORM_EPS: tl.constexpr,
    PREFIX: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = row_block * ROWS + tl.arange(0, ROWS)
    offsets_c = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_rows = rows < num_kept
    is_patch = in_rows & (rows >= PREFIX)
    picked = tl.load(order + (rows - PREFIX).to(tl.int64) * order_strides[1], mask=is_patch, other=0)
    source = tl.where(is_patch, picked.to(tl.int64) + PREFIX, rows.to(tl.int64))
    mask = in_rows[:, None] & (offsets_c < channels)[None, :]
    value = tl.load(x + source[:, None] * x_strides[1] + offsets_c[None, :], mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        targets = rows.to(tl.int64)[:, None] * residual_strides[1] + offsets_c[None, :]
        value += tl.load(residual + targets, mask=mask, other=0.0).to(tl.float32)
    stored = value.to(out.dtype.element_ty)
    tl.store(out + rows[:, None] * channels + offsets_c[None, :], stored, mask=mask)
    if normed is not None:
        row = rows.to(tl.int64)
        _store_normed(stored, mask, row, in_rows, offsets_c, weight, bias, normed, statistics, channels, NORM_EPS)


@triton.jit
def _sum_rest(
    x,
    order,
    scores,
    residual,
    residual_bias,
    out,
    num_kept,
    tokens,
    channels,
    x_strides,
    order_strides,
    scores_strides,
    residual_strides,
    weight,
    bias,
    normed,
    statistics,
    channel_block,
    NORM_EPS: tl.constexpr,
    PREFIX: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offsets_c = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = offsets_c < channels
    acc = tl.zeros((ROWS, BLOCK_C), tl.float32)
    score_sum = tl.zeros((ROWS,), tl.float32)
    for start in range(num_kept - PREFIX, tokens - PREFIX, ROWS):
        positions = start + tl.arange(0, ROWS)
        in_rest = positions < tokens - PREFIX
        picked = tl.load(order + positions.to(tl.int64) * order_strides[1], mask=in_rest, other=0).to(tl.int64)
        score = tl.load(scores + picked * scores_strides[1], mask=in_rest, other=0.0).to(tl.float32)
        rows = tl.load(
            x + (picked + PREFIX)[:, None] * x_strides[1] + offsets_c[None, :],
            mask=in_rest[:, None] & in_channels[None, :],
            other=0.0,
        )
        acc += score[:, None] * rows.to(tl.float32)
        score_sum += score
    fused = tl.sum(acc, 0)
    if residual_bias is not None:
        once = tl.load(residual_bias + offsets_c, mask=in_channels, other=0.0).to(tl.float32)
        fused += (tl.sum(score_sum, 0) - 1.0) * once
    last = tl.cast(num_kept, tl.int64)
    if residual is not None:
        fused += tl.load(residual + last * residual_strides[1] + offsets_c, mask=in_channels, other=0.0).to(tl.float32)
    stored = fused.to(out.dtype.element_ty)
    tl.store(out + last * channels + offsets_c, stored, mask=in_channels)
    if normed is not None:
        row, in_rows = last + tl.zeros((1,), tl.int64), tl.full((1,), True, tl.int1)
        alone, mask = stored[None, :], in_channels[None, :]
        _store_normed(alone, mask, row, in_rows, offsets_c, weight, bias, normed, statistics, channels, NORM_EPS)


@direct
@triton.jit
def fuse_tokens_kernel(
    x,  # (B, N, C)
    order,  # (B, N - PREFIX)
    scores,  # (B, N - PREFIX)
    residual,  # (B, num_kept + 1, C) or None
    residual_bias,  # (C,) or None: every row of the residual contains it once
    out,  # (B, num_kept + 1, C), contiguous
    weight,  # (C,) or None: of the norm
    bias,  # (C,) or None
    normed,  # (B, num_kept + 1, C), contiguous, or None; then both blocks hold all channels
    statistics,  # (B, num_kept + 1, 2) float32 or None
    num_kept,  # PREFIX + k
    tokens,
    channels,
    x_strides,
    order_strides,
    scores_strides,
    residual_strides,
    NORM_EPS: tl.constexpr,
    PREFIX: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    SUM_BLOCK_C: tl.constexpr,
):
    """Sum SUM_BLOCK_C channels of the rest in each of the first programs, copy ROWS rows in each of the others.

    Grid (channel blocks of the sum, then blocks of the copy; images). Sums come first because they take longest.
    """
    batch = tl.program_id(1).to(tl.int64)
    x += batch * x_strides[0]
    order += batch * order_strides[0]
    out += batch * (num_kept + 1) * channels
    if residual is not None:
        residual += batch * residual_strides[0]
    if normed is not None:
        normed += batch * (num_kept + 1) * channels
        statistics += batch * (num_kept + 1) * 2
    sums = tl.cdiv(channels, SUM_BLOCK_C)
    program = tl.program_id(0)
    if program < sums:
        _sum_rest(
            *(x, order, scores + batch * scores_strides[0], residual, residual_bias, out, num_kept, tokens, channels),
            *(x_strides, order_strides, scores_strides, residual_strides, weight, bias, normed, statistics, program),
            *(NORM_EPS, PREFIX, SUM_ROWS, SUM_BLOCK_C),
        )
    else:
        channel_blocks = tl.cdiv(channels, BLOCK_C)
        _copy_kept(
            *(x, order, residual, out, num_kept, channels, x_strides, order_strides, residual_strides, weight, bias),
            *(normed, statistics, (program - sums) // channel_blocks, (program - sums) % channel_blocks, NORM_EPS),
            *(PREFIX, ROWS, BLOCK_C),
        )


@direct
@triton.jit
def fuse_tokens_backward_kernel(
    grad,  # (B, num_kept + 1, C)
    x,  # (B, N, C)
    order,  # (B, N - PREFIX)
    scores,  # (B, N - PREFIX)
    bias,  # (C,) or None
    grad_x,  # (B, N, C), contiguous
    grad_scores,  # (B, N - PREFIX), contiguous
    num_kept,  # PREFIX + k
    tokens,
    channels,
    grad_strides,
    x_strides,
    order_strides,
    scores_strides,
    PREFIX: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute grad_x and grad_scores of ROWS tokens in each program, from the first to the last channel.

    Grid (blocks of the rest, then blocks of kept tokens; images). Tokens of the rest share the fused row's gradient.
    """
    batch = tl.program_id(1).to(tl.int64)
    rest_blocks = tl.cdiv(tokens - num_kept, ROWS)
    is_rest = tl.program_id(0) < rest_blocks
    first = tl.where(is_rest, num_kept + tl.program_id(0) * ROWS, (tl.program_id(0) - rest_blocks) * ROWS)
    positions = first + tl.arange(0, ROWS)
    in_rows = positions < tl.where(is_rest, tokens, num_kept)
    is_patch = in_rows & (positions >= PREFIX)
    patches = (positions - PREFIX).to(tl.int64)
    picked = tl.load(order + batch * order_strides[0] + patches * order_strides[1], mask=is_patch, other=0).to(tl.int64)
    rows = tl.where(is_patch, picked + PREFIX, positions.to(tl.int64))
    grad += batch * grad_strides[0]
    x += batch * x_strides[0]
    grad_x += batch * tokens * channels
    dot = tl.zeros((ROWS,), tl.float32)
    if is_rest:
        scores += batch * scores_strides[0]
        weight = tl.load(scores + picked * scores_strides[1], mask=in_rows, other=0.0).to(tl.float32)
        grad_fused = grad + tl.cast(num_kept, tl.int64) * grad_strides[1]
        acc = tl.zeros((ROWS, BLOCK_C), tl.float32)
        for start in range(0, channels, BLOCK_C):
            offsets_c = start + tl.arange(0, BLOCK_C)
            in_channels = offsets_c < channels
            mask = in_rows[:, None] & in_channels[None, :]
            fused = tl.load(grad_fused + offsets_c, mask=in_channels, other=0.0).to(tl.float32)
            token = tl.load(x + rows[:, None] * x_strides[1] + offsets_c[None, :], mask=mask, other=0.0).to(tl.float32)
            if bias is not None:
                token += tl.load(bias + offsets_c, mask=in_channels, other=0.0).to(tl.float32)[None, :]
            acc += token * fused[None, :]
            share = (weight[:, None] * fused[None, :]).to(grad_x.dtype.element_ty)
            tl.store(grad_x + rows[:, None] * channels + offsets_c[None, :], share, mask=mask)
        dot = tl.sum(acc, 1)
    else:
        for start in range(0, channels, BLOCK_C):
            offsets_c = start + tl.arange(0, BLOCK_C)
            mask = in_rows[:, None] & (offsets_c < channels)[None, :]
            sources = positions.to(tl.int64)[:, None] * grad_strides[1] + offsets_c[None, :]
            value = tl.load(grad + sources, mask=mask, other=0.0).to(grad_x.dtype.element_ty)
            tl.store(grad_x + rows[:, None] * channels + offsets_c[None, :], value, mask=mask)
    target = grad_scores + batch * (tokens - PREFIX) + picked
    tl.store(target, dot.to(grad_scores.dtype.element_ty), mask=is_patch)


@direct
@triton.jit
def fuse_tokens_norm_backward_kernel(
    grad_out,  # (B, num_kept + 1, C) or None
    grad_normed,  # (B, num_kept + 1, C)
    out,  # (B, num_kept + 1, C), contiguous
    statistics,  # (B, num_kept + 1, 2) float32, contiguous
    weight,  # (C,) or None
    x,  # (B, N, C)
    order,  # (B, N - PREFIX)
    scores,  # (B, N - PREFIX)
    residual_bias,  # (C,) or None
    grad_x,  # (B, N, C), contiguous
    grad_scores,  # (B, N - PREFIX), contiguous
    grad_rows,  # (B, num_kept + 1, C), contiguous, or None
    sums,  # (programs, 2, C) float32 or None: shares of the gradients of weight and bias
    num_kept,  # PREFIX + k
    tokens,
    channels,
    out_strides,
    normed_strides,
    x_strides,
    order_strides,
    scores_strides,
    PREFIX: tl.constexpr,
    SUMMED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Differentiate SUMMED tokens of the rest, or SUMMED rows of out, in each program; grid (both in turn; images)."""
    batch = tl.program_id(1).to(tl.int64)
    offsets_c = tl.arange(0, BLOCK_C)
    in_channels = offsets_c < channels
    order += batch * order_strides[0]
    grad_x += batch * tokens * channels
    grad_scores += batch * (tokens - PREFIX)
    factor = _vector(weight, offsets_c, channels, 1.0, BLOCK_C)
    rest_blocks = tl.cdiv(tokens - num_kept, SUMMED)
    if tl.program_id(0) < rest_blocks:
        fused, _weight_part, _bias_part = _norm_gradient(
            *(grad_out, grad_normed, out, statistics, factor, batch, num_kept + tl.zeros((1,), tl.int64)),
            *(tl.full((1,), True, tl.int1), offsets_c, num_kept + 1, channels, out_strides, normed_strides),
        )
        once = _vector(residual_bias, offsets_c, channels, 0.0, BLOCK_C)
        first = num_kept + tl.program_id(0) * SUMMED
        for begin in range(first, tl.minimum(first + SUMMED, tokens), ROWS):
            positions = begin + tl.arange(0, ROWS)
            in_rest = positions < tokens
            mask = in_rest[:, None] & in_channels[None, :]
            patches = (positions - PREFIX).to(tl.int64)
            picked = tl.load(order + patches * order_strides[1], mask=in_rest, other=0).to(tl.int64)
            score = tl.load(scores + batch * scores_strides[0] + picked * scores_strides[1], mask=in_rest, other=0.0)
            source = x + batch * x_strides[0] + (picked + PREFIX)[:, None] * x_strides[1] + offsets_c[None, :]
            token = tl.load(source, mask=mask, other=0.0).to(tl.float32) + once[None, :]
            dot = tl.sum(token * fused, 1)
            tl.store(grad_scores + picked, dot.to(grad_scores.dtype.element_ty), mask=in_rest)
            share = (score.to(tl.float32)[:, None] * fused).to(grad_x.dtype.element_ty)
            tl.store(grad_x + (picked + PREFIX)[:, None] * channels + offsets_c[None, :], share, mask=mask)
    else:
        block = tl.program_id(0) - rest_blocks
        weight_sum = tl.zeros((ROWS, BLOCK_C), tl.float32)
        bias_sum = tl.zeros((ROWS, BLOCK_C), tl.float32)
        first = block * SUMMED
        for begin in range(first, tl.minimum(first + SUMMED, num_kept + 1), ROWS):
            positions = (begin + tl.arange(0, ROWS)).to(tl.int64)
            in_rows = positions <= num_kept
            is_kept = positions < num_kept
            is_patch = is_kept & (positions >= PREFIX)
            picked = tl.load(order + (positions - PREFIX) * order_strides[1], mask=is_patch, other=0).to(tl.int64)
            gradient, weight_part, bias_part = _norm_gradient(
                *(grad_out, grad_normed, out, statistics, factor, batch, positions, in_rows, offsets_c, num_kept + 1),
                *(channels, out_strides, normed_strides),
            )
            weight_sum += weight_part
            bias_sum += bias_part
            rows = tl.where(is_patch, picked + PREFIX, positions)
            target = grad_x + rows[:, None] * channels + offsets_c[None, :]
            tl.store(target, gradient.to(grad_x.dtype.element_ty), mask=is_kept[:, None] & in_channels[None, :])
            tl.store(grad_scores + picked, tl.zeros((ROWS,), grad_scores.dtype.element_ty), mask=is_patch)
            if grad_rows is not None:
                target = grad_rows + (batch * (num_kept + 1) + positions)[:, None] * channels + offsets_c[None, :]
                mask = in_rows[:, None] & in_channels[None, :]
                tl.store(target, gradient.to(grad_rows.dtype.element_ty), mask=mask)
        if sums is not None:
            program = batch * tl.cdiv(num_kept + 1, SUMMED) + block
            _store_sums(sums, program, weight_sum, bias_sum, offsets_c, channels)


@in_parts("x", "order", "scores", "residual")
def fuse_tokens(
    x: torch.Tensor,
    order: torch.Tensor,
    scores: torch.Tensor,
    k: int,
    prefix: int,
    residual: torch.Tensor | None,
    residual_bias: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    norm_eps: float | None = None,
) -> tuple[torch.Tensor, ...]:
    """Launch; x (B, N, C), residual, residual_bias (C,) with dense channels, order and scores (B, N - prefix) -> rows.

    With a norm_eps also normed rows, and statistics (B, prefix + k + 1, 2); long or many rows take another launch.
    """
    batch, tokens, channels = x.shape
    num_kept = prefix + k
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    out = torch.empty(batch, num_kept + 1, channels, dtype=dtype, device=x.device)
    tile, whole = Tile(row_tile(channels), **SUM_TILE), whole_rows(channels)
    together = order.shape[1] - k <= MOST_SUMMED and whole["BLOCK_C"] <= NORM_ELEMENTS // 4
    normed, statistics = normed_like(out) if together and norm_eps is not None else (None, None)
    if normed is not None:
        sums = {"SUM_ROWS": NORM_ELEMENTS // whole["BLOCK_C"], "SUM_BLOCK_C": whole["BLOCK_C"]}
        tile = Tile(whole, ROWS=2 * whole["ROWS"], num_warps=NORM_WARPS, **sums)
    if out.numel():
        copies = cdiv(num_kept, tile["ROWS"]) * cdiv(channels, tile["BLOCK_C"])
        fuse_tokens_kernel[(cdiv(channels, tile["SUM_BLOCK_C"]) + copies, batch)](
            *(x, order, scores, residual, residual_bias, out, None if normed is None else weight),
            *(None if normed is None else bias, normed, statistics),
            *(num_kept, tokens, channels),
            *(strides(x, 2), strides(order, 2), strides(scores, 2), strides(residual, 2)),
            NORM_EPS=None if normed is None else norm_eps,
            PREFIX=prefix,
            **tile,
        )
    if normed is not None and statistics is not None:
        return out, normed, statistics
    return (out,) if norm_eps is None else norm_rows(out, weight, bias, norm_eps)


@in_parts("grad", "x", "order", "scores")
def fuse_tokens_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    order: torch.Tensor,
    scores: torch.Tensor,
    k: int,
    prefix: int,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch once; grad (B, prefix + k + 1, C) with contiguous channels -> gradients of x and of the scores."""
    batch, tokens, channels = x.shape
    num_kept = prefix + k
    grad_x = torch.empty(batch, tokens, channels, dtype=x.dtype, device=x.device)
    grad_scores = torch.empty(batch, tokens - prefix, dtype=scores.dtype, device=x.device)
    if batch and tokens:
        tile = SHARE_TILE_BIAS if bias is not None and x.dtype == torch.float32 else SHARE_TILE
        programs = cdiv(tokens - num_kept, tile["ROWS"]) + cdiv(num_kept, tile["ROWS"])
        fuse_tokens_backward_kernel[(programs, batch)](
            *(grad, x, order, scores, bias, grad_x, grad_scores),
            *(num_kept, tokens, channels),
            *(strides(grad, 2), strides(x, 2), strides(order, 2), strides(scores, 2)),
            PREFIX=prefix,
            **tile,
        )
    return grad_x, grad_scores


@in_parts("grad_normed", "grad_out", "out", "statistics", "x", "order", "scores", added=(3,))
def fuse_tokens_norm_backward(
    grad_out: torch.Tensor | None,
    grad_normed: torch.Tensor,
    out: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    affine: bool,
    rows: bool,
    x: torch.Tensor,
    order: torch.Tensor,
    scores: torch.Tensor,
    prefix: int,
    residual_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch -> gradients of x (B, N, C), of the scores (B, N - prefix), of out, and of weight and bias.

    The gradient of out is (B, 0, C) unless ``rows``. A sum gives the last one, (2, C) float32, or (0, C) if not affine.
    """
    batch, tokens, channels = x.shape
    num_out = out.shape[1]
    grad_x = torch.empty(batch, tokens, channels, dtype=x.dtype, device=x.device)
    grad_scores = torch.empty(batch, tokens - prefix, dtype=scores.dtype, device=x.device)
    grad_rows = out.new_empty(batch, num_out if rows else 0, channels)
    programs = cdiv(num_out, SUMMED_ROWS)
    sums = empty_sums(out, batch * programs, affine)
    if not out.numel():
        grad_scores.zero_()
    else:
        fuse_tokens_norm_backward_kernel[(cdiv(tokens - num_out + 1, SUMMED_ROWS) + programs, batch)](
            *(grad_out, grad_normed, out, statistics, weight, x, order, scores, residual_bias, grad_x, grad_scores),
            *(grad_rows if rows else None, sums),
            *(num_out - 1, tokens, channels),
            *(strides(grad_out, 2), strides(grad_normed, 2), strides(x, 2), strides(order, 2), strides(scores, 2)),
            PREFIX=prefix,
            SUMMED=SUMMED_ROWS,
            **backward_tile(channels),
        )
    return grad_x, grad_scores, grad_rows, added_up(out, sums)
