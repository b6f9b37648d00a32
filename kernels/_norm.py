"""Layer normalisation of the rows that a kernel holds, and its gradient."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ._direct import cdiv, direct, next_power_of_2
from ._launch import Tile, row_warps, whole_rows

# Rows of one program of a backward pass, taken in turn. It writes one sum for the gradients of weight and bias.
# Writing and reading these sums is some 6 % of the traffic.
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


@direct
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
    """Normalise ROWS rows in each program, where a reduction cannot hold its rows; grid (blocks of rows,)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offsets_c = tl.arange(0, BLOCK_C)
    in_rows = row < rows
    mask = in_rows[:, None] & (offsets_c < channels)[None, :]
    stored = tl.load(out + row[:, None] * channels + offsets_c[None, :], mask=mask, other=0.0)
    _store_normed(stored, mask, row, in_rows, offsets_c, weight, bias, normed, statistics, channels, NORM_EPS)


@triton.jit
def _vector(values, offsets_c, channels, missing: tl.constexpr, BLOCK_C: tl.constexpr):
    """Load values (C,) as float32; return ``missing`` everywhere if values is None."""
    if values is None:
        result = tl.full((BLOCK_C,), missing, tl.float32)
    else:
        result = tl.load(values + offsets_c, mask=offsets_c < channels, other=0.0).to(tl.float32)
    return result


@triton.jit
def _norm_gradient(
    grad_out,  # (B, N, C) or None
    grad_normed,  # (B, N, C)
    out,  # (B, N, C), contiguous
    statistics,  # (B, N, 2) float32, contiguous
    factor,  # (BLOCK_C,): the norm's weight
    batch,
    row,  # (ROWS,) int64, of one image
    in_rows,
    offsets_c,
    rows,  # N
    channels,
    out_strides,
    normed_strides,
):
    """Return the gradient of rows of out, and their shares of the gradients of weight and bias, (ROWS, BLOCK_C) each.

    All three are zero in masked rows. In channels past the last, the shares are zero and the gradient means nothing.
    """
    mask = in_rows[:, None] & (offsets_c < channels)[None, :]
    source = grad_normed + batch * normed_strides[0] + row[:, None] * normed_strides[1] + offsets_c[None, :]
    upstream = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    flat = batch * rows + row
    value = tl.load(out + flat[:, None] * channels + offsets_c[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(statistics + 2 * flat, mask=in_rows, other=0.0)
    scale = tl.load(statistics + 2 * flat + 1, mask=in_rows, other=0.0)
    normal = (value - mean[:, None]) * scale[:, None]
    scaled = upstream * factor[None, :]
    inner = tl.sum(scaled, 1)[:, None] + normal * tl.sum(scaled * normal, 1)[:, None]
    gradient = (scaled - inner / channels) * scale[:, None]
    if grad_out is not None:
        source = grad_out + batch * out_strides[0] + row[:, None] * out_strides[1] + offsets_c[None, :]
        gradient += tl.load(source, mask=mask, other=0.0).to(tl.float32)
    return gradient, upstream * normal, upstream


@triton.jit
def _store_sums(sums, program, weight_sum, bias_sum, offsets_c, channels):
    """Store one program's shares of the gradients of weight and bias in sums (programs, 2, C)."""
    target = sums + program * 2 * channels + offsets_c
    tl.store(target, tl.sum(weight_sum, 0), mask=offsets_c < channels)
    tl.store(target + channels, tl.sum(bias_sum, 0), mask=offsets_c < channels)


def normed_like(out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate the normalised rows, as out, and their statistics (B, N, 2) float32."""
    statistics = torch.empty(*out.shape[:2], 2, dtype=torch.float32, device=out.device)
    return torch.empty_like(out), statistics


def norm_rows(
    out: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, norm_eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch once; out (B, N, C), contiguous -> out itself, normed (B, N, C), statistics (B, N, 2) float32."""
    normed, statistics = normed_like(out)
    rows, channels = out.shape[0] * out.shape[1], out.shape[2]
    if out.numel():
        tile = whole_rows(channels)
        norm_rows_kernel[(cdiv(rows, tile["ROWS"]),)](
            out, weight, bias, normed, statistics, rows, channels, NORM_EPS=norm_eps, **tile
        )
    return out, normed, statistics


@functools.cache
def backward_tile(channels: int) -> Tile:
    """Choose whole rows for a backward pass, 8 channels a thread; 4 rows at a time wait for memory together.

    From 2,048 channels on it is one row, since 4 would leave a thread too few registers.
    """
    block_c = next_power_of_2(channels)
    rows = 4 if block_c <= 1024 else 1
    return Tile(ROWS=rows, BLOCK_C=block_c, num_warps=rows * row_warps(block_c))


def empty_sums(out: torch.Tensor, programs: int, affine: bool) -> torch.Tensor | None:
    """Allocate every program's shares of the gradients of weight and bias (programs, 2, C) float32, if affine."""
    return torch.empty(programs, 2, out.shape[2], dtype=torch.float32, device=out.device) if affine else None


def added_up(out: torch.Tensor, sums: torch.Tensor | None) -> torch.Tensor:
    """Return the gradients of weight and bias (2, C) float32, or (0, C) without sums."""
    return torch.empty(0, out.shape[2], dtype=torch.float32, device=out.device) if sums is None else sums.sum(0)
