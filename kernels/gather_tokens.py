"""Kept rows, in one pass with the residual addition and the next norm: kept rows are read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._direct import cdiv, direct
from ._launch import in_parts, row_tile, strides, whole_rows
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


@direct
@triton.jit
def gather_tokens_kernel(
    x,  # (B, N, C)
    index,  # (B, K)
    residual,  # (B, PREFIX + K, C) or None
    out,  # (B, PREFIX + K, C), contiguous
    weight,  # (C,) or None: of the norm
    bias,  # (C,) or None
    normed,  # (B, PREFIX + K, C), contiguous, or None; then BLOCK_C holds all channels
    statistics,  # (B, PREFIX + K, 2) float32 or None
    num_out,
    channels,
    x_strides,
    index_strides,
    residual_strides,
    NORM_EPS: tl.constexpr,
    PREFIX: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write ROWS output rows of BLOCK_C channels in each program; grid (blocks of rows, images, blocks of channels)."""
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offsets_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_rows = rows < num_out
    is_patch = in_rows & (rows >= PREFIX)
    picked = tl.load(index + batch * index_strides[0] + (rows - PREFIX) * index_strides[1], mask=is_patch, other=0)
    source = tl.where(is_patch, picked.to(tl.int64) + PREFIX, rows.to(tl.int64))
    mask = in_rows[:, None] & (offsets_c < channels)[None, :]
    value = tl.load(
        x + batch * x_strides[0] + source[:, None] * x_strides[1] + offsets_c[None, :], mask=mask, other=0.0
    ).to(tl.float32)
    if residual is not None:
        value += tl.load(
            residual
            + batch * residual_strides[0]
            + rows.to(tl.int64)[:, None] * residual_strides[1]
            + offsets_c[None, :],
            mask=mask,
            other=0.0,
        ).to(tl.float32)
    stored = value.to(out.dtype.element_ty)
    row = batch * num_out + rows
    tl.store(out + row[:, None] * channels + offsets_c[None, :], stored, mask=mask)
    if normed is not None:
        _store_normed(stored, mask, row, in_rows, offsets_c, weight, bias, normed, statistics, channels, NORM_EPS)


@direct
@triton.jit
def gather_tokens_norm_backward_kernel(
    grad_out,  # (B, M, C) or None
    grad_normed,  # (B, M, C)
    out,  # (B, M, C), contiguous
    statistics,  # (B, M, 2) float32, contiguous
    weight,  # (C,) or None
    order,  # (B, M) int32: the rows of out by the token that they were taken from
    offsets,  # (B, N + 1) int32
    grad_x,  # (B, N, C), contiguous
    grad_rows,  # (B, M, C), contiguous, or None
    sums,  # (programs, 2, C) float32 or None: shares of the gradients of weight and bias
    tokens,
    num_out,
    channels,
    out_strides,
    normed_strides,
    SUMMED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Differentiate SUMMED tokens in each program, ROWS at a time; grid (blocks of tokens, images).

    For each token it sums the gradients of the rows of out that are copies of it, mostly one or none.
    """
    batch = tl.program_id(1).to(tl.int64)
    offsets_c = tl.arange(0, BLOCK_C)
    in_channels = offsets_c < channels
    order += batch * num_out
    offsets += batch * (tokens + 1)
    factor = _vector(weight, offsets_c, channels, 1.0, BLOCK_C)
    weight_sum = tl.zeros((ROWS, BLOCK_C), tl.float32)
    bias_sum = tl.zeros((ROWS, BLOCK_C), tl.float32)
    first = tl.program_id(0) * SUMMED
    last = tl.minimum(first + SUMMED, tokens)
    for begin in tl.range(first, last, ROWS, disable_licm=True):  # hoisted addresses would spill
        n = begin + tl.arange(0, ROWS)
        in_tokens = n < tokens
        start = tl.load(offsets + n, mask=in_tokens, other=0)
        count = tl.load(offsets + n + 1, mask=in_tokens, other=0) - start
        acc = tl.zeros((ROWS, BLOCK_C), tl.float32)
        for step in tl.range(0, tl.max(count, 0), disable_licm=True):
            active = step < count
            row = tl.load(order + start + step, mask=active, other=0).to(tl.int64)
            gradient, weight_part, bias_part = _norm_gradient(
                *(grad_out, grad_normed, out, statistics, factor, batch, row, active, offsets_c, num_out, channels),
                *(out_strides, normed_strides),
            )
            acc += gradient
            weight_sum += weight_part
            bias_sum += bias_part
            if grad_rows is not None:
                target = grad_rows + (batch * num_out + row)[:, None] * channels + offsets_c[None, :]
                mask = active[:, None] & in_channels[None, :]
                tl.store(target, gradient.to(grad_rows.dtype.element_ty), mask=mask)
        target = grad_x + (batch * tokens + n)[:, None] * channels + offsets_c[None, :]
        tl.store(target, acc.to(grad_x.dtype.element_ty), mask=in_tokens[:, None] & in_channels[None, :])
    if sums is not None:
        program = batch * tl.num_programs(0) + tl.program_id(0)
        _store_sums(sums, program, weight_sum, bias_sum, offsets_c, channels)


@in_parts("x", "index", "residual")
def gather_tokens(
    x: torch.Tensor,
    index: torch.Tensor,
    prefix: int,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    norm_eps: float | None = None,
) -> tuple[torch.Tensor, ...]:
    """Launch once; x (B, N, C) and residual with contiguous channels, index (B, K) of any strides -> kept rows.

    With a norm_eps also normed rows, and statistics (B, prefix + K, 2); a program then holds whole rows.
    """
    batch, _, channels = x.shape
    num_out = prefix + index.shape[1]
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    out = torch.empty(batch, num_out, channels, dtype=dtype, device=x.device)
    normed, statistics = (None, None) if norm_eps is None else normed_like(out)
    tile = row_tile(channels) if norm_eps is None else whole_rows(channels)
    if out.numel():
        gather_tokens_kernel[(cdiv(num_out, tile["ROWS"]), batch, cdiv(channels, tile["BLOCK_C"]))](
            *(x, index, residual, out, weight, bias, normed, statistics),
            *(num_out, channels),
            *(strides(x, 2), strides(index, 2), strides(residual, 2)),
            NORM_EPS=norm_eps,
            PREFIX=prefix,
            **tile,
        )
    return (out,) if normed is None or statistics is None else (out, normed, statistics)


@in_parts("grad_normed", "grad_out", "out", "statistics", "order", "offsets", added=(2,))
def gather_tokens_norm_backward(
    grad_out: torch.Tensor | None,
    grad_normed: torch.Tensor,
    out: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    affine: bool,
    rows: bool,
    order: torch.Tensor,
    offsets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch; rows of out grouped by their tokens -> gradients of x (B, N, C), of out (B, M, C), of weight and bias.

    The gradient of out is (B, 0, C) unless ``rows``. A sum gives the last one, (2, C) float32, or (0, C) if not affine.
    """
    batch, num_out, channels = out.shape
    tokens = offsets.shape[1] - 1
    grad_x = out.new_empty(batch, tokens, channels)
    grad_rows = out.new_empty(batch, num_out if rows else 0, channels)
    programs = cdiv(tokens, SUMMED_ROWS)
    sums = empty_sums(out, batch * programs, affine)
    if grad_x.numel():
        gather_tokens_norm_backward_kernel[(programs, batch)](
            *(grad_out, grad_normed, out, statistics, weight, order, offsets, grad_x, grad_rows if rows else None),
            sums,
            *(tokens, num_out, channels),
            *(strides(grad_out, 2), strides(grad_normed, 2)),
            SUMMED=SUMMED_ROWS,
            **backward_tile(channels),
        )
    return grad_x, grad_rows, added_up(out, sums)
