"""Sortable keys: integers in the order of floats, in which the index decides ties and NaN has a fixed place."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def packed_keys(scores, offsets, in_bounds):
    """Return int64 keys whose descending order is (score descending, index ascending), NaN last, -0.0 equal to 0.0."""
    value = tl.load(scores, mask=in_bounds, other=float("nan")).to(tl.float32)
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(value == value, ordered, -0x80000000)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - offsets).to(tl.int64)


@triton.jit
def ascending_keys(value, index):
    """Return int64 keys in the order of (value, index), NaN last and -0.0 equal to 0.0."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(value == value, ordered, 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | index.to(tl.int64)


@triton.jit
def unsigned_bits(value):
    """Return unsigned integers in the order of the floats; -0.0 and 0.0 give the same one."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)


@triton.jit
def ordered_bits(squared):
    """Return integers in the order of floats that are not negative; NaN is above infinity."""
    return squared.to(tl.int32, bitcast=True) & 0x7FFFFFFF
