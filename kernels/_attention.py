"""Tiles, device functions and a sum over heads, shared by the forward and the backward pass of attention."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ._direct import cdiv, direct, is_compiled, next_power_of_2
from ._launch import Tile, parts_of_images
from ._rows import padded_head_dim

LOG2_E = 1.4426950408889634


def _tile(queries: int, keys: int, num_warps: int, **registers: int) -> Tile:
    return Tile(BLOCK_M=queries, BLOCK_N=keys, num_warps=num_warps, num_stages=2, **registers)


# By the padded head dimension, a tile for each pass: over the keys for the result, over the keys for the gradient of q,
# over the queries for the gradients of k and v. Found by compiling: none spills for sm_80 and sm_90, with any option.
HALF_TILES = {
    64: (_tile(64, 64, 4), _tile(64, 32, 4), _tile(32, 64, 4)),
    128: (_tile(128, 32, 8), _tile(64, 32, 8), _tile(32, 64, 8)),
    256: (_tile(64, 32, 8), _tile(32, 32, 8), _tile(64, 32, 8)),
}
# At 128 channels, larger tiles spill a few words on sm_80 with an index, and with scores and a bias.
SHORT_GRAD_QUERIES = _tile(64, 16, 8)
# By itself the assembler spills a few words to fit one more program on a multiprocessor.
ALL_REGISTERS = {"maxnreg": 255}
# Rows that are not aligned to 16 bytes need an address for every element: twice as many rows spill a few words.
# Rows of float32 with 128 channels spill them with any option too.
SMALL_HALF = _tile(16, 16, 4, **ALL_REGISTERS)
SMALL_FLOAT = _tile(16, 16, 8, **ALL_REGISTERS)
# Exact dots hold their operands in registers; the dots of the gradients hold most.
FLOAT_TILES = {
    64: (_tile(32, 16, 8), _tile(32, 16, 8), _tile(16, 32, 8)),
    128: (_tile(32, 16, 8), _tile(32, 16, 8), SMALL_FLOAT),
    256: (SMALL_FLOAT, SMALL_FLOAT, SMALL_FLOAT),
}
FLOAT_WITH_OPTIONS = _tile(32, 16, 8, **ALL_REGISTERS)


@functools.cache
def attention_tiles(
    head_dim: int, dtype: torch.dtype, aligned: bool, *, with_options: bool = False
) -> tuple[Tile, Tile, Tile]:
    """Return the tiles of the three passes, for a head dimension up to 256.

    ``with_options`` stands for a bias, an index, offsets or a gradient of the scores.
    """
    width = max(64, padded_head_dim(head_dim))
    if aligned and dtype != torch.float32:
        forward, grad_queries, grad_keys = HALF_TILES[width]
        return forward, SHORT_GRAD_QUERIES if width == 128 and with_options else grad_queries, grad_keys
    if dtype != torch.float32:
        return SMALL_HALF, SMALL_HALF, SMALL_HALF
    if aligned and not with_options:
        return FLOAT_TILES[width]
    tile = FLOAT_WITH_OPTIONS if aligned and width == 64 else SMALL_FLOAT
    # 16 rows of 32 channels are 16 bytes for each of 128 threads.
    return tile, tile, Tile(SMALL_FLOAT, num_warps=4) if head_dim <= 32 else SMALL_FLOAT


@functools.cache
def whole_tile(queries: int, head_dim: int, dtype: torch.dtype, aligned: bool) -> Tile | None:
    """Return the tile of a program that has all queries of a head, or None where two passes are needed.

    Such a program computes the gradients with five products. Two passes need seven: each computes the logits and the
    gradient of the weights for itself. 8 warps must hold the accumulators beside the logits of a step. That works on
    Hopper alone, since older tensor cores take operands from registers. A policy, gradients of scores, or channels that
    need a mask would spill.
    """
    own, width = max(64, next_power_of_2(queries)), padded_head_dim(head_dim)
    if not aligned or dtype == torch.float32 or width != head_dim or own * max(64, width) > 16384:
        return None
    return _tile(own, 16 if own == 256 else 32, max(4, own // 32))


def takes_whole() -> bool:
    """Return whether the device is a Hopper; the interpreter behaves as one."""
    if not is_compiled(sum_heads_kernel):
        return True
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch // 10 == 9


def last_rows(rows: int, step: int) -> int:
    """Return the size of the last step: the least power of two, 16 or more, that holds the rest; 0 without a rest."""
    left = rows % step
    return min(step, max(16, next_power_of_2(left))) if left else 0


def last_keys(keys: int, step: int) -> int:
    """Count the keys of the last step, where it stands apart; -1 if there is no whole step before it, so none does."""
    return last_rows(keys, step) if keys >= step else -1


def has_last_step(head_dim: int, dtype: torch.dtype, unit: int) -> bool:
    """Return whether only the last step is masked, in separate code; wider rows lack the registers for that."""
    return dtype != torch.float32 and unit > 1 and padded_head_dim(head_dim) <= 64


@triton.jit
def load_rows(pointers, rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows (ROWS, BLOCK_D) with D real channels and zeros past them; ``rows`` is their mask or None."""
    in_d = (tl.arange(0, BLOCK_D) < D)[None, :]
    if rows is not None:
        loaded = tl.load(pointers, mask=rows[:, None] & in_d, other=0.0)
    elif D < BLOCK_D:
        loaded = tl.load(pointers, mask=in_d, other=0.0)
    else:
        loaded = tl.load(pointers)
    return loaded


@triton.jit
def load_columns(row, columns, mask, stride):
    """Load one float32 for each key; ``mask`` may be None."""
    pointers = row + columns.to(tl.int64) * stride
    if mask is None:
        loaded = tl.load(pointers)
    else:
        loaded = tl.load(pointers, mask=mask, other=0.0)
    return loaded.to(tl.float32)


@triton.jit
def load_bias(row, columns, mask, stride, log2_e):
    """Load the bias of these keys in units of log 2, -inf where ``mask`` is False; ``mask`` may be None."""
    pointers = row + columns.to(tl.int64) * stride
    if mask is None:
        loaded = tl.load(pointers)
    else:
        loaded = tl.load(pointers, mask=mask, other=float("-inf"))
    return loaded.to(tl.float32) * log2_e


@triton.jit
def chosen_rows(places, index, index_stride_k, prefix, mask, first):
    """Return the rows of q for these places of an image that begins at ``first``: the prefix, then the index's rows."""
    patches = places - prefix
    chosen = tl.load(index + patches.to(tl.int64) * index_stride_k, mask=mask & (patches >= 0), other=0)
    return tl.where(patches >= 0, chosen.to(tl.int64) + prefix, places.to(tl.int64)) + first


@triton.jit
def clear_rows(target, offsets, rows, heads, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write zeros to the rows of this head past the last image; the programs of the head share these rows."""
    first = tl.load(offsets + tl.num_programs(2))
    part = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    offsets_d = tl.arange(0, BLOCK_D)
    for start in range(first + part * BLOCK, rows, tl.num_programs(0) * tl.num_programs(2) * BLOCK):
        past = start + tl.arange(0, BLOCK)
        targets = target + (past.to(tl.int64)[:, None] * heads + tl.program_id(1)) * D + offsets_d[None, :]
        nothing = tl.zeros((BLOCK, BLOCK_D), target.dtype.element_ty)
        tl.store(targets, nothing, mask=(past < rows)[:, None] & (offsets_d < D)[None, :])


@direct
@triton.jit
def sum_heads_kernel(
    parts,  # (B, H, N) float32, contiguous
    offsets,  # (images + 1,) int32 or None: only keys before the last of them have parts
    summed,  # (B, N), contiguous
    images,
    heads,
    keys,
    BLOCK_N: tl.constexpr,
):
    """Sum the parts of BLOCK_N keys over the heads, in order, in each program; grid (blocks of keys, images)."""
    batch = tl.program_id(1).to(tl.int64)
    offsets_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = offsets_n < keys
    with_parts = in_n
    if offsets is not None:
        with_parts = offsets_n < tl.load(offsets + images)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for head in range(heads):
        acc += tl.load(parts + (batch * heads + head) * keys + offsets_n, mask=with_parts, other=0.0)
    tl.store(summed + batch * keys + offsets_n, acc.to(summed.dtype.element_ty), mask=in_n)


Parts = list[tuple[int, torch.Tensor | None, tuple[torch.Tensor | None, torch.Tensor | None]]]


def launches(
    images: int, index: torch.Tensor | None, query_offsets: torch.Tensor | None, key_offsets: torch.Tensor | None
) -> Parts:
    """Return count, index and offsets of the images for each launch: a grid takes MOST_IMAGES packed images at most."""
    parts = parts_of_images(images)
    if len(parts) == 1 or query_offsets is None or key_offsets is None:
        return [(images, index, (query_offsets, key_offsets))]
    return [
        (
            part.stop - part.start,
            None if index is None else index[part],
            (query_offsets[part.start : part.stop + 1], key_offsets[part.start : part.stop + 1]),
        )
        for part in parts
    ]


def sum_heads(parts: torch.Tensor, summed: torch.Tensor, offsets: torch.Tensor | None = None) -> None:
    batch, heads, keys = parts.shape
    images = 0 if offsets is None else offsets.shape[0] - 1
    sum_heads_kernel[(cdiv(keys, 256), batch)](parts, offsets, summed, images, heads, keys, BLOCK_N=256, num_warps=4)
