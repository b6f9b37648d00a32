"""K-Medoids in three launches: squared lengths; all distances, the cost and rank of every token; all iterations.

Distances go to a workspace, about 4 N^2 bytes for an image of N tokens. If it does not hold all images, the last two
launches are repeated for some images at a time.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ._direct import cdiv, direct
from ._distances import distances, squared_lengths
from ._launch import Tile, fitting, in_parts, strides
from ._order import ascending_keys, packed_keys
from ._workspace import workspace_parts


@functools.cache
def distance_tile(channels: int, dtype: torch.dtype) -> Tile:
    """Choose settings, found by compiling, that never spill for sm_80 and sm_90, channels aligned or not."""
    if dtype == torch.float32:  # exact dots hold their operands in registers: 64 by 64 tokens spill
        return Tile(BLOCK_I=64, BLOCK_J=32, BLOCK_C=16, num_warps=4, num_stages=2)
    return Tile(BLOCK_I=64, BLOCK_J=64, BLOCK_C=fitting(channels, 64), num_warps=8, num_stages=3)


@functools.cache
def cluster_tile(tokens: int) -> Tile:
    """Return a tile of 8 distances a thread, kept over all centers. More of them, or fewer threads, spilled."""
    block_n = fitting(tokens, 512, least=32)
    return Tile(BLOCK_N=block_n, BLOCK_J=8, num_warps=block_n // 32, num_stages=1)  # no load may move before a barrier


@triton.jit
def _store_costs(total, weights, cost, centers, batch, i, tokens, clusters, weights_strides):
    """Store the costs of tokens i (BLOCK_I,), and the heaviest of them as centers, at their rank by weight."""
    in_i = i < tokens
    weights += batch * weights_strides[0]
    total *= tl.load(weights + i.to(tl.int64) * weights_strides[1], mask=in_i, other=0.0).to(tl.float32)
    keys_i = packed_keys(weights + i.to(tl.int64) * weights_strides[1], i, in_i)
    rank = tl.zeros_like(i)
    for start_n in range(0, tokens, 16):
        n = start_n + tl.arange(0, 16)
        keys_n = packed_keys(weights + n.to(tl.int64) * weights_strides[1], n, n < tokens)
        rank += tl.sum((keys_n[None, :] > keys_i[:, None]).to(tl.int32), 1)
    tl.store(centers + batch * clusters + rank, i.to(tl.int64), mask=in_i & (rank < clusters))
    tl.store(cost + batch * tokens + i, total, mask=in_i)


@direct
@triton.jit
def token_distances_kernel(
    x,  # (B, N, C)
    squares,  # (B, N) float32
    weights,  # (B, N)
    distance,  # (images, N, row_stride) float32, contiguous; columns from N on are infinite
    cost,  # (B, N) float32: weight times the sum of the distances
    centers,  # (B, K) int64, contiguous: the K tokens of most weight, in order
    first,  # image of the first program
    tokens,
    channels,
    clusters,
    row_stride,
    x_strides,
    weights_strides,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute the distances of BLOCK_I tokens to all of their image in each program; grid (token blocks, images)."""
    place = tl.program_id(1).to(tl.int64)
    batch = place + first
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    image = x + batch * x_strides[0] + tl.arange(0, BLOCK_C)[None, :]
    # Rows past the end repeat the last one, and are ignored: a mask for them would cost registers.
    row_i = tl.minimum(i, tokens - 1)
    rows_i = image + row_i.to(tl.int64)[:, None] * x_strides[1]
    squares += batch * tokens
    squares_i = tl.load(squares + row_i)
    out = distance + (place * tokens + i)[:, None] * row_stride
    total = tl.zeros((BLOCK_I,), tl.float32)
    for start_n in range(0, row_stride, BLOCK_J):
        n = start_n + tl.arange(0, BLOCK_J)
        row_n = tl.minimum(n, tokens - 1)
        rows_n = image + row_n.to(tl.int64)[:, None] * x_strides[1]
        squares_n = tl.load(squares + row_n)
        value = distances(rows_i, squares_i, rows_n, squares_n, n < tokens, channels, BLOCK_I, BLOCK_J, BLOCK_C)
        total += tl.sum(tl.where((n < tokens)[None, :], value, 0.0), 1)
        tl.store(out + n[None, :], value, mask=(i < tokens)[:, None] & (n < row_stride)[None, :])
    _store_costs(total, weights, cost, centers, batch, i, tokens, clusters, weights_strides)


@triton.jit
def _assign(distance, centers, label, tokens, clusters, row_stride, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr):
    """Store every token's label: the first of its nearest centers."""
    for start_n in range(0, tokens, BLOCK_N):
        n = start_n + tl.arange(0, BLOCK_N)
        nearest = tl.full((BLOCK_J, BLOCK_N), float("inf"), tl.float32)
        place = tl.zeros((BLOCK_J, BLOCK_N), tl.int32)
        center = tl.load(centers + tl.arange(0, BLOCK_J), mask=tl.arange(0, BLOCK_J) < clusters, other=0)
        for start_j in range(0, clusters, BLOCK_J):
            j = start_j + tl.arange(0, BLOCK_J)
            # Up to the row's end, not to the last token: its length is a multiple of 16, which keeps the loads wide.
            mask = (j < clusters)[:, None] & (n < row_stride)[None, :]
            pointers = distance + center[:, None] * row_stride + n[None, :]
            following, more = centers + j + BLOCK_J, j + BLOCK_J < clusters
            # The next centers are loaded together with these distances, so that a step waits for memory once.
            center = tl.load(following, mask=more, other=0)
            rows = tl.load(pointers, mask=mask, other=float("inf"))
            place = tl.where(rows < nearest, j[:, None], place)  # strict: the earlier center wins ties
            nearest = tl.minimum(rows, nearest)
        first = tl.where(nearest == tl.min(nearest, 0)[None, :], place, clusters)
        tl.store(label + n, tl.min(first, 0).to(tl.int64), mask=n < tokens)


@triton.jit
def _cost_keys(cost, label, n, tokens):
    """Return keys of tokens n in the order of cost, then index, NaN last; and their labels, -1 past the end."""
    value = tl.load(cost + n, mask=n < tokens, other=0.0)
    label_n = tl.load(label + n, mask=n < tokens, other=-1).to(tl.int32)
    return ascending_keys(value, n), label_n


@triton.jit
def _cheapest_of_all(cost, label, centers, tokens, clusters, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr):
    """Store the cheapest token of every cluster; all tokens are one block, which is loaded once."""
    none = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
    key, label_n = _cost_keys(cost, label, tl.arange(0, BLOCK_N), tokens)
    for start_j in range(0, clusters, BLOCK_J):
        j = start_j + tl.arange(0, BLOCK_J)
        best = tl.min(tl.where(label_n[None, :] == j[:, None], key[None, :], none), 1)
        tl.store(centers + j, tl.where(best == none, 0, best & 0xFFFFFFFF), mask=j < clusters)


@triton.jit
def _cheapest_of_each(cost, label, centers, j, tokens, clusters, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr):
    """Store the centers of clusters j (BLOCK_J,): the first cheapest token of each, token 0 for an empty cluster."""
    none = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
    best = tl.full((BLOCK_J,), 0, tl.int64) + none
    for start_n in range(0, tokens, BLOCK_N):
        key, label_n = _cost_keys(cost, label, start_n + tl.arange(0, BLOCK_N), tokens)
        best = tl.minimum(best, tl.min(tl.where(label_n[None, :] == j[:, None], key[None, :], none), 1))
    tl.store(centers + j, tl.where(best == none, 0, best & 0xFFFFFFFF), mask=j < clusters)


@direct
@triton.jit
def iterate_clusters_kernel(
    distance,  # (images, N, row_stride) float32
    cost,  # (B, N) float32
    centers,  # (B, K) int64: read as the first centers, overwritten by the last
    label,  # (B, N) int64
    first,  # image of the first program
    tokens,
    clusters,
    iters,
    row_stride,
    ONE_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Iterate the clusters of one image in each program; grid (images,).

    A phase loads what the phase before stored, behind a barrier.
    """
    place = tl.program_id(0).to(tl.int64)
    batch = place + first
    distance += place * tokens * row_stride
    cost += batch * tokens
    centers += batch * clusters
    label += batch * tokens
    for _ in range(iters):
        _assign(distance, centers, label, tokens, clusters, row_stride, BLOCK_N, BLOCK_J)
        tl.debug_barrier()
        if ONE_BLOCK:
            _cheapest_of_all(cost, label, centers, tokens, clusters, BLOCK_N, BLOCK_J)
        else:
            for start_j in range(0, clusters, BLOCK_J):
                j = start_j + tl.arange(0, BLOCK_J)
                _cheapest_of_each(cost, label, centers, j, tokens, clusters, BLOCK_N, BLOCK_J)
        tl.debug_barrier()
    _assign(distance, centers, label, tokens, clusters, row_stride, BLOCK_N, BLOCK_J)


def token_distances(
    x: torch.Tensor,
    squares: torch.Tensor,
    weights: torch.Tensor,
    distance: torch.Tensor,
    cost: torch.Tensor,
    centers: torch.Tensor,
    images: range,
) -> None:
    """Launch once; fill distance (images, N, row_stride), and for these images cost (B, N) and centers (B, k)."""
    tokens, channels = x.shape[1:]
    tile = distance_tile(channels, x.dtype)
    token_distances_kernel[(cdiv(tokens, tile["BLOCK_I"]), len(images))](
        *(x, squares, weights, distance, cost, centers),
        *(images.start, tokens, channels, centers.shape[1], distance.shape[2]),
        *(strides(x, 2), strides(weights, 2)),
        **tile,
    )


@in_parts("x", "weights")
def cluster_k_medoids(x: torch.Tensor, weights: torch.Tensor, k: int, iters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cluster in three launches, and two more for every further part of the images.

    x (B, N, C) with contiguous channels, weights (B, N) -> centers (B, k), label (B, N), both int64.
    """
    batch, tokens, _ = x.shape
    cost = torch.empty(batch, tokens, dtype=torch.float32, device=x.device)
    centers = torch.empty(batch, k, dtype=torch.int64, device=x.device)
    label = torch.empty(batch, tokens, dtype=torch.int64, device=x.device)
    if not batch:
        return centers, label
    squares = squared_lengths(x)
    row_stride = cdiv(tokens, 16) * 16  # every row starts at a multiple of 64 bytes
    parts = workspace_parts(batch, 4 * tokens * row_stride)
    distance = torch.empty(len(parts[0]), tokens, row_stride, dtype=torch.float32, device=x.device)
    tile = cluster_tile(tokens)
    for part in parts:
        token_distances(x, squares, weights, distance, cost, centers, part)
        iterate_clusters_kernel[(len(part),)](
            *(distance, cost, centers, label),
            *(part.start, tokens, k, iters),
            row_stride,
            ONE_BLOCK=tokens <= tile["BLOCK_N"],
            **tile,
        )
    return centers, label
