"""Distances between rows, and a launch for the squared lengths of rows, or the reciprocals of their lengths.

In a pipelined loop on sm_90 in half precision, a load may feed ``tl.dot`` and something else, such as a sum of squares.
It then gets one shared buffer too few: the copy for step i + 2 overwrites rows that the asynchronous product of step i
may still be reading (https://github.com/triton-lang/triton/issues/6691; Triton 3.6 to 3.9). So a loop here multiplies
what it loads or sums it, never both. ``bench.compile_report`` fails where a kernel does both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._direct import cdiv, direct
from ._launch import row_tile, strides


@triton.jit
def _dots(pointers_i, pointers_j, channels, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr):
    """Multiply rows given by pointers -> (BLOCK_I, BLOCK_J) float32. No sum of the loads here: see the module."""
    offsets_c = tl.arange(0, BLOCK_C)
    dots = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    for start_c in range(0, channels, BLOCK_C):
        in_c = (start_c + offsets_c < channels)[None, :]
        row_i = tl.load(pointers_i + start_c, mask=in_c, other=0.0)
        row_j = tl.load(pointers_j + start_c, mask=in_c, other=0.0)
        dots = tl.dot(row_i, tl.trans(row_j), dots, input_precision="ieee")
    return dots


@triton.jit
def squared_distances(
    pointers_i,
    pointers_j,
    squares_i,  # (BLOCK_I,)
    squares_j,  # (BLOCK_J,) pointers: a late load holds no registers in the loop
    channels,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return ``|i|^2 + |j|^2 - 2ij``, not below zero; NaN stays."""
    dots = _dots(pointers_i, pointers_j, channels, BLOCK_I, BLOCK_J, BLOCK_C)
    squared = squares_i[:, None] + tl.load(squares_j)[None, :] - 2.0 * dots
    return tl.where(squared < 0.0, 0.0, squared)


@triton.jit
def distances(
    pointers_i,
    squares_i,
    pointers_j,
    squares_j,
    in_j,
    channels,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return distances (BLOCK_I, BLOCK_J) float32 between rows given by pointers, infinite for NaN and outside in_j."""
    dots = _dots(pointers_i, pointers_j, channels, BLOCK_I, BLOCK_J, BLOCK_C)
    squared = squares_i[:, None] + squares_j[None, :] - 2.0 * dots
    number = (squared == squared) & in_j[None, :]
    return tl.where(number, tl.sqrt_rn(tl.maximum(squared, 0.0)), float("inf"))


@direct
@triton.jit
def squared_lengths_kernel(
    x,  # (B, N, C)
    lengths,  # (B, N) float32, contiguous: squared, or reciprocals of lengths of at least 1e-12
    rows,  # B * N
    tokens,
    channels,
    x_strides,
    RECIPROCAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum the squares of ROWS rows in each program; grid (blocks of the B * N rows,)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offsets_c = tl.arange(0, BLOCK_C)
    pointers = x + (row // tokens * x_strides[0] + row % tokens * x_strides[1])[:, None] + offsets_c[None, :]
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, channels, BLOCK_C):
        mask = (row < rows)[:, None] & (start + offsets_c < channels)[None, :]
        value = tl.load(pointers + start, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(value * value, 1)
    if RECIPROCAL:
        total = 1.0 / tl.maximum(tl.sqrt(total), 1e-12)
    tl.store(lengths + row, total, mask=row < rows)


def squared_lengths(x: torch.Tensor, *, reciprocal: bool = False) -> torch.Tensor:
    """Launch once; x (B, N, C) with contiguous channels -> (B, N) float32.

    With ``reciprocal`` they are 1 / length, and a length below 1e-12 counts as 1e-12.
    """
    batch, tokens, channels = x.shape
    lengths = torch.empty(batch, tokens, dtype=torch.float32, device=x.device)
    if lengths.numel():
        tile = row_tile(channels)
        squared_lengths_kernel[(cdiv(batch * tokens, tile["ROWS"]),)](
            x, lengths, batch * tokens, tokens, channels, strides(x, 2), RECIPROCAL=reciprocal, **tile
        )
    return lengths
