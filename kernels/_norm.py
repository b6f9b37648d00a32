"""Layer normalisation of rows that a kernel holds, and the pass over memory that differentiates it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import whole_rows

# Rows whose gradients of weight and bias one program adds up: their partial sums are 6 % of what it moves.
SUMMED_ROWS = 32


@triton.jit
def _store_normed(
    stored,  # (ROWS, BLOCK_C) as stored, zero where masked
    mask,
    row,  # (ROWS,) int64
    in_rows,
    offsets_c,
    weight,  # (C,) or None
    bias,  # (C,) or None
    normed,  # (rows, C), contiguous
    statistics,  # (rows, 2) float32, contiguous: mean, 1 / deviation
    channels,
    NORM_EPS: tl.constexpr,
):
    value = stored.to(tl.float32)
    in_channels = offsets_c < channels
    mean = tl.sum(value, 1) / channels
    centred = tl.where(mask, value - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / channels + NORM_EPS)
    tl.store(statistics + 2 * row, mean, mask=in_rows)
    tl.store(statistics + 2 * row + 1, scale, mask=in_rows)
    result = centred * scale[:, None]
    if weight is not None:
        result *= tl.load(weight + offsets_c, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        result += tl.load(bias + offsets_c, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    tl.store(normed + row[:, None] * channels + offsets_c[None, :], result.to(normed.dtype.element_ty), mask=mask)


@triton.jit
def norm_rows_kernel(
    out,  # (rows, C), contiguous
    weight,
    bias,
    normed,
    statistics,
    rows,
    channels,
    NORM_EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Where a reduction cannot hold its rows: the norm on its own."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offsets_c = tl.arange(0, BLOCK_C)
    in_rows = row < rows
    mask = in_rows[:, None] & (offsets_c < channels)[None, :]
    stored = tl.load(out + row[:, None] * channels + offsets_c[None, :], mask=mask, other=0.0)
    _store_normed(stored, mask, row, in_rows, offsets_c, weight, bias, normed, statistics, channels, NORM_EPS)


@triton.jit
def norm_backward_kernel(
    grad_out,  # (B, N, C) or None
    grad_normed,  # (B, N, C)
    out,  # (B, N, C), contiguous
    statistics,  # (B, N, 2) float32, contiguous
    weight,  # (C,) or None
    grad,  # (B, N, C), contiguous
    sums,  # (programs, 2, C) float32 or None: of the gradients of weight and bias
    rows,  # B * N
    tokens,
    channels,
    out_stride_b,
    out_stride_n,
    normed_stride_b,
    normed_stride_n,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: STEPS times ROWS rows of the whole batch; a row's gradient does not depend on the others."""
    offsets_c = tl.arange(0, BLOCK_C)
    in_channels = offsets_c < channels
    first = tl.program_id(0).to(tl.int64) * STEPS * ROWS
    weight_sum = tl.zeros((ROWS, BLOCK_C), tl.float32)
    bias_sum = tl.zeros((ROWS, BLOCK_C), tl.float32)
    if weight is not None:
        factor = tl.load(weight + offsets_c, mask=in_channels, other=0.0).to(tl.float32)
    for step in range(STEPS):
        row = first + step * ROWS + tl.arange(0, ROWS)
        in_rows = row < rows
        mask = in_rows[:, None] & in_channels[None, :]
        batch = row // tokens
        token = row % tokens
        source = grad_normed + (batch * normed_stride_b + token * normed_stride_n)[:, None] + offsets_c[None, :]
        upstream = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        flat = row[:, None] * channels + offsets_c[None, :]
        value = tl.load(out + flat, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(statistics + 2 * row, mask=in_rows, other=0.0)
        scale = tl.load(statistics + 2 * row + 1, mask=in_rows, other=0.0)
        normal = tl.where(mask, (value - mean[:, None]) * scale[:, None], 0.0)
        if sums is not None:
            weight_sum += upstream * normal
            bias_sum += upstream
        if weight is not None:
            upstream *= factor[None, :]
        inner = tl.sum(upstream, 1)[:, None] + normal * tl.sum(upstream * normal, 1)[:, None]
        result = (upstream - inner / channels) * scale[:, None]
        if grad_out is not None:
            source = grad_out + (batch * out_stride_b + token * out_stride_n)[:, None] + offsets_c[None, :]
            result += tl.load(source, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad + flat, result.to(grad.dtype.element_ty), mask=mask)
    if sums is not None:
        target = sums + tl.program_id(0).to(tl.int64) * 2 * channels + offsets_c
        tl.store(target, tl.sum(weight_sum, 0), mask=in_channels)
        tl.store(target + channels, tl.sum(bias_sum, 0), mask=in_channels)


def normed_like(out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the normalised rows and their statistics (B, N, 2) float32."""
    statistics = torch.empty(*out.shape[:2], 2, dtype=torch.float32, device=out.device)
    return torch.empty_like(out), statistics


def norm_rows(
    out: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, norm_eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch; out (B, N, C), contiguous -> itself, normed rows, and their statistics (B, N, 2)."""
    normed, statistics = normed_like(out)
    rows, channels = out.shape[0] * out.shape[1], out.shape[2]
    if out.numel():
        tile = whole_rows(channels)
        norm_rows_kernel[(triton.cdiv(rows, tile.rows),)](
            out,
            weight,
            bias,
            normed,
            statistics,
            rows,
            channels,
            NORM_EPS=norm_eps,
            ROWS=tile.rows,
            BLOCK_C=tile.block_c,
            num_warps=tile.num_warps,
        )
    return out, normed, statistics


def norm_backward(
    grad_out: torch.Tensor | None,
    grad_normed: torch.Tensor,
    out: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    affine: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch, and a sum if affine -> gradients of out (B, N, C), and of weight and bias (2, C) float32, else (0, C)."""
    batch, tokens, channels = out.shape
    rows = batch * tokens
    grad = torch.empty_like(out)
    tile = whole_rows(channels)
    steps = max(1, SUMMED_ROWS // tile.rows)
    programs = triton.cdiv(rows, steps * tile.rows)
    sums = torch.empty(programs, 2, channels, dtype=torch.float32, device=out.device) if affine else None
    if out.numel():
        norm_backward_kernel[(programs,)](
            grad_out,
            grad_normed,
            out,
            statistics,
            weight,
            grad,
            sums,
            rows,
            tokens,
            channels,
            *((0, 0) if grad_out is None else grad_out.stride()[:2]),
            *grad_normed.stride()[:2],
            STEPS=steps,
            ROWS=tile.rows,
            BLOCK_C=tile.block_c,
            num_warps=tile.num_warps,
        )
    return grad, statistics.new_empty(0, channels) if sums is None else sums.sum(0)
