"""Packed tokens: kept rows with the residual added, their gradient, and the way back to padded rows.

Every program finds the image of its rows by bisection, so the host need not know the lengths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._direct import cdiv, direct, next_power_of_2
from ._launch import fitting, row_tile, strides


@triton.jit
def _image_of(offsets, row, batch, STEPS: tl.constexpr):
    """Return the image that a row is in, which is the number of images that end before it; ``batch`` past the last."""
    image = tl.zeros_like(row)
    end = image + batch
    for _ in range(STEPS):
        middle = (image + end) // 2
        searching = image < end
        ended = tl.load(offsets + middle + 1, mask=searching, other=0) <= row
        image = tl.where(searching & ended, middle + 1, image)
        end = tl.where(searching & ~ended, middle, end)
    return image


@direct
@triton.jit
def token_offsets_kernel(
    valid,  # (B, N) bool
    offsets,  # (B + 1,) int32
    batch,
    tokens,
    valid_strides,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Count the tokens of BLOCK_B images at a time, and cumulate, in the only program; grid (1,)."""
    total = tl.zeros((), tl.int32)
    tl.store(offsets, total)
    for start_b in range(0, batch, BLOCK_B):
        images = start_b + tl.arange(0, BLOCK_B)
        in_b = images < batch
        rows = valid + images.to(tl.int64)[:, None] * valid_strides[0]
        count = tl.zeros((BLOCK_B,), tl.int32)
        for start_n in range(0, tokens, BLOCK_N):
            columns = start_n + tl.arange(0, BLOCK_N)
            mask = in_b[:, None] & (columns < tokens)[None, :]
            real = tl.load(rows + columns.to(tl.int64)[None, :] * valid_strides[1], mask=mask, other=0)
            count += tl.sum((real != 0).to(tl.int32), 1)
        tl.store(offsets + 1 + images, total + tl.cumsum(count, 0), mask=in_b)
        total += tl.sum(count, 0)


@direct
@triton.jit
def gather_packed_kernel(
    x,  # (T, C), or (B, SOURCE_ROWS, C) without source
    index,  # (B, K), or None to keep all rows
    residual,  # (R, C) or None
    source,  # (B + 1,) int32 or None
    target,  # (B + 1,) int32
    out,  # (R, C), contiguous
    num_out,
    channels,
    batch,
    x_strides,
    index_strides,
    residual_stride_t,
    PREFIX: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Write ROWS packed rows of BLOCK_C channels in each program, zeros past the last image.

    Grid (blocks of rows, blocks of channels).
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offsets_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    image = _image_of(target, rows, batch, STEPS)
    in_rows = rows < num_out
    real = in_rows & (image < batch)
    place = rows - tl.load(target + image, mask=real, other=0)
    picked = place.to(tl.int64)
    if index is not None:
        is_patch = real & (place >= PREFIX)
        entry = image.to(tl.int64) * index_strides[0] + (place - PREFIX).to(tl.int64) * index_strides[1]
        chosen = tl.load(index + entry, mask=is_patch, other=0).to(tl.int64)
        picked = tl.where(is_patch, chosen + PREFIX, picked)
    if source is None:
        begin = image.to(tl.int64) * x_strides[0]
    else:
        begin = tl.load(source + image, mask=real, other=0).to(tl.int64) * x_strides[1]
    in_c = offsets_c < channels
    mask = real[:, None] & in_c[None, :]
    value = tl.load(x + (begin + picked * x_strides[1])[:, None] + offsets_c[None, :], mask=mask, other=0.0)
    value = value.to(tl.float32)
    if residual is not None:
        added = residual + rows.to(tl.int64)[:, None] * residual_stride_t + offsets_c[None, :]
        value += tl.load(added, mask=mask, other=0.0).to(tl.float32)
    rows_out = out + rows.to(tl.int64)[:, None] * channels + offsets_c[None, :]
    tl.store(rows_out, value.to(out.dtype.element_ty), mask=in_rows[:, None] & in_c[None, :])


@direct
@triton.jit
def scatter_packed_kernel(
    x,  # (R, C)
    index,  # (B, K), its real entries ascending, or None where all rows were kept
    source,  # (B + 1,) int32: rows of out; None where every image has num_out / B
    target,  # (B + 1,) int32
    out,  # (num_out, C), contiguous
    num_out,
    channels,
    batch,
    each,
    x_stride_t,
    index_strides,
    PREFIX: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEPS: tl.constexpr,
    INDEX_STEPS: tl.constexpr,
):
    """Write ROWS rows of out, BLOCK_C channels of them, in each program: the row of x that each became, or zeros.

    Grid (blocks of rows, blocks of channels).
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offsets_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_rows = rows < num_out
    if source is None:
        image = (rows // each).to(tl.int32)
        place = (rows - image * each).to(tl.int32)
        found = in_rows
    else:
        image = _image_of(source, rows, batch, STEPS)
        found = in_rows & (image < batch)
        place = rows - tl.load(source + image, mask=found, other=0)
    begin = tl.load(target + image, mask=found, other=0)
    count = tl.load(target + image + 1, mask=found, other=0) - begin
    if index is not None:
        is_patch = found & (place >= PREFIX)
        entries = index + image.to(tl.int64) * index_strides[0]
        first = tl.zeros_like(rows)  # place of the first index that is not smaller
        end = tl.maximum(count - PREFIX, 0)
        for _ in range(INDEX_STEPS):
            middle = (first + end) // 2
            searching = is_patch & (first < end)
            entry = tl.load(entries + middle.to(tl.int64) * index_strides[1], mask=searching, other=0).to(tl.int32)
            below = entry < place - PREFIX
            first = tl.where(searching & below, middle + 1, first)
            end = tl.where(searching & ~below, middle, end)
        inside = is_patch & (first < count - PREFIX)
        entry = tl.load(entries + first.to(tl.int64) * index_strides[1], mask=inside, other=0).to(tl.int32)
        found = tl.where(is_patch, inside & (entry == place - PREFIX), found)
        place = tl.where(is_patch, first + PREFIX, place)
    found = found & (place < count)
    in_c = offsets_c < channels
    became = (begin + place).to(tl.int64)[:, None] * x_stride_t + offsets_c[None, :]
    value = tl.load(x + became, mask=found[:, None] & in_c[None, :], other=0.0)
    rows_out = out + rows.to(tl.int64)[:, None] * channels + offsets_c[None, :]
    tl.store(rows_out, value.to(out.dtype.element_ty), mask=in_rows[:, None] & in_c[None, :])


def token_offsets(valid: torch.Tensor) -> torch.Tensor:
    """Launch once; valid (B, N) bool of any strides -> (B + 1,) int32."""
    batch, tokens = valid.shape
    offsets = torch.empty(batch + 1, dtype=torch.int32, device=valid.device)
    # 16 flags a thread: the only program waits for memory, so rounds should be few.
    block_n = fitting(tokens, 128)
    block_b = min(max(1, 4096 // block_n), next_power_of_2(max(1, batch)))
    token_offsets_kernel[(1,)](
        valid, offsets, batch, tokens, strides(valid, 2), BLOCK_B=block_b, BLOCK_N=block_n, num_warps=8
    )
    return offsets


def _gather(
    x: torch.Tensor,
    index: torch.Tensor | None,
    source: torch.Tensor | None,
    target: torch.Tensor,
    prefix: int,
    num_out: int,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    channels, batch = x.shape[2], target.shape[0] - 1
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    out = torch.empty(1, num_out, channels, dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    tile = row_tile(channels)
    gather_packed_kernel[(cdiv(num_out, tile["ROWS"]), cdiv(channels, tile["BLOCK_C"]))](
        *(x, index, residual, source, target, out),
        *(num_out, channels, batch),
        *(strides(x, 2), strides(index, 2)),
        0 if residual is None else residual.stride(1),
        PREFIX=prefix,
        STEPS=batch.bit_length(),
        **tile,
    )
    return out


def _scatter(
    x: torch.Tensor,
    index: torch.Tensor | None,
    source: torch.Tensor | None,
    target: torch.Tensor,
    prefix: int,
    out: torch.Tensor,
) -> torch.Tensor:
    batch, (channels, each) = target.shape[0] - 1, (out.shape[2], out.shape[1])
    if out.numel() == 0:
        return out
    num_out = out.shape[0] * each
    tile = row_tile(channels)
    scatter_packed_kernel[(cdiv(num_out, tile["ROWS"]), cdiv(channels, tile["BLOCK_C"]))](
        *(x, index, source, target, out),
        *(num_out, channels, batch, each, x.stride(1)),
        strides(index, 2),
        PREFIX=prefix,
        STEPS=batch.bit_length(),
        INDEX_STEPS=0 if index is None else index.shape[1].bit_length(),
        **tile,
    )
    return out


def gather_packed(
    x: torch.Tensor,
    index: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    prefix: int,
    num_out: int,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Launch once; x (1, T, C) and residual with contiguous channels, index (B, K) -> (1, num_out, C)."""
    return _gather(x, index, source, target, prefix, num_out, residual)


def gather_packed_backward(
    grad: torch.Tensor, index: torch.Tensor, source: torch.Tensor, target: torch.Tensor, prefix: int, num_in: int
) -> torch.Tensor:
    """Launch once; grad (1, R, C) with contiguous channels -> (1, num_in, C)."""
    out = torch.empty(1, num_in, grad.shape[2], dtype=grad.dtype, device=grad.device)
    return _scatter(grad, index, source, target, prefix, out)


def unpack_tokens(x: torch.Tensor, offsets: torch.Tensor, longest: int) -> torch.Tensor:
    """Launch once; x (1, T, C) with contiguous channels -> (B, longest, C)."""
    out = torch.empty(offsets.shape[0] - 1, longest, x.shape[2], dtype=x.dtype, device=x.device)
    return _scatter(x, None, None, offsets, 0, out)


def unpack_tokens_backward(grad: torch.Tensor, offsets: torch.Tensor, num_in: int) -> torch.Tensor:
    """Launch once; grad (B, longest, C) with contiguous channels -> (1, num_in, C)."""
    return _gather(grad, None, None, offsets, 0, num_in, None)
