"""Squared lengths of rows, or the reciprocals of their lengths, in a launch of their own.

A load in a pipelined loop that feeds ``tl.dot`` and anything else, such as a sum of squares, gets one shared buffer too
few on sm_90 in half precision: the copy for step i + 2 overwrites what the asynchronous product of step i may still be
reading (https://github.com/triton-lang/triton/issues/6691; Triton 3.6 to 3.9). So a loop here either multiplies what it
loads or sums it, never both; ``bench.compile_report`` fails where a kernel does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import row_tile


@triton.jit
def squared_lengths_kernel(
    x,  # (B, N, C)
    lengths,  # (B, N) float32, contiguous: squared, or reciprocals of lengths of at least 1e-12
    rows,  # B * N
    tokens,
    channels,
    stride_b,
    stride_n,
    RECIPROCAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offsets_c = tl.arange(0, BLOCK_C)
    pointers = x + (row // tokens * stride_b + row % tokens * stride_n)[:, None] + offsets_c[None, :]
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, channels, BLOCK_C):
        mask = (row < rows)[:, None] & (start + offsets_c < channels)[None, :]
        value = tl.load(pointers + start, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(value * value, 1)
    if RECIPROCAL:
        total = 1.0 / tl.maximum(tl.sqrt(total), 1e-12)
    tl.store(lengths + row, total, mask=row < rows)


def squared_lengths(x: torch.Tensor, *, reciprocal: bool = False) -> torch.Tensor:
    """Launch; x (B, N, C) with contiguous channels -> (B, N) float32.

    With ``reciprocal`` 1 / length instead, where lengths below 1e-12 count as 1e-12.
    """
    batch, tokens, channels = x.shape
    lengths = torch.empty(batch, tokens, dtype=torch.float32, device=x.device)
    if lengths.numel():
        tile = row_tile(channels)
        squared_lengths_kernel[(triton.cdiv(batch * tokens, tile.rows),)](
            x,
            lengths,
            batch * tokens,
            tokens,
            channels,
            *x.stride()[:2],
            RECIPROCAL=reciprocal,
            ROWS=tile.rows,
            BLOCK_C=tile.block_c,
            num_warps=tile.num_warps,
        )
    return lengths
