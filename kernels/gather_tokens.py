"""Kept rows, with the residual addition and the next norm fused in: one read of what is kept, one write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import RowTile, row_tile, whole_rows
from ._norm import _store_normed, normed_like


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
    x_stride_b,
    x_stride_n,
    index_stride_b,
    index_stride_k,
    residual_stride_b,
    residual_stride_n,
    NORM_EPS: tl.constexpr,
    PREFIX: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program copies ROWS output rows, BLOCK_C channels of them."""
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offsets_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_rows = rows < num_out
    is_patch = in_rows & (rows >= PREFIX)
    picked = tl.load(index + batch * index_stride_b + (rows - PREFIX) * index_stride_k, mask=is_patch, other=0)
    source = tl.where(is_patch, picked.to(tl.int64) + PREFIX, rows.to(tl.int64))
    mask = in_rows[:, None] & (offsets_c < channels)[None, :]
    value = tl.load(
        x + batch * x_stride_b + source[:, None] * x_stride_n + offsets_c[None, :], mask=mask, other=0.0
    ).to(tl.float32)
    if residual is not None:
        value += tl.load(
            residual + batch * residual_stride_b + rows.to(tl.int64)[:, None] * residual_stride_n + offsets_c[None, :],
            mask=mask,
            other=0.0,
        ).to(tl.float32)
    stored = value.to(out.dtype.element_ty)
    row = batch * num_out + rows
    tl.store(out + row[:, None] * channels + offsets_c[None, :], stored, mask=mask)
    if normed is not None:
        _store_normed(stored, mask, row, in_rows, offsets_c, weight, bias, normed, statistics, channels, NORM_EPS)


def _launch(
    x: torch.Tensor,
    index: torch.Tensor,
    prefix: int,
    residual: torch.Tensor | None,
    tile: RowTile,
    norm: tuple[torch.Tensor | None, torch.Tensor | None, float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    batch, _, channels = x.shape
    num_out = prefix + index.shape[1]
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    out = torch.empty(batch, num_out, channels, dtype=dtype, device=x.device)
    weight, bias, norm_eps = norm or (None, None, None)
    normed, statistics = (None, None) if norm is None else normed_like(out)
    if out.numel():
        grid = (triton.cdiv(num_out, tile.rows), batch, triton.cdiv(channels, tile.block_c))
        gather_tokens_kernel[grid](
            x,
            index,
            residual,
            out,
            weight,
            bias,
            normed,
            statistics,
            num_out,
            channels,
            *x.stride()[:2],
            *index.stride(),
            *((0, 0) if residual is None else residual.stride()[:2]),
            NORM_EPS=norm_eps,
            PREFIX=prefix,
            ROWS=tile.rows,
            BLOCK_C=tile.block_c,
            num_warps=tile.num_warps,
        )
    return out, normed, statistics


def gather_tokens(x: torch.Tensor, index: torch.Tensor, prefix: int, residual: torch.Tensor | None) -> torch.Tensor:
    """Launch; x (B, N, C) and residual with contiguous channels, index (B, K) of any strides."""
    return _launch(x, index, prefix, residual, row_tile(x.shape[2]))[0]


def gather_tokens_norm(
    x: torch.Tensor,
    index: torch.Tensor,
    prefix: int,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch -> kept rows, normed rows, and statistics (B, prefix + K, 2); a program holds whole rows."""
    out, normed, statistics = _launch(x, index, prefix, residual, whole_rows(x.shape[2]), (weight, bias, norm_eps))
    assert normed is not None
    assert statistics is not None
    return out, normed, statistics
