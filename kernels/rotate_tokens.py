"""Rotary positions: one pass that reads queries or keys and the table's rows at their places."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ._direct import cdiv, direct, next_power_of_2
from ._launch import Tile, in_parts, needs_parts, strides

ENOUGH_PROGRAMS = 1024  # fill any GPU of today; beyond them a program takes several heads and reads the table once


@functools.cache
def head_tile(images: int, tokens: int, heads: int, channels: int, shared: bool) -> Tile:
    """Return a tile of about 2,048 elements a step; heads with one table share a program if GPUs are full anyway."""
    block_d = next_power_of_2(channels)
    rows = max(1, 2048 // block_d)
    together = heads
    while together > 1 and images * cdiv(tokens, rows) * cdiv(heads, together) < ENOUGH_PROGRAMS:
        together = cdiv(together, 2)
    return Tile(ROWS=rows, HEADS=together if shared else 1, BLOCK_D=block_d, num_warps=4)


@triton.jit
def _read(tensor, row, offsets, mask, other: tl.constexpr):
    """Load rows that begin at ``row`` -> (ROWS, COLUMNS) float32."""
    return tl.load(tensor + row[:, None] + offsets[None, :], mask=mask, other=other).to(tl.float32)


@triton.jit
def _turned(x, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return (ROWS, BLOCK_D): (-x1, x0, -x3, x2, ...) of every row."""
    first, second = tl.split(tl.reshape(x, (ROWS, BLOCK_D // 2, 2)))
    return tl.reshape(tl.join(-second, first), (ROWS, BLOCK_D))


@direct
@triton.jit
def rotate_tokens_kernel(
    x,  # (B, H, N, D), channels contiguous
    cos,  # (B or 1, H or 1, P, D), channels contiguous; strides of 0 where rows are shared
    sin,  # as cos
    place,  # (B, N - PREFIX) or None for 0, 1, ...
    out,  # (B, N, H, D), contiguous
    tokens,
    heads,
    channels,
    x_strides,
    cos_strides,
    sin_strides,
    place_strides,
    BACKWARD: tl.constexpr,
    HALF: tl.constexpr,
    PREFIX: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Turn ROWS tokens of HEADS heads of one image in each program; grid (token blocks, images, head blocks)."""
    batch = tl.program_id(1).to(tl.int64)
    first_head = tl.program_id(2).to(tl.int64) * HEADS
    last_head = tl.minimum(tl.program_id(2) * HEADS + HEADS, heads)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_tokens = n < tokens
    is_patch = in_tokens & (n >= PREFIX)
    seat = n - PREFIX
    if place is not None:
        seat = tl.load(place + batch * place_strides[0] + seat * place_strides[1], mask=is_patch, other=-1)
    turns = is_patch & (seat >= 0)
    seat = tl.where(turns, seat, 0).to(tl.int64)
    x += batch * x_strides[0] + first_head * x_strides[1]
    out += (batch * tokens * heads + first_head) * channels
    row_cos = batch * cos_strides[0] + first_head * cos_strides[1] + seat * cos_strides[2]
    row_sin = batch * sin_strides[0] + first_head * sin_strides[1] + seat * sin_strides[2]
    row = n.to(tl.int64) * x_strides[2]
    target = n.to(tl.int64) * heads * channels
    if HALF:
        half = channels // 2
        low = tl.arange(0, BLOCK_D // 2)
        in_half = low < half
        mask = in_tokens[:, None] & in_half[None, :]
        seen = turns[:, None] & in_half[None, :]
        cos_low = _read(cos, row_cos, low, seen, 1.0)
        cos_high = _read(cos, row_cos, low + half, seen, 1.0)
        sin_low = _read(sin, row_sin, low, seen, 0.0)
        sin_high = _read(sin, row_sin, low + half, seen, 0.0)
        for _ in tl.range(tl.program_id(2) * HEADS, last_head):
            x_low = _read(x, row, low, mask, 0.0)
            x_high = _read(x, row, low + half, mask, 0.0)
            if BACKWARD:
                out_low = x_low * cos_low + x_high * sin_high
                out_high = x_high * cos_high - x_low * sin_low
            else:
                out_low = x_low * cos_low - x_high * sin_low
                out_high = x_high * cos_high + x_low * sin_high
            place_low = out + target[:, None] + low[None, :]
            tl.store(place_low, out_low.to(out.dtype.element_ty), mask=mask)
            tl.store(place_low + half, out_high.to(out.dtype.element_ty), mask=mask)
            x += x_strides[1]
            out += channels
    else:
        channel = tl.arange(0, BLOCK_D)
        in_channels = channel < channels
        mask = in_tokens[:, None] & in_channels[None, :]
        seen = turns[:, None] & in_channels[None, :]
        cosine = _read(cos, row_cos, channel, seen, 1.0)
        sine = _read(sin, row_sin, channel, seen, 0.0)
        for _ in tl.range(tl.program_id(2) * HEADS, last_head):
            value = _read(x, row, channel, mask, 0.0)
            if BACKWARD:
                rotated = value * cosine - _turned(value * sine, ROWS, BLOCK_D)
            else:
                rotated = value * cosine + _turned(value, ROWS, BLOCK_D) * sine
            tl.store(out + target[:, None] + channel[None, :], rotated.to(out.dtype.element_ty), mask=mask)
            x += x_strides[1]
            out += channels


def _launch(
    x: torch.Tensor,
    place: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    prefix: int,
    half: bool,
    backward: bool,
) -> torch.Tensor:
    batch, heads, tokens, channels = x.shape
    if needs_parts(batch):
        cos, sin = (table[(None,) * (4 - table.ndim)].expand(batch, -1, -1, -1) for table in (cos, sin))
        return _launch_in_parts(x, place, cos, sin, prefix, half, backward)
    out = torch.empty(batch, tokens, heads, channels, dtype=x.dtype, device=x.device)
    if out.numel():
        cos_strides, sin_strides = _table_strides(cos), _table_strides(sin)
        shared = cos_strides[1] == 0 and sin_strides[1] == 0
        tile = head_tile(batch, tokens, heads, channels, shared)
        rotate_tokens_kernel[cdiv(tokens, tile["ROWS"]), batch, cdiv(heads, tile["HEADS"])](
            *(x, cos, sin, place, out),
            *(tokens, heads, channels),
            *(strides(x, 3), cos_strides, sin_strides, strides(place, 2)),
            BACKWARD=backward,
            HALF=half,
            PREFIX=prefix,
            **tile,
        )
    return out.transpose(1, 2)


_launch_in_parts = in_parts("x", "place", "cos", "sin")(_launch)


def _table_strides(table: torch.Tensor) -> tuple[int, int, int]:
    """Return the strides over images, heads and places of a table: (P, D), (1 or H, P, D) or (1 or B, 1 or H, P, D)."""
    steps, sizes = table.stride(), table.shape
    stride_h = steps[-3] if len(sizes) > 2 and sizes[-3] > 1 else 0
    stride_b = steps[0] if len(sizes) > 3 and sizes[0] > 1 else 0
    return stride_b, stride_h, steps[-2]


def rotate_tokens(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, place: torch.Tensor | None, prefix: int, half: bool
) -> torch.Tensor:
    """Launch once; x (B, H, N, D), tables with contiguous channels, place (B, N - prefix) or None -> (B, H, N, D)."""
    return _launch(x, place, cos, sin, prefix, half, False)


def rotate_tokens_backward(
    grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, place: torch.Tensor | None, prefix: int, half: bool
) -> torch.Tensor:
    """Launch once; gradient of the result -> gradient of x, both (B, H, N, D)."""
    return _launch(grad, place, cos, sin, prefix, half, True)
