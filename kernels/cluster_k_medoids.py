"""K-Medoids in three launches: squared lengths; all distances, the cost and rank of every token; all iterations.

Without weights a fourth one, before the iterations, chooses the first centers. Of many tokens the distances are not
stored but computed again for every labelling, in two launches an iteration, three with the members' costs.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from ._launch import in_parts
from ._squares import squared_lengths
from .select_topk import _packed_keys

STORED = 1024  # tokens whose distances are stored: 4 MiB an image; from there on memory is to grow as the tokens do


@dataclasses.dataclass(frozen=True)
class DistanceTile:
    """Tokens against tokens and channels of one step of the distances."""

    block_i: int
    block_n: int
    block_c: int
    num_warps: int
    num_stages: int

    def settings(self) -> dict[str, int]:
        """By the names of a launch."""
        return {
            "BLOCK_I": self.block_i,
            "BLOCK_N": self.block_n,
            "BLOCK_C": self.block_c,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def distance_tile(channels: int, dtype: torch.dtype, stored: bool = True) -> DistanceTile:
    """Found by compiling: settings that never spill for sm_80 and sm_90, channels aligned or not."""
    if dtype == torch.float32:  # exact dots hold their operands in registers: 64 by 64 tokens spill
        return DistanceTile(block_i=64, block_n=32, block_c=16, num_warps=4, num_stages=2 if stored else 1)
    block_c = min(max(triton.next_power_of_2(channels), 16), 64)
    return DistanceTile(block_i=64, block_n=64, block_c=block_c, num_warps=8, num_stages=3)


@dataclasses.dataclass(frozen=True)
class ClusterTile:
    """Tokens at a time, and centers against them, of the program that clusters one image."""

    block_n: int
    block_j: int
    num_warps: int


def cluster_tile(tokens: int) -> ClusterTile:
    """8 distances a thread, kept over all centers: 16, or 32 threads for fewer of them, spilled for sm_80 or sm_90."""
    block_n = min(max(triton.next_power_of_2(tokens), 32), 512)
    return ClusterTile(block_n=block_n, block_j=8, num_warps=block_n // 32)


@triton.jit
def _distances(
    rows_i,
    squares_i,
    rows_n,
    squares_n,
    in_n,
    channels,
    BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Distances (BLOCK_I, BLOCK_N) float32 between rows of pointers; infinite for columns not in_n and for NaN.

    Squares are not summed in the loop: see ``_squares``.
    """
    offsets_c = tl.arange(0, BLOCK_C)
    dots = tl.zeros((BLOCK_I, BLOCK_N), tl.float32)
    for start_c in range(0, channels, BLOCK_C):
        in_c = (start_c + offsets_c < channels)[None, :]
        a = tl.load(rows_i + start_c, mask=in_c, other=0.0)
        b = tl.load(rows_n + start_c, mask=in_c, other=0.0)
        dots = tl.dot(a, tl.trans(b), dots, input_precision="ieee")
    squared = squares_i[:, None] + squares_n[None, :] - 2.0 * dots
    number = (squared == squared) & in_n[None, :]
    return tl.where(number, tl.sqrt_rn(tl.maximum(squared, 0.0)), float("inf"))


@triton.jit
def _store_costs(total, weights, cost, centers, batch, i, tokens, clusters, weights_stride_b, weights_stride_n):
    """Costs of tokens i (BLOCK_I,), and those of most weight into the place of their rank among the centers."""
    in_i = i < tokens
    if weights is not None:
        weights += batch * weights_stride_b
        total *= tl.load(weights + i.to(tl.int64) * weights_stride_n, mask=in_i, other=0.0).to(tl.float32)
        keys_i = _packed_keys(weights + i.to(tl.int64) * weights_stride_n, i, in_i)
        rank = tl.zeros_like(i)
        for start_n in range(0, tokens, 16):
            n = start_n + tl.arange(0, 16)
            keys_n = _packed_keys(weights + n.to(tl.int64) * weights_stride_n, n, n < tokens)
            rank += tl.sum((keys_n[None, :] > keys_i[:, None]).to(tl.int32), 1)
        tl.store(centers + batch * clusters + rank, i.to(tl.int64), mask=in_i & (rank < clusters))
    tl.store(cost + batch * tokens + i, total, mask=in_i)


@triton.jit
def token_distances_kernel(
    x,  # (B, N, C)
    squares,  # (B, N) float32
    weights,  # (B, N) or None
    distance,  # (B, N, row_stride) float32, contiguous; columns from N on are infinite
    cost,  # (B, N) float32: weight times the sum of the distances
    centers,  # (B, K) int64, contiguous: the K tokens of most weight, in order; untouched without weights
    tokens,
    channels,
    clusters,
    row_stride,
    x_stride_b,
    x_stride_n,
    weights_stride_b,
    weights_stride_n,
    BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: BLOCK_I tokens of one image against all of them."""
    batch = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    image = x + batch * x_stride_b + tl.arange(0, BLOCK_C)[None, :]
    # Rows past the end repeat the last one, and are ignored: a mask of their own costs registers.
    row_i = tl.minimum(i, tokens - 1)
    rows_i = image + row_i.to(tl.int64)[:, None] * x_stride_n
    squares += batch * tokens
    squares_i = tl.load(squares + row_i)
    out = distance + (batch * tokens + i)[:, None] * row_stride
    total = tl.zeros((BLOCK_I,), tl.float32)
    for start_n in range(0, row_stride, BLOCK_N):
        n = start_n + tl.arange(0, BLOCK_N)
        row_n = tl.minimum(n, tokens - 1)
        rows_n = image + row_n.to(tl.int64)[:, None] * x_stride_n
        squares_n = tl.load(squares + row_n)
        value = _distances(rows_i, squares_i, rows_n, squares_n, n < tokens, channels, BLOCK_I, BLOCK_N, BLOCK_C)
        total += tl.sum(tl.where((n < tokens)[None, :], value, 0.0), 1)
        tl.store(out + n[None, :], value, mask=(i < tokens)[:, None] & (n < row_stride)[None, :])
    _store_costs(total, weights, cost, centers, batch, i, tokens, clusters, weights_stride_b, weights_stride_n)


@triton.jit
def token_costs_kernel(
    x,  # (B, N, C)
    squares,  # (B, N) float32
    weights,  # (B, N) or None
    cost,  # (B, N) float32: weight times the sum of the distances
    centers,  # (B, K) int64, contiguous: the K tokens of most weight, in order; untouched without weights
    tokens,
    channels,
    clusters,
    x_stride_b,
    x_stride_n,
    weights_stride_b,
    weights_stride_n,
    BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The same where distances are not stored."""
    batch = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    image = x + batch * x_stride_b + tl.arange(0, BLOCK_C)[None, :]
    row_i = tl.minimum(i, tokens - 1)
    rows_i = image + row_i.to(tl.int64)[:, None] * x_stride_n
    squares += batch * tokens
    squares_i = tl.load(squares + row_i)
    total = tl.zeros((BLOCK_I,), tl.float32)
    for start_n in range(0, tokens, BLOCK_N):
        n = start_n + tl.arange(0, BLOCK_N)
        row_n = tl.minimum(n, tokens - 1)
        rows_n = image + row_n.to(tl.int64)[:, None] * x_stride_n
        squares_n = tl.load(squares + row_n)
        value = _distances(rows_i, squares_i, rows_n, squares_n, n < tokens, channels, BLOCK_I, BLOCK_N, BLOCK_C)
        total += tl.sum(tl.where((n < tokens)[None, :], value, 0.0), 1)
    _store_costs(total, weights, cost, centers, batch, i, tokens, clusters, weights_stride_b, weights_stride_n)


@triton.jit
def farthest_first_kernel(
    distance,  # (B, N, row_stride) float32
    largest,  # (B, N) float32: every token's largest distance to the centers, -1 for a center itself
    centers,  # (B, K) int64
    tokens,
    clusters,
    first,
    row_stride,
    BLOCK_N: tl.constexpr,
):
    """One program an image; what the step before stored is loaded behind a barrier."""
    batch = tl.program_id(0).to(tl.int64)
    distance += batch * tokens * row_stride
    largest += batch * tokens
    centers += batch * clusters
    newest = tl.full((), 0, tl.int64) + first
    tl.store(centers, newest)
    for j in range(1, clusters):
        best = tl.full((), -1, tl.int64)
        for start_n in range(0, tokens, BLOCK_N):
            n = start_n + tl.arange(0, BLOCK_N)
            in_n = n < tokens
            value = tl.load(distance + newest * row_stride + n, mask=in_n, other=0.0)
            before = tl.load(largest + n, mask=in_n & (j > 1), other=0.0)
            value = tl.where((before < 0.0) | (n == newest), -1.0, tl.maximum(before, value))
            tl.store(largest + n, value, mask=in_n)
            bits = tl.maximum(value, 0.0).to(tl.int32, bitcast=True).to(tl.int64)
            best = tl.maximum(best, tl.max(tl.where(in_n, (bits << 32) | (0x7FFFFFFF - n).to(tl.int64), -1), 0))
        newest = 0x7FFFFFFF - (best & 0xFFFFFFFF)
        tl.store(centers + j, newest)
        tl.debug_barrier()  # threads load the largest distances otherwise than they store them


@triton.jit
def _assign(distance, centers, label, tokens, clusters, row_stride, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr):
    """Label of every token: the first of its nearest centers."""
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
            # The next centers are on the way with these distances: a step waits for memory once, not twice.
            center = tl.load(following, mask=more, other=0)
            rows = tl.load(pointers, mask=mask, other=float("inf"))
            place = tl.where(rows < nearest, j[:, None], place)  # strict: the earlier center wins ties
            nearest = tl.minimum(rows, nearest)
        first = tl.where(nearest == tl.min(nearest, 0)[None, :], place, clusters)
        tl.store(label + n, tl.min(first, 0).to(tl.int64), mask=n < tokens)


@triton.jit
def _cost_of_members(
    distance, weights, label, cost, tokens, row_stride, weights_stride_n, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr
):
    """cost[n]: sum of weights[i] * d(n, i) over the others of n's own cluster."""
    for start_n in range(0, tokens, BLOCK_J):
        n = start_n + tl.arange(0, BLOCK_J)
        label_n = tl.load(label + n, mask=n < tokens, other=-1).to(tl.int32)
        total = tl.zeros((BLOCK_J,), tl.float32)
        for start_i in range(0, tokens, BLOCK_N):
            i = start_i + tl.arange(0, BLOCK_N)
            label_i = tl.load(label + i, mask=i < tokens, other=-2).to(tl.int32)
            mask = (n < tokens)[:, None] & (i < row_stride)[None, :]
            value = tl.load(distance + n.to(tl.int64)[:, None] * row_stride + i[None, :], mask=mask, other=0.0)
            weight = tl.load(weights + i.to(tl.int64) * weights_stride_n, mask=i < tokens, other=1.0)
            value = value * weight.to(tl.float32)[None, :]
            value = tl.where(value < 3.4028234663852886e38, value, 3.4028234663852886e38)
            counts = (label_n[:, None] == label_i[None, :]) & (n[:, None] != i[None, :])
            total += tl.sum(tl.where(counts, value, 0.0), 1)
        tl.store(cost + n, total, mask=n < tokens)


@triton.jit
def _cost_keys(cost, label, n, tokens):
    """Keys of tokens n in the order of cost, then index, NaN last; and their labels, -1 past the end."""
    value = tl.load(cost + n, mask=n < tokens, other=0.0)
    label_n = tl.load(label + n, mask=n < tokens, other=-1).to(tl.int32)
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(value == value, ordered, 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | n.to(tl.int64), label_n


@triton.jit
def _cheapest_of_all(cost, label, centers, tokens, clusters, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr):
    """The same of all clusters, where all tokens are one block: they are loaded once."""
    none = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
    key, label_n = _cost_keys(cost, label, tl.arange(0, BLOCK_N), tokens)
    for start_j in range(0, clusters, BLOCK_J):
        j = start_j + tl.arange(0, BLOCK_J)
        best = tl.min(tl.where(label_n[None, :] == j[:, None], key[None, :], none), 1)
        tl.store(centers + j, tl.where(best == none, 0, best & 0xFFFFFFFF), mask=j < clusters)


@triton.jit
def _cheapest_of_each(cost, label, centers, j, tokens, clusters, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr):
    """Centers of the clusters j (BLOCK_J,): the first of each one's cheapest tokens, token 0 where it has none."""
    none = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
    best = tl.full((BLOCK_J,), 0, tl.int64) + none
    for start_n in range(0, tokens, BLOCK_N):
        key, label_n = _cost_keys(cost, label, start_n + tl.arange(0, BLOCK_N), tokens)
        best = tl.minimum(best, tl.min(tl.where(label_n[None, :] == j[:, None], key[None, :], none), 1))
    tl.store(centers + j, tl.where(best == none, 0, best & 0xFFFFFFFF), mask=j < clusters)


@triton.jit
def iterate_clusters_kernel(
    distance,  # (B, N, row_stride) float32
    weights,  # (B, N), or None: then cost stays what it is, that of all tokens
    cost,  # (B, N) float32
    centers,  # (B, K) int64: the first ones, and in the end the last
    label,  # (B, N) int64
    tokens,
    clusters,
    iters,
    row_stride,
    weights_stride_b,
    weights_stride_n,
    ONE_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One program an image; what one phase stores the next one loads, behind a barrier."""
    batch = tl.program_id(0).to(tl.int64)
    distance += batch * tokens * row_stride
    cost += batch * tokens
    centers += batch * clusters
    label += batch * tokens
    if weights is not None:
        weights += batch * weights_stride_b
    for _ in range(iters):
        _assign(distance, centers, label, tokens, clusters, row_stride, BLOCK_N, BLOCK_J)
        tl.debug_barrier()
        if weights is not None:
            _cost_of_members(
                distance, weights, label, cost, tokens, row_stride, weights_stride_n, BLOCK_N, BLOCK_J // 2
            )
            tl.debug_barrier()
        if ONE_BLOCK:
            _cheapest_of_all(cost, label, centers, tokens, clusters, BLOCK_N, BLOCK_J)
        else:
            for start_j in range(0, clusters, BLOCK_J):
                j = start_j + tl.arange(0, BLOCK_J)
                _cheapest_of_each(cost, label, centers, j, tokens, clusters, BLOCK_N, BLOCK_J)
        tl.debug_barrier()
    _assign(distance, centers, label, tokens, clusters, row_stride, BLOCK_N, BLOCK_J)


@triton.jit
def farthest_first_again_kernel(
    x,  # (B, N, C)
    largest,  # (B, N) float32: every token's largest distance to the centers, -1 for a center itself
    centers,  # (B, K) int64
    tokens,
    channels,
    clusters,
    first,
    x_stride_b,
    x_stride_n,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program an image, as the kernel above; distances to the newest center are computed when it is chosen."""
    batch = tl.program_id(0).to(tl.int64)
    image = x + batch * x_stride_b
    largest += batch * tokens
    centers += batch * clusters
    offsets_c = tl.arange(0, BLOCK_C)
    newest = tl.full((), 0, tl.int64) + first
    tl.store(centers, newest)
    for j in range(1, clusters):
        best = tl.full((), -1, tl.int64)
        for start_n in range(0, tokens, BLOCK_N):
            n = start_n + tl.arange(0, BLOCK_N)
            in_n = n < tokens
            rows = image + tl.minimum(n, tokens - 1).to(tl.int64)[:, None] * x_stride_n + offsets_c[None, :]
            dots = tl.zeros((BLOCK_N,), tl.float32)
            squares = tl.zeros((BLOCK_N,), tl.float32)
            square = tl.zeros((), tl.float32)
            for start_c in range(0, channels, BLOCK_C):
                in_c = start_c + offsets_c < channels
                a = tl.load(image + newest * x_stride_n + start_c + offsets_c, mask=in_c, other=0.0).to(tl.float32)
                b = tl.load(rows + start_c, mask=in_c[None, :], other=0.0).to(tl.float32)
                square += tl.sum(a * a, 0)
                squares += tl.sum(b * b, 1)
                dots += tl.sum(a[None, :] * b, 1)
            squared = square + squares - 2.0 * dots
            value = tl.where(squared == squared, tl.sqrt_rn(tl.maximum(squared, 0.0)), float("inf"))
            before = tl.load(largest + n, mask=in_n & (j > 1), other=0.0)
            value = tl.where((before < 0.0) | (n == newest), -1.0, tl.maximum(before, value))
            tl.debug_barrier()  # every warp has loaded what one of them stores
            tl.store(largest + n, value, mask=in_n)
            bits = tl.maximum(value, 0.0).to(tl.int32, bitcast=True).to(tl.int64)
            best = tl.maximum(best, tl.max(tl.where(in_n, (bits << 32) | (0x7FFFFFFF - n).to(tl.int64), -1), 0))
        newest = 0x7FFFFFFF - (best & 0xFFFFFFFF)
        tl.store(centers + j, newest)
        tl.debug_barrier()  # threads load the largest distances otherwise than they store them


@triton.jit
def assign_again_kernel(
    x,  # (B, N, C)
    squares,  # (B, N) float32
    centers,  # (B, K) int64
    label,  # (B, N) int64
    tokens,
    channels,
    clusters,
    x_stride_b,
    x_stride_n,
    BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: BLOCK_I tokens of one image against all centers."""
    batch = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    centers += batch * clusters
    image = x + batch * x_stride_b + tl.arange(0, BLOCK_C)[None, :]
    row_i = tl.minimum(i, tokens - 1)
    rows_i = image + row_i.to(tl.int64)[:, None] * x_stride_n
    squares += batch * tokens
    squares_i = tl.load(squares + row_i)
    nearest = tl.full((BLOCK_I,), float("inf"), tl.float32)
    place = tl.zeros((BLOCK_I,), tl.int32)
    for start_j in range(0, clusters, BLOCK_N):
        j = start_j + tl.arange(0, BLOCK_N)
        center = tl.load(centers + j, mask=j < clusters, other=0)
        rows_j = image + center[:, None] * x_stride_n
        squares_j = tl.load(squares + center)
        value = _distances(rows_i, squares_i, rows_j, squares_j, j < clusters, channels, BLOCK_I, BLOCK_N, BLOCK_C)
        least = tl.min(value, 1)
        first = tl.min(tl.where(value == least[:, None], j[None, :], 0x7FFFFFFF), 1)
        place = tl.where(least < nearest, first, place)  # strict: the earlier center wins ties
        nearest = tl.minimum(least, nearest)
    tl.store(label + batch * tokens + i, place.to(tl.int64), mask=i < tokens)


@triton.jit
def cost_of_members_again_kernel(
    x,  # (B, N, C)
    squares,  # (B, N) float32
    weights,  # (B, N)
    label,  # (B, N) int64
    cost,  # (B, N) float32: sum of weights[i] * d(n, i) over the others of n's own cluster
    tokens,
    channels,
    x_stride_b,
    x_stride_n,
    weights_stride_b,
    weights_stride_n,
    BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: BLOCK_I tokens of one image against all of them."""
    batch = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    image = x + batch * x_stride_b + tl.arange(0, BLOCK_C)[None, :]
    weights += batch * weights_stride_b
    label += batch * tokens
    row_i = tl.minimum(i, tokens - 1)
    rows_i = image + row_i.to(tl.int64)[:, None] * x_stride_n
    squares += batch * tokens
    squares_i = tl.load(squares + row_i)
    label_i = tl.load(label + i, mask=i < tokens, other=-1).to(tl.int32)
    total = tl.zeros((BLOCK_I,), tl.float32)
    for start_n in range(0, tokens, BLOCK_N):
        n = start_n + tl.arange(0, BLOCK_N)
        in_n = n < tokens
        row_n = tl.minimum(n, tokens - 1)
        rows_n = image + row_n.to(tl.int64)[:, None] * x_stride_n
        squares_n = tl.load(squares + row_n)
        value = _distances(rows_i, squares_i, rows_n, squares_n, in_n, channels, BLOCK_I, BLOCK_N, BLOCK_C)
        value *= tl.load(weights + n.to(tl.int64) * weights_stride_n, mask=in_n, other=1.0).to(tl.float32)[None, :]
        value = tl.where(value < 3.4028234663852886e38, value, 3.4028234663852886e38)
        label_n = tl.load(label + n, mask=in_n, other=-2).to(tl.int32)
        counts = (label_i[:, None] == label_n[None, :]) & (i[:, None] != n[None, :])
        total += tl.sum(tl.where(counts, value, 0.0), 1)
    tl.store(cost + batch * tokens + i, total, mask=i < tokens)


@triton.jit
def cheapest_of_each_kernel(
    cost,  # (B, N) float32
    label,  # (B, N) int64
    centers,  # (B, K) int64
    tokens,
    clusters,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One program: BLOCK_J clusters of one image."""
    batch = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    _cheapest_of_each(
        cost + batch * tokens, label + batch * tokens, centers + batch * clusters, j, tokens, clusters, BLOCK_N, BLOCK_J
    )


def token_distances(
    x: torch.Tensor,
    squares: torch.Tensor,
    weights: torch.Tensor | None,
    cost: torch.Tensor,
    centers: torch.Tensor,
) -> torch.Tensor | None:
    """Launch; x (B, N, C) with contiguous channels -> distance (B, N, N rounded up to 16), None of many tokens.

    Takes the squares (B, N) of the rows. Fills cost (B, N) and centers (B, k). Without weights every token weighs 1 and
    the centers are left as they are.
    """
    batch, tokens, channels = x.shape
    distance = None
    if tokens <= STORED:
        # Every row starts at a multiple of 64 bytes.
        row_stride = triton.cdiv(tokens, 16) * 16
        distance = torch.empty(batch, tokens, row_stride, dtype=torch.float32, device=x.device)
    if not batch:
        return distance
    tile = distance_tile(channels, x.dtype, stored=distance is not None)
    grid = (triton.cdiv(tokens, tile.block_i), batch)
    strides = (*x.stride()[:2], *((0, 0) if weights is None else weights.stride()))
    clusters = centers.shape[1]
    if distance is None:
        token_costs_kernel[grid](
            x, squares, weights, cost, centers, tokens, channels, clusters, *strides, **tile.settings()
        )
    else:
        token_distances_kernel[grid](
            x,
            squares,
            weights,
            distance,
            cost,
            centers,
            tokens,
            channels,
            clusters,
            distance.shape[2],
            *strides,
            **tile.settings(),
        )
    return distance


def _iterate(
    distance: torch.Tensor,
    weights: torch.Tensor | None,
    cost: torch.Tensor,
    centers: torch.Tensor,
    label: torch.Tensor,
    iters: int,
    first: int | None,
) -> None:
    """With the distances (B, N, row_stride) stored; ``first`` is where to start without weights, or None."""
    batch, tokens, row_stride = distance.shape
    tile = cluster_tile(tokens)
    if first is not None:
        farthest_first_kernel[(batch,)](
            distance,
            torch.empty_like(cost),
            centers,
            tokens,
            centers.shape[1],
            first,
            row_stride,
            BLOCK_N=tile.block_n,
            num_warps=max(1, tile.block_n // 128),
        )
    iterate_clusters_kernel[(batch,)](
        distance,
        weights,
        cost,
        centers,
        label,
        tokens,
        centers.shape[1],
        iters,
        row_stride,
        *((0, 0) if weights is None else weights.stride()),
        ONE_BLOCK=tokens <= tile.block_n,
        BLOCK_N=tile.block_n,
        BLOCK_J=tile.block_j,
        num_warps=tile.num_warps,
        num_stages=1,  # no load may move before a barrier
    )


def _iterate_again(
    x: torch.Tensor,
    squares: torch.Tensor,
    weights: torch.Tensor | None,
    cost: torch.Tensor,
    centers: torch.Tensor,
    label: torch.Tensor,
    iters: int,
    first: int | None,
) -> None:
    """With the distances of x (B, N, C) computed wherever they are needed."""
    batch, tokens, channels = x.shape
    clusters = centers.shape[1]
    tile, one = distance_tile(channels, x.dtype, stored=False), cluster_tile(tokens)
    blocks, strides = (triton.cdiv(tokens, tile.block_i), batch), x.stride()[:2]
    if first is not None:
        farthest_first_again_kernel[(batch,)](
            x,
            torch.empty_like(cost),
            centers,
            tokens,
            channels,
            clusters,
            first,
            *strides,
            BLOCK_N=32,  # 8 numbers a thread: with 16 some settings of float32 spill
            BLOCK_C=64,
            num_warps=8,
        )
    for _ in range(iters):
        assign_again_kernel[blocks](x, squares, centers, label, tokens, channels, clusters, *strides, **tile.settings())
        if weights is not None:
            cost_of_members_again_kernel[blocks](
                x, squares, weights, label, cost, tokens, channels, *strides, *weights.stride(), **tile.settings()
            )
        cheapest_of_each_kernel[(triton.cdiv(clusters, one.block_j), batch)](
            cost, label, centers, tokens, clusters, BLOCK_N=one.block_n, BLOCK_J=one.block_j, num_warps=4
        )
    assign_again_kernel[blocks](x, squares, centers, label, tokens, channels, clusters, *strides, **tile.settings())


@in_parts("x", "weights")
def cluster_k_medoids(
    x: torch.Tensor, weights: torch.Tensor | None, k: int, iters: int, members: bool, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Three launches, four without weights, more above STORED tokens; see the module.

    x (B, N, C) with contiguous channels -> centers (B, k), label (B, N).
    """
    batch, tokens, _ = x.shape
    cost = torch.empty(batch, tokens, dtype=torch.float32, device=x.device)
    centers = torch.empty(batch, k, dtype=torch.int64, device=x.device)
    squares = squared_lengths(x)
    distance = token_distances(x, squares, weights, cost, centers)
    label = torch.empty(batch, tokens, dtype=torch.int64, device=x.device)
    if batch:
        start = first if weights is None else None
        summed = None
        if members:
            summed = torch.ones_like(cost) if weights is None else weights
        if distance is None:
            _iterate_again(x, squares, summed, cost, centers, label, iters, start)
        else:
            _iterate(distance, summed, cost, centers, label, iters, start)
    return centers, label
