"""Density-peak clustering without an N x N matrix in memory. Launches: squared lengths; densities; the rest.

Images of more than ``most_tokens`` take six: squared lengths, densities, scores, the best scores, labels, groups.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ._direct import cdiv, direct, next_power_of_2
from ._distances import squared_distances, squared_lengths
from ._launch import Tile, fitting, in_parts, strides
from ._order import ordered_bits, packed_keys
from .select_topk import select_topk
from .slots import group, group_slots

# Nearest tokens that a sweep over the image finds and holds in registers; 16 would spill. More take further sweeps.
MAX_NEAREST = 8


@functools.cache
def distance_tile(channels: int, dtype: torch.dtype) -> Tile:
    """Choose settings, found by compiling, that never spill for sm_80 and sm_90, channels aligned or not."""
    if dtype == torch.float32:  # exact dots hold their operands in registers: 64 by 64 tokens, or 4 warps, spill
        return Tile(BLOCK_I=32, BLOCK_J=64, BLOCK_C=16, num_warps=8, num_stages=2)
    return Tile(BLOCK_I=64, BLOCK_J=64, BLOCK_C=fitting(channels, 64), num_warps=8, num_stages=3)


def most_tokens(dtype: torch.dtype) -> int:
    """Return the most tokens of an image that one program clusters: one key for each thread of the sort.

    Exact dots of float32 do without tensor cores, and would keep one multiprocessor busy for about 100 us (DeiT-S).
    Several multiprocessors save more than three further launches cost.
    """
    return 64 if dtype == torch.float32 else 256


@functools.cache
def image_tile(channels: int, dtype: torch.dtype, aligned: bool = True) -> Tile:
    """Return the tile of the program that clusters a whole image; it was found by compiling too.

    The program takes all registers of a multiprocessor. Rows that are not aligned need an address for every element:
    with so wide a tile they would spill.
    """
    if dtype == torch.float32:  # 2 stages or 64 by 64 tokens spill; 16 warps would load two channels a thread
        return Tile(BLOCK_I=32, BLOCK_J=64, BLOCK_C=16, num_warps=8, num_stages=3)
    tile = distance_tile(channels, dtype)
    return Tile(tile, BLOCK_J=128, num_warps=16) if aligned else tile


@direct
@triton.jit
def density_kernel(
    x,  # (B, N, C)
    squares,  # (B, N) float32
    noise,  # (B, N) or None
    density,  # (B, N) float32
    farthest,  # (B, N) float32: largest squared distance of every token
    tokens,
    channels,
    neighbors,  # 1 .. N
    x_strides,
    noise_strides,
    NEAREST: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute density and largest distance of BLOCK_I tokens in each program; grid (blocks of tokens, images)."""
    batch = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    rows = x + batch * x_strides[0] + tl.arange(0, BLOCK_C)[None, :]
    squares += batch * tokens
    # Rows past the end repeat the last one: a mask for them would cost registers.
    row_i = tl.minimum(i, tokens - 1)
    pointers_i = rows + row_i.to(tl.int64)[:, None] * x_strides[1]
    squares_i = tl.load(squares + row_i)
    beyond = 0x7FFFFFFFFFFFFFFF
    place = tl.arange(0, NEAREST).to(tl.int64)

    farthest_bits = tl.zeros((BLOCK_I,), tl.int32)
    total = tl.zeros((BLOCK_I,), tl.float32)
    taken = tl.full((BLOCK_I,), -1, tl.int64)  # the greatest key that an earlier sweep took
    for found in range(0, neighbors, NEAREST):
        wanted = tl.minimum(neighbors - found, NEAREST)
        # Keys are distinct: bits of the distance, then the column. Vacant places sort above them, unused ones below.
        vacant = tl.where(place < wanted, beyond - 1 - place, -2 - place)
        nearest = tl.zeros((BLOCK_I, NEAREST), tl.int64) + vacant[None, :]
        for start_j in range(0, tokens, BLOCK_J):
            j = start_j + tl.arange(0, BLOCK_J)
            in_j = (j < tokens)[None, :]
            row_j = tl.minimum(j, tokens - 1)
            pointers_j = rows + row_j.to(tl.int64)[:, None] * x_strides[1]
            squares_j = squares + row_j
            squared = squared_distances(
                pointers_i, pointers_j, squares_i, squares_j, channels, BLOCK_I, BLOCK_J, BLOCK_C
            )
            squared = tl.where(i[:, None] == j[None, :], squared - squared, squared)  # zero, unless it is NaN
            bits = ordered_bits(squared)
            farthest_bits = tl.maximum(farthest_bits, tl.max(tl.where(in_j, bits, 0), 1))
            keys = (bits.to(tl.int64) << 32) | j.to(tl.int64)[None, :]
            keys = tl.where(in_j & (keys > taken[:, None]), keys, beyond)
            for _ in range(wanted):
                smallest, greatest = tl.min(keys, 1), tl.max(nearest, 1)
                replaced = (nearest == greatest[:, None]) & (smallest < greatest)[:, None]
                nearest = tl.where(replaced, smallest[:, None], nearest)
                keys = tl.where(keys == smallest[:, None], beyond, keys)
        value = (nearest >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        total += tl.sum(tl.where((place < wanted)[None, :], value, 0.0), 1)
        taken = tl.max(nearest, 1)

    value = tl.exp(-total / neighbors / channels)
    if noise is not None:
        pointers = noise + batch * noise_strides[0] + i * noise_strides[1]
        value += tl.load(pointers, mask=i < tokens, other=0.0).to(tl.float32)
    tl.store(density + batch * tokens + i, value, mask=i < tokens)
    tl.store(farthest + batch * tokens + i, farthest_bits.to(tl.float32, bitcast=True), mask=i < tokens)


@triton.jit
def _scores(
    rows,  # pointer to the first row of the image
    squares,  # (N,) float32: of the image
    density,  # (N,) float32
    farthest,  # (N,) float32
    score,  # (N,) float32
    start_i,
    tokens,
    channels,
    x_strides,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Store density times the distance to the nearest denser token, or the image's largest distance if none is."""
    i = start_i + tl.arange(0, BLOCK_I)
    row_i = tl.minimum(i, tokens - 1)
    pointers_i = rows + row_i.to(tl.int64)[:, None] * x_strides[1]
    squares_i = tl.load(squares + row_i)
    density_i = tl.load(density + row_i)

    nearest = tl.full((BLOCK_I,), float("inf"), tl.float32)
    farthest_bits = tl.zeros((BLOCK_J,), tl.int32)
    for start_j in range(0, tokens, BLOCK_J):
        column = start_j + tl.arange(0, BLOCK_J)
        j = tl.minimum(column, tokens - 1)
        pointers_j = rows + j.to(tl.int64)[:, None] * x_strides[1]
        squares_j = squares + j
        squared = squared_distances(pointers_i, pointers_j, squares_i, squares_j, channels, BLOCK_I, BLOCK_J, BLOCK_C)
        # Columns past the end repeat the last token, where its dot may round differently: they are denser than none.
        density_j = tl.load(density + column, mask=column < tokens, other=float("-inf"))
        denser = density_j[None, :] > density_i[:, None]
        nearest = tl.minimum(nearest, tl.min(tl.where(denser, squared, float("inf")), 1))
        farthest_bits = tl.maximum(farthest_bits, ordered_bits(tl.load(farthest + j)))
    largest = tl.max(farthest_bits, 0).to(tl.float32, bitcast=True)
    height = tl.sqrt(tl.where(nearest < largest, nearest, largest) / channels)  # NaN in the image: NaN everywhere
    tl.store(score + i, density_i * height, mask=i < tokens)


@direct
@triton.jit
def score_kernel(
    x,  # (B, N, C)
    squares,  # (B, N) float32
    density,  # (B, N) float32
    farthest,  # (B, N) float32
    score,  # (B, N) float32
    tokens,
    channels,
    x_strides,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Score BLOCK_I tokens of one image in each program; grid (blocks of tokens, images)."""
    batch = tl.program_id(1).to(tl.int64)
    rows = x + batch * x_strides[0] + tl.arange(0, BLOCK_C)[None, :]
    squares += batch * tokens
    density += batch * tokens
    farthest += batch * tokens
    score += batch * tokens
    start_i = tl.program_id(0) * BLOCK_I
    _scores(rows, squares, density, farthest, score, start_i, tokens, channels, x_strides, BLOCK_I, BLOCK_J, BLOCK_C)


@triton.jit
def _labels(
    rows,  # pointer to the first row of the image
    squares,  # (N,) float32: of the image
    centers,  # (K,) int64
    label,  # (N,) int64
    start_i,
    tokens,
    channels,
    num_centers,
    x_strides,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Store the nearest centre of BLOCK_I tokens, the first one if tied; a centre belongs to itself."""
    i = start_i + tl.arange(0, BLOCK_I)
    row_i = tl.minimum(i, tokens - 1)
    pointers_i = rows + row_i.to(tl.int64)[:, None] * x_strides[1]
    squares_i = tl.load(squares + row_i)

    nearest = tl.full((BLOCK_I,), float("inf"), tl.float32)
    label_i = tl.zeros((BLOCK_I,), tl.int32)
    for start_j in range(0, num_centers, BLOCK_J):
        j = start_j + tl.arange(0, BLOCK_J)
        center = tl.load(centers + tl.minimum(j, num_centers - 1))
        pointers_j = rows + center[:, None] * x_strides[1]
        squares_j = squares + center
        squared = squared_distances(pointers_i, pointers_j, squares_i, squares_j, channels, BLOCK_I, BLOCK_J, BLOCK_C)
        squared = tl.where(squared == squared, squared, -1.0)  # torch orders NaN before every number
        squared = tl.where(center[None, :] == i[:, None], -2.0, squared)
        # Columns past the end repeat the last centre, where its dot may round differently: they must never win.
        squared = tl.where((j < num_centers)[None, :], squared, float("inf"))
        tile_nearest, tile_label = tl.min(squared, 1, return_indices=True, return_indices_tie_break_left=True)
        closer = tile_nearest < nearest  # strict: the earlier tile wins ties
        nearest = tl.where(closer, tile_nearest, nearest)
        label_i = tl.where(closer, start_j + tile_label, label_i)
    tl.store(label + i, label_i.to(tl.int64), mask=i < tokens)


@direct
@triton.jit
def label_kernel(
    x,  # (B, N, C)
    squares,  # (B, N) float32
    centers,  # (B, K) int64, contiguous
    label,  # (B, N) int64, contiguous
    tokens,
    channels,
    num_centers,
    x_strides,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Label BLOCK_I tokens with their nearest centre in each program; grid (blocks of tokens, images)."""
    batch = tl.program_id(1).to(tl.int64)
    rows = x + batch * x_strides[0] + tl.arange(0, BLOCK_C)[None, :]
    squares += batch * tokens
    centers += batch * num_centers
    label += batch * tokens
    start_i = tl.program_id(0) * BLOCK_I
    _labels(rows, squares, centers, label, start_i, tokens, channels, num_centers, x_strides, BLOCK_I, BLOCK_J, BLOCK_C)


@direct
@triton.jit(do_not_specialize=["tokens", "num_centers"])  # specialised to one centre it spilled
def cluster_kernel(
    x,  # (B, N, C), N up to BLOCK_N
    squares,  # (B, N) float32
    density,  # (B, N) float32
    farthest,  # (B, N) float32
    score,  # (B, N) float32
    centers,  # (B, K) int64, contiguous
    label,  # (B, N) int64, contiguous
    order,  # (B, N) int32
    offsets,  # (B, K + 1) int32
    tokens,
    channels,
    num_centers,
    x_strides,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP_I: tl.constexpr,
    GROUP_J: tl.constexpr,
):
    """Cluster one image in each program: scores, centres, labels, groups; grid (images,).

    Each step loads values that other threads stored, behind a barrier.
    """
    batch = tl.program_id(0).to(tl.int64)
    rows = x + batch * x_strides[0] + tl.arange(0, BLOCK_C)[None, :]
    squares += batch * tokens
    density += batch * tokens
    farthest += batch * tokens
    score += batch * tokens
    centers += batch * num_centers
    label += batch * tokens
    order += batch * tokens
    offsets += batch * (num_centers + 1)
    for start_i in range(0, tokens, BLOCK_I):
        _scores(
            rows, squares, density, farthest, score, start_i, tokens, channels, x_strides, BLOCK_I, BLOCK_J, BLOCK_C
        )
    tl.debug_barrier()
    n = tl.arange(0, BLOCK_N)
    keys = tl.sort(packed_keys(score + n, n, n < tokens), descending=True)
    tl.store(centers + n, 0x7FFFFFFF - (keys & 0xFFFFFFFF), mask=n < num_centers)
    tl.debug_barrier()
    for start_i in range(0, tokens, BLOCK_I):
        _labels(
            rows, squares, centers, label, start_i, tokens, channels, num_centers, x_strides, BLOCK_I, BLOCK_J, BLOCK_C
        )
    tl.debug_barrier()
    for start_i in range(0, tokens + 1, GROUP_I):
        group(label, order, offsets, start_i, tokens, num_centers, 1, GROUP_I, GROUP_J)


@in_parts("x", "noise")
def cluster_dpc_knn(
    x: torch.Tensor, k: int, neighbors: int, noise: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cluster x (B, N, C) with contiguous channels, in three launches or six.

    Returns centers (B, k) and label (B, N), int64, and the tokens grouped by label: order (B, N) and offsets
    (B, k + 1), int32.
    """
    batch, tokens, channels = x.shape
    density, farthest, score = (torch.empty(batch, tokens, dtype=torch.float32, device=x.device) for _ in range(3))
    centers, label = (torch.empty(batch, count, dtype=torch.int64, device=x.device) for count in (k, tokens))
    order, offsets = (torch.empty(batch, count, dtype=torch.int32, device=x.device) for count in (tokens, k + 1))
    if batch == 0:
        return centers, label, order, offsets
    neighbors = min(neighbors, tokens)
    tile = distance_tile(channels, x.dtype)
    grid = (cdiv(tokens, tile["BLOCK_I"]), batch)
    squares = squared_lengths(x)
    density_kernel[grid](
        *(x, squares, noise, density, farthest),
        *(tokens, channels, neighbors),
        *(strides(x, 2), strides(noise, 2)),
        NEAREST=min(next_power_of_2(neighbors), MAX_NEAREST),
        **tile,
    )
    if tokens > most_tokens(x.dtype):
        score_kernel[grid](x, squares, density, farthest, score, tokens, channels, strides(x, 2), **tile)
        centers = select_topk(score, k)
        label_kernel[grid](x, squares, centers, label, tokens, channels, k, strides(x, 2), **tile)
        return centers, label, *group_slots(label, k)
    aligned = all(number % 16 == 0 for number in (x.data_ptr(), *x.stride()[:2]))  # as the JIT sees it
    image = image_tile(channels, x.dtype, aligned)
    cluster_kernel[(batch,)](
        *(x, squares, density, farthest, score, centers, label, order, offsets),
        *(tokens, channels),
        k,
        strides(x, 2),
        BLOCK_N=most_tokens(x.dtype),
        GROUP_I=8 * image["num_warps"],  # 8 pairs a thread
        GROUP_J=512 // image["num_warps"],
        **image,
    )
    return centers, label, order, offsets
