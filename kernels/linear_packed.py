"""Matrix products of packed tokens. The number of rows is read on the device, and rows past it are not computed.

One kernel serves the forward pass and the gradient of the rows; another the gradient of the weight, split over rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ._direct import cdiv, direct
from ._launch import Tile, fitting, strides


def _tile(rows: int, columns: int, step: int, num_warps: int, num_stages: int) -> Tile:
    return Tile(BLOCK_M=rows, BLOCK_N=columns, BLOCK_K=step, num_warps=num_warps, num_stages=num_stages)


def _wide(inner: int, columns: int, dtype: torch.dtype) -> bool:
    """Return whether tiles can be 128 wide without a spill.

    Without alignment every element needs a pointer of its own, which fills the registers.
    float32 is multiplied as three products of tf32, whose parts are held in registers.
    """
    return dtype != torch.float32 and inner % 16 == columns % 16 == 0


@functools.cache
def product_tile(inner: int, columns: int, dtype: torch.dtype) -> Tile:
    """Choose tiles that never spill on sm_80 and sm_90. Wide ones read least, with three stages in flight."""
    if _wide(inner, columns, dtype):
        return _tile(128, fitting(columns, 128), fitting(inner, 64), num_warps=8, num_stages=3)
    deep = 32 if inner % 32 == 0 or dtype.itemsize == 2 else 16  # addresses of uneven steps of float32 fill registers
    return _tile(64, fitting(columns, 64), fitting(inner, deep), num_warps=8, num_stages=2)


@functools.cache
def grad_weight_tile(ins: int, outs: int, dtype: torch.dtype) -> Tile:
    """Return the tile of the weight's gradient, which sums over rows."""
    if _wide(ins, outs, dtype):
        return _tile(fitting(outs, 128), fitting(ins, 128), 64, num_warps=8, num_stages=3)
    stages = 2 if dtype == torch.float32 else 3  # 2 hold half precision to 80 registers on sm_80: it spills
    return _tile(fitting(outs, 64), fitting(ins, 64), 32, num_warps=8, num_stages=stages)


def grad_weight_parts(ins: int, outs: int, rows: int, dtype: torch.dtype) -> int:
    """Return how many programs share the sum of a tile: two for each multiprocessor, of 512 rows or more each."""
    tile = grad_weight_tile(ins, outs, dtype)
    tiles = cdiv(outs, tile["BLOCK_M"]) * cdiv(ins, tile["BLOCK_N"])
    return max(1, min(cdiv(264, tiles), rows // 512))


def _precision(dtype: torch.dtype) -> str:
    """Choose exact products; for float32 three of tf32, but on AMD, which has none, plain float32."""
    return "ieee" if torch.version.hip or dtype != torch.float32 else "tf32x3"


@triton.jit
def _blocks(columns, rows, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the program's blocks of rows and of columns.

    Eight blocks of rows go through all columns together, so that they are read from the L2 cache.
    """
    blocks_n = tl.cdiv(columns, BLOCK_N)
    group = tl.program_id(0) // (8 * blocks_n)
    first = group * 8
    size = tl.minimum(tl.cdiv(rows, BLOCK_M) - first, 8)
    within = tl.program_id(0) % (8 * blocks_n)
    return first + within % size, within // size


@direct
@triton.jit
def packed_product_kernel(
    x,  # (T, K)
    weight,  # (K, N) by its strides
    bias,  # (N,) or None
    offsets,  # (B + 1,) int32
    out,  # (T, N), contiguous
    rows,
    columns,
    inner,
    batch,
    x_stride_t,
    weight_strides,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Compute one tile of ``x @ weight + bias`` in each program, zeros past the last row; grid (tiles,)."""
    block_m, block_n = _blocks(columns, rows, BLOCK_M, BLOCK_N)
    total = tl.load(offsets + batch)
    offsets_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offsets_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets_k = tl.arange(0, BLOCK_K)
    real = offsets_m < total
    in_n = offsets_n < columns
    x_tile = x + offsets_m.to(tl.int64)[:, None] * x_stride_t + offsets_k[None, :]
    weight_tile = weight + offsets_k[:, None] * weight_strides[0] + offsets_n.to(tl.int64)[None, :] * weight_strides[1]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, tl.where(block_m * BLOCK_M < total, inner, 0), BLOCK_K):
        if EVEN_K:
            token = tl.load(x_tile, mask=real[:, None], other=0.0)
            factor = tl.load(weight_tile, mask=in_n[None, :], other=0.0)
        else:
            in_k = start + offsets_k < inner
            token = tl.load(x_tile, mask=real[:, None] & in_k[None, :], other=0.0)
            factor = tl.load(weight_tile, mask=in_k[:, None] & in_n[None, :], other=0.0)
        acc = tl.dot(token, factor, acc, input_precision=PRECISION)
        x_tile += BLOCK_K
        weight_tile += BLOCK_K * weight_strides[0]
    if bias is not None:
        acc += tl.load(bias + offsets_n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    value = tl.where(real[:, None], acc, 0.0).to(out.dtype.element_ty)
    target = out + offsets_m.to(tl.int64)[:, None] * columns + offsets_n[None, :]
    tl.store(target, value, mask=(offsets_m < rows)[:, None] & in_n[None, :])


@direct
@triton.jit
def packed_weight_kernel(
    grad,  # (T, O)
    x,  # (T, I)
    offsets,  # (B + 1,) int32
    grad_weight,  # (P, O, I), contiguous, or None
    grad_bias,  # (P, O), contiguous, or None
    outs,
    ins,
    batch,
    grad_stride_t,
    x_stride_t,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute one tile of ``grad.T @ x`` over one of P parts of the rows in each program; grid (tiles, P).

    For ``grad_bias``, more programs come first and sum ``grad``: a load that feeds a dot must not feed a sum, see
    ``_distances``.
    """
    part = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    total = tl.load(offsets + batch)
    share = tl.cdiv(tl.cdiv(total, BLOCK_K), tl.num_programs(1)) * BLOCK_K
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, total)
    if grad_bias is not None:
        tile -= tl.cdiv(outs, BLOCK_M)
        if tile < 0:
            offsets_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
            in_m = offsets_m < outs
            sums = tl.zeros((BLOCK_M,), tl.float32)
            for start in range(begin, end, BLOCK_K):
                rows = start + tl.arange(0, BLOCK_K)
                real, rows = rows < end, rows.to(tl.int64)
                slope = grad + rows[:, None] * grad_stride_t + offsets_m[None, :]
                sums += tl.sum(tl.load(slope, mask=real[:, None] & in_m[None, :], other=0.0).to(tl.float32), 0)
            tl.store(grad_bias + part * outs + offsets_m, sums.to(grad_bias.dtype.element_ty), mask=in_m)
            return
    if grad_weight is not None:
        blocks_n = tl.cdiv(ins, BLOCK_N)
        offsets_m = tile // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
        offsets_n = tile % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
        in_m, in_n = offsets_m < outs, offsets_n < ins
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(begin, end, BLOCK_K):
            rows = start + tl.arange(0, BLOCK_K)
            real, rows = rows < end, rows.to(tl.int64)
            slope = grad + rows[:, None] * grad_stride_t + offsets_m[None, :]
            slope = tl.load(slope, mask=real[:, None] & in_m[None, :], other=0.0)
            token = x + rows[:, None] * x_stride_t + offsets_n[None, :]
            token = tl.load(token, mask=real[:, None] & in_n[None, :], other=0.0)
            acc = tl.dot(tl.trans(slope), token, acc, input_precision=PRECISION)
        target = grad_weight + part * outs * ins + offsets_m.to(tl.int64)[:, None] * ins + offsets_n[None, :]
        tl.store(target, acc.to(grad_weight.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, offsets: torch.Tensor) -> torch.Tensor:
    """Launch once; x (1, T, K) with contiguous channels times weight (K, N) of any strides -> (1, T, N)."""
    _, rows, inner = x.shape
    columns = weight.shape[1]
    out = torch.empty(1, rows, columns, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    tile = product_tile(inner, columns, x.dtype)
    packed_product_kernel[(cdiv(rows, tile["BLOCK_M"]) * cdiv(columns, tile["BLOCK_N"]),)](
        *(x, weight, bias, offsets, out),
        *(rows, columns, inner, offsets.shape[0] - 1, x.stride(1)),
        strides(weight, 2),
        PRECISION=_precision(x.dtype),
        EVEN_K=inner % tile["BLOCK_K"] == 0,
        **tile,
    )
    return out


def linear_packed(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, offsets: torch.Tensor
) -> torch.Tensor:
    """Launch once; x (1, T, I) and weight (O, I), dense last axes -> (1, T, O)."""
    return _product(x, weight.t(), bias, offsets)


def _summed(parts: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    """Sum over the parts, in the weight's dtype; return an empty tensor for None."""
    if parts is None:
        return weight.new_empty(0)
    return parts[0] if parts.shape[0] == 1 else parts.sum(0).to(weight.dtype)


def linear_packed_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    wanted: Sequence[bool] = (True, True, True),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x, weight and bias, empty where unwanted; grad (1, T, O), x (1, T, I).

    One launch is for x and one for the two others. If these are split over rows, each takes a sum more.
    """
    grad_x = _product(grad, weight, None, offsets) if wanted[0] else x.new_empty(0)
    if not (wanted[1] or wanted[2]):
        return grad_x, weight.new_empty(0), weight.new_empty(0)
    outs, ins = weight.shape
    parts = grad_weight_parts(ins, outs, x.shape[1], x.dtype)
    dtype = weight.dtype if parts == 1 else torch.float32
    grad_weight = torch.empty(parts, outs, ins, dtype=dtype, device=x.device) if wanted[1] else None
    grad_bias = torch.empty(parts, outs, dtype=dtype, device=x.device) if wanted[2] else None
    tile = grad_weight_tile(ins, outs, x.dtype)
    column_blocks = (cdiv(ins, tile["BLOCK_N"]) if wanted[1] else 0) + wanted[2]
    packed_weight_kernel[(cdiv(outs, tile["BLOCK_M"]) * column_blocks, parts)](
        *(grad, x, offsets, grad_weight, grad_bias),
        *(outs, ins, offsets.shape[0] - 1, grad.stride(1), x.stride(1)),
        PRECISION=_precision(x.dtype),
        **tile,
    )
    return grad_x, _summed(grad_weight, weight), _summed(grad_bias, weight)
