"""Loads of 16 bytes from rows of, say, 72 channels; by itself the JIT knows only strides that 16 elements divide."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ._direct import next_power_of_2
from ._launch import Tile

LOWEST = tl.constexpr(-3.4e38)  # finite, in place of -inf, so that the difference of two is not NaN


def padded_head_dim(head_dim: int) -> int:
    """Return the next power of two, at least 16, as tensor cores need it."""
    return max(16, next_power_of_2(head_dim))


@functools.cache
def head_rows(head_dim: int, elements: int) -> Tile:
    """Return a tile of whole rows of one head, of about ``elements`` elements."""
    block_d = padded_head_dim(head_dim)
    return Tile(BLOCK_N=max(1, elements // block_d), BLOCK_D=block_d, num_warps=4)


def unit_of(*tensors: torch.Tensor) -> int:
    """Return the elements in 16 bytes if every row of every tensor begins and ends at a multiple of them, else 1."""
    unit = 16 // tensors[0].element_size()
    for tensor in tensors:
        if tensor.data_ptr() % 16 or not _whole(unit, tensor.shape[-1], tensor.stride()):
            return 1
    return unit


@functools.lru_cache(4096)
def _whole(unit: int, columns: int, strides: tuple[int, ...]) -> bool:
    return not any(step % unit for step in (columns, *strides[:-1]))


@triton.jit
def head_of(tensor, batch, head, strides, UNIT: tl.constexpr):
    """Return where a head begins, and tell the compiler that UNIT divides the steps; it would miss 72 channels."""
    return tensor + tl.multiple_of(batch * strides[0], UNIT) + tl.multiple_of(head * strides[1], UNIT)


@triton.jit
def steps(rows, stride, UNIT: tl.constexpr):
    """Return the steps from one row of a head to others, marked as multiples of UNIT too."""
    return tl.multiple_of(rows.to(tl.int64) * stride, UNIT)[:, None]
