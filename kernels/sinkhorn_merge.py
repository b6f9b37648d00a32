"""Sinkhorn merging: four launches forward, four and a fixed-order sum backward.

Forward: norms; similarities; the iterations; the plan times the tokens. Backward: the gradient of the plan's
logarithm; the iterations in reverse, of which only vectors are kept; the gradient of the similarities, put together
from them; the gradients of tokens and centres. Neither the plan nor the normalised tokens are ever written.

The "again" kernels go forward without the similarities too, for which there is no backward: each computes those it
needs from tokens and centres, and only vectors are kept, four of an image's tokens and one of its clusters.

Rows of similarities are padded to a multiple of 16 columns, which hold -inf: every access is 16 bytes, and the
padding drops out of all sums by itself. At a small eps the biases are large, so a plan is not made from their rounded
sum: it is ``exp(similarity + cluster_bias - shift) * scale`` with each row's maximum and the reciprocal of its sum.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl

from ._launch import in_parts
from ._squares import squared_lengths

LOWEST = tl.constexpr(-3.0e38)  # where a row of -inf needs a finite maximum
PADDING = 16
MOST_REGISTERS = 255  # said outright, because the assembler spills a few to fit one more program on a multiprocessor
CENTER_PARTS = 16  # groups of images whose sums for the centres are added up at the end


@dataclasses.dataclass(frozen=True)
class DotTile:
    """One program's share of a matrix product: its rows, its columns, and the step of the sum."""

    rows: int
    columns: int
    step: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class PlanTile:
    """Tokens and clusters that a program walking over the plan holds at a time."""

    tokens: int
    clusters: int
    num_warps: int


@dataclasses.dataclass(frozen=True)
class SumsTile:
    """Clusters and channels of sums that a program owns, tokens that it takes at a time, the step of similarities."""

    clusters: int
    channels: int
    tokens: int
    step: int
    num_warps: int
    num_stages: int


# Short rows in short steps: the gradient of a similarity takes one exponential for every iteration.
SLOPE_TILE = PlanTile(tokens=32, clusters=64, num_warps=4)


def similarity_tile(clusters: int, exact: bool) -> DotTile:
    """Found by compiling, as the next two: settings that never spill for sm_80 and sm_90."""
    columns = min(64, max(16, triton.next_power_of_2(clusters)))
    if exact:  # exact float32 dots hold their operands in registers
        return DotTile(rows=64, columns=min(columns, 32), step=16, num_warps=4, num_stages=2)
    return DotTile(rows=64, columns=columns, step=64, num_warps=8, num_stages=3)


def sums_tile(channels: int, exact: bool) -> DotTile:
    """Wide in the channels, because the programs of every block of channels make the plan anew."""
    columns = min(128, max(16, triton.next_power_of_2(channels)))
    if exact:
        return DotTile(rows=64, columns=min(columns, 64), step=16, num_warps=8, num_stages=2)
    return DotTile(rows=64, columns=columns, step=32, num_warps=8, num_stages=2)


def again_tile(exact: bool) -> DotTile:
    """Clusters against tokens or the other way round; two stages of exact float32 spill in part."""
    if exact:
        return DotTile(rows=64, columns=64, step=16, num_warps=8, num_stages=1)
    return DotTile(rows=64, columns=64, step=64, num_warps=8, num_stages=3)


def sums_again_tile(channels: int, exact: bool) -> SumsTile:
    """As wide in the channels as registers allow: every block of them computes the similarities once more."""
    columns = max(16, triton.next_power_of_2(channels))
    if exact:
        return SumsTile(clusters=64, channels=min(columns, 128), tokens=16, step=16, num_warps=8, num_stages=1)
    return SumsTile(clusters=64, channels=min(columns, 256), tokens=32, step=64, num_warps=8, num_stages=3)


def backward_tile(channels: int, small: bool) -> DotTile:
    """Two products in turn: anything larger, or 4 warps, spills in part; small where an operand is float32."""
    columns = min(64, max(16, triton.next_power_of_2(channels)))
    return DotTile(rows=64, columns=min(columns, 32) if small else columns, step=16, num_warps=8, num_stages=2)


def backward_registers(*dtypes: torch.dtype) -> int | None:
    """The assembler's own choice spills a few where float32 takes part, and so does any lower limit."""
    return MOST_REGISTERS if torch.float32 in dtypes else None


def plan_tile(tokens: int, padded: int) -> PlanTile:
    """Whole rows, 4,096 numbers a step: 16 a thread for the similarities and as many for the sums over tokens."""
    clusters = triton.next_power_of_2(padded)
    rows = max(1, min(4096 // clusters, triton.next_power_of_2(tokens)))
    return PlanTile(tokens=rows, clusters=clusters, num_warps=8)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """Two operands of one half precision go to the tensor cores as they are, others as float32."""
    if a.dtype != b.dtype:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def similarity_kernel(
    x,  # (B, N, C)
    centers,  # (K, C)
    similarity,  # (B, N, padded) float32, contiguous
    inverse_norm,  # (B, N) float32, contiguous
    part_max,  # (B, parts, padded) float32, contiguous
    part_sum,  # (B, parts, padded) float32, contiguous
    inverse_eps,
    tokens,
    clusters,
    padded,
    channels,
    x_stride_b,
    x_stride_n,
    centers_stride_k,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: a tile of similarities, and the maximum and sum of exponentials of each of its columns.

    Norms are not summed in the loop: see ``_squares``.
    """
    batch = tl.program_id(1).to(tl.int64)
    k_blocks = tl.cdiv(padded, BLOCK_K)
    k_block = tl.program_id(0) % k_blocks
    part = tl.program_id(0) // k_blocks
    offsets_n = part * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets_k = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
    offsets_c = tl.arange(0, BLOCK_C)
    in_n = offsets_n < tokens
    # Rows past the end repeat the last one, and are ignored: a mask of their own costs registers.
    row_n = tl.minimum(offsets_n, tokens - 1).to(tl.int64)
    row_k = tl.minimum(offsets_k, clusters - 1).to(tl.int64)
    pointers_x = x + batch * x_stride_b + row_n[:, None] * x_stride_n + offsets_c[None, :]
    pointers_centers = centers + row_k[:, None] * centers_stride_k + offsets_c[None, :]
    dots = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, channels, BLOCK_C):
        in_c = (start + offsets_c < channels)[None, :]
        token = tl.load(pointers_x + start, mask=in_c, other=0.0)
        center = tl.load(pointers_centers + start, mask=in_c, other=0.0)
        dots = _dot(token, tl.trans(center), dots, PRECISION)
    inverse = tl.load(inverse_norm + batch * tokens + row_n)
    score = dots * (inverse * inverse_eps)[:, None]
    score = tl.where((offsets_k < clusters)[None, :], score, float("-inf"))
    in_k = offsets_k < padded
    targets = (batch * tokens + offsets_n)[:, None] * padded + offsets_k[None, :]
    tl.store(similarity + targets, score, mask=in_n[:, None] & in_k[None, :])
    score = tl.where(in_n[:, None], score, float("-inf"))
    maximum = tl.maximum(tl.max(score, 0), LOWEST)
    parts = tl.cdiv(tokens, BLOCK_N)
    targets = (batch * parts + part) * padded + offsets_k
    tl.store(part_max + targets, maximum, mask=in_k)
    tl.store(part_sum + targets, tl.sum(tl.exp(score - maximum[None, :]), 0), mask=in_k)


@triton.jit
def plan_biases_kernel(
    similarity,  # (B, N, padded) float32, contiguous
    part_max,  # (B, parts, padded) float32, contiguous
    part_sum,  # (B, parts, padded) float32, contiguous
    token_bias,  # (B, N) float32, contiguous: the last one
    token_shifts,  # (B, iters, N) float32, contiguous
    token_scales,  # (B, iters, N) float32, contiguous
    cluster_biases,  # (B, iters + 1, padded) float32, contiguous
    cluster_scales,  # (B, iters, padded) float32, contiguous
    tokens,
    clusters,
    padded,
    parts,
    iters,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: all iterations of one image, each in one pass over its similarities."""
    batch = tl.program_id(0).to(tl.int64)
    offsets_k = tl.arange(0, BLOCK_K)
    in_k = offsets_k < padded
    is_cluster = offsets_k < clusters
    maximum = tl.full((BLOCK_K,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for part in range(0, parts):
        sources = (batch * parts + part) * padded + offsets_k
        other_max = tl.load(part_max + sources, mask=in_k, other=LOWEST)
        other_sum = tl.load(part_sum + sources, mask=in_k, other=0.0)
        new_max = tl.maximum(maximum, other_max)
        total = total * tl.exp(maximum - new_max) + other_sum * tl.exp(other_max - new_max)
        maximum = new_max
    similarity += batch * tokens * padded
    token_bias += batch * tokens
    token_shifts += batch * iters * tokens
    token_scales += batch * iters * tokens
    cluster_biases += batch * (iters + 1) * padded + offsets_k
    cluster_scales += batch * iters * padded + offsets_k
    cluster_bias = tl.where(is_cluster, -maximum, 0.0)
    total = tl.where(is_cluster, total, 1.0)
    tl.store(cluster_biases, cluster_bias, mask=in_k)
    for step in range(0, iters):
        # total: the column sums of the plan so far, at least 1 / K from the second step on.
        cluster_bias -= tl.log(total)
        tl.store(cluster_scales + tl.cast(step, tl.int64) * padded, 1.0 / total, mask=in_k)
        tl.store(cluster_biases + tl.cast(step + 1, tl.int64) * padded, cluster_bias, mask=in_k)
        sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in range(0, tokens, BLOCK_N):
            offsets_n = start + tl.arange(0, BLOCK_N)
            in_n = offsets_n < tokens
            sources = offsets_n.to(tl.int64)[:, None] * padded + offsets_k[None, :]
            score = tl.load(similarity + sources, mask=in_n[:, None] & in_k[None, :], other=float("-inf"))
            score += cluster_bias[None, :]
            shift = tl.maximum(tl.max(score, 1), LOWEST)
            weight = tl.exp(score - shift[:, None])
            row_sum = tl.where(in_n, tl.sum(weight, 1), 1.0)
            scale = 1.0 / row_sum
            sums += weight * scale[:, None]
            targets = tl.cast(step, tl.int64) * tokens + offsets_n
            tl.store(token_shifts + targets, shift, mask=in_n)
            tl.store(token_scales + targets, scale, mask=in_n)
            tl.store(token_bias + offsets_n, -shift - tl.log(row_sum), mask=in_n)
        total = tl.where(is_cluster, tl.sum(sums, 0), 1.0)


@triton.jit
def _copy_rows(source, target, rows, source_stride, target_stride, in_c):
    """Channels in_c of some rows; source and target are pointers to those of the first."""
    for row in range(0, rows):
        value = tl.load(source + tl.cast(row, tl.int64) * source_stride, mask=in_c, other=0.0)
        tl.store(target + tl.cast(row, tl.int64) * target_stride, value.to(target.dtype.element_ty), mask=in_c)


@triton.jit
def plan_sums_kernel(
    x,  # (B, N, C)
    similarity,  # (B, N, padded) float32, contiguous
    inverse_norm,  # (B, N) float32, contiguous
    token_shifts,  # (B, iters, N) float32, contiguous
    token_scales,  # (B, iters, N) float32, contiguous
    cluster_biases,  # (B, iters + 1, padded) float32, contiguous
    head,  # (B, P, C) or None
    out,  # (B, P + K, C), contiguous
    tokens,
    clusters,
    padded,
    channels,
    num_head,
    iters,
    x_stride_b,
    x_stride_n,
    head_stride_b,
    head_stride_n,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_C channels of BLOCK_K clusters; those of the first clusters copy the head too."""
    batch = tl.program_id(1).to(tl.int64)
    c_blocks = tl.cdiv(channels, BLOCK_C)
    k_block = tl.program_id(0) // c_blocks
    offsets_c = tl.program_id(0) % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    offsets_k = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
    in_c = offsets_c < channels
    in_k = offsets_k < padded
    out += batch * (num_head + clusters) * channels
    if head is not None:
        copied = tl.where(k_block == 0, num_head, 0)
        _copy_rows(head + batch * head_stride_b + offsets_c, out + offsets_c, copied, head_stride_n, channels, in_c)
    last = batch * iters + iters - 1
    cluster_bias = tl.load(cluster_biases + (last + batch + 1) * padded + offsets_k, mask=in_k, other=0.0)
    x += batch * x_stride_b
    acc = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for start in range(0, tokens, BLOCK_N):
        offsets_n = start + tl.arange(0, BLOCK_N)
        in_n = offsets_n < tokens
        rows = batch * tokens + offsets_n
        score = tl.load(
            similarity + rows[:, None] * padded + offsets_k[None, :],
            mask=in_n[:, None] & in_k[None, :],
            other=float("-inf"),
        )
        shift = tl.load(token_shifts + last * tokens + offsets_n, mask=in_n, other=0.0)
        scale = tl.load(token_scales + last * tokens + offsets_n, mask=in_n, other=0.0)
        scale *= tl.load(inverse_norm + rows, mask=in_n, other=0.0)
        weight = tl.exp(score + cluster_bias[None, :] - shift[:, None]) * scale[:, None]
        token = tl.load(
            x + offsets_n.to(tl.int64)[:, None] * x_stride_n + offsets_c[None, :],
            mask=in_n[:, None] & in_c[None, :],
            other=0.0,
        )
        acc = _dot(tl.trans(weight), token, acc, PRECISION)
    targets = (num_head + offsets_k).to(tl.int64)[:, None] * channels + offsets_c[None, :]
    mask = (offsets_k < clusters)[:, None] & in_c[None, :]
    tl.store(out + targets, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _first_channels(rows, offsets, count, stride):
    """(offsets, 1) pointers; rows past the end repeat the last one: a mask of their own costs registers."""
    return rows + tl.minimum(offsets, count - 1).to(tl.int64)[:, None] * stride


@triton.jit
def _dots(rows, columns, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr):
    """(ROWS, COLUMNS) float32 of two columns of pointers to the first channels."""
    offsets_c = tl.arange(0, BLOCK_C)[None, :]
    dots = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, channels, BLOCK_C):
        in_c = start + offsets_c < channels
        a = tl.load(rows + start + offsets_c, mask=in_c, other=0.0)
        b = tl.load(columns + start + offsets_c, mask=in_c, other=0.0)
        dots = _dot(a, tl.trans(b), dots, "ieee")
    return dots


@triton.jit
def first_biases_again_kernel(
    x,  # (B, N, C)
    centers,  # (K, C)
    inverse_norm,  # (B, N) float32, contiguous
    cluster_bias,  # (B, K) float32, contiguous
    inverse_eps,
    tokens,
    clusters,
    channels,
    x_stride_b,
    x_stride_n,
    centers_stride_k,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: the first biases of BLOCK_K clusters."""
    batch = tl.program_id(1).to(tl.int64)
    offsets_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    rows_k = _first_channels(centers, offsets_k, clusters, centers_stride_k)
    x += batch * x_stride_b
    maximum = tl.full((BLOCK_K,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for start_n in range(0, tokens, BLOCK_N):
        offsets_n = start_n + tl.arange(0, BLOCK_N)
        in_n = offsets_n < tokens
        rows_n = _first_channels(x, offsets_n, tokens, x_stride_n)
        dots = _dots(rows_k, rows_n, channels, BLOCK_K, BLOCK_N, BLOCK_C)
        inverse = tl.load(inverse_norm + batch * tokens + offsets_n, mask=in_n, other=0.0)
        score = tl.where(in_n[None, :], dots * (inverse * inverse_eps)[None, :], float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(score, 1))
        total = total * tl.exp(maximum - new_maximum) + tl.sum(tl.exp(score - new_maximum[:, None]), 1)
        maximum = new_maximum
    tl.store(cluster_bias + batch * clusters + offsets_k, -maximum - tl.log(total), mask=offsets_k < clusters)


@triton.jit
def token_biases_again_kernel(
    x,  # (B, N, C)
    centers,  # (K, C)
    inverse_norm,  # (B, N) float32, contiguous
    cluster_bias,  # (B, K) float32, contiguous
    token_bias,  # (B, N) float32, contiguous
    token_shift,  # (B, N) float32, contiguous
    token_scale,  # (B, N) float32, contiguous
    inverse_eps,
    tokens,
    clusters,
    channels,
    x_stride_b,
    x_stride_n,
    centers_stride_k,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: maxima, reciprocal sums and biases of BLOCK_N tokens."""
    batch = tl.program_id(1).to(tl.int64)
    offsets_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = offsets_n < tokens
    rows_n = _first_channels(x + batch * x_stride_b, offsets_n, tokens, x_stride_n)
    targets = batch * tokens + offsets_n
    factor = tl.load(inverse_norm + targets, mask=in_n, other=0.0) * inverse_eps
    shift = tl.full((BLOCK_N,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start_k in range(0, clusters, BLOCK_K):
        offsets_k = start_k + tl.arange(0, BLOCK_K)
        rows_k = _first_channels(centers, offsets_k, clusters, centers_stride_k)
        sources = cluster_bias + batch * clusters + offsets_k
        bias = tl.load(sources, mask=offsets_k < clusters, other=float("-inf"))
        score = _dots(rows_n, rows_k, channels, BLOCK_N, BLOCK_K, BLOCK_C) * factor[:, None] + bias[None, :]
        new_shift = tl.maximum(shift, tl.max(score, 1))
        total = total * tl.exp(shift - new_shift) + tl.sum(tl.exp(score - new_shift[:, None]), 1)
        shift = new_shift
    tl.store(token_bias + targets, -shift - tl.log(total), mask=in_n)
    tl.store(token_shift + targets, shift, mask=in_n)
    tl.store(token_scale + targets, 1.0 / total, mask=in_n)


@triton.jit
def _plan(
    rows_k,
    bias,
    x,
    inverse_norm,
    token_shift,
    token_scale,
    inverse_eps,
    offsets_n,
    tokens,
    channels,
    x_stride_n,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Plan (BLOCK_K, BLOCK_N) of an image's clusters and tokens, 0 for tokens past the end, and their norms."""
    in_n = offsets_n < tokens
    inverse = tl.load(inverse_norm + offsets_n, mask=in_n, other=0.0)
    shift = tl.load(token_shift + offsets_n, mask=in_n, other=float("inf"))
    scale = tl.load(token_scale + offsets_n, mask=in_n, other=0.0)
    rows_n = _first_channels(x, offsets_n, tokens, x_stride_n)
    score = _dots(rows_k, rows_n, channels, BLOCK_K, BLOCK_N, BLOCK_C) * (inverse * inverse_eps)[None, :]
    return tl.exp(score + bias[:, None] - shift[None, :]) * scale[None, :], inverse


@triton.jit
def cluster_biases_again_kernel(
    x,  # (B, N, C)
    centers,  # (K, C)
    inverse_norm,  # (B, N) float32, contiguous
    cluster_bias,  # (B, K) float32, contiguous, updated
    token_shift,  # (B, N) float32, contiguous
    token_scale,  # (B, N) float32, contiguous
    inverse_eps,
    tokens,
    clusters,
    channels,
    x_stride_b,
    x_stride_n,
    centers_stride_k,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: the next biases of BLOCK_K clusters, from the plan's column sums, which are at least 1 / K."""
    batch = tl.program_id(1).to(tl.int64)
    offsets_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = offsets_k < clusters
    rows_k = _first_channels(centers, offsets_k, clusters, centers_stride_k)
    x += batch * x_stride_b
    inverse_norm += batch * tokens
    token_shift += batch * tokens
    token_scale += batch * tokens
    cluster_bias += batch * clusters + offsets_k
    bias = tl.load(cluster_bias, mask=in_k, other=0.0)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for start_n in range(0, tokens, BLOCK_N):
        plan, _ = _plan(
            rows_k,
            bias,
            x,
            inverse_norm,
            token_shift,
            token_scale,
            inverse_eps,
            start_n + tl.arange(0, BLOCK_N),
            tokens,
            channels,
            x_stride_n,
            BLOCK_K,
            BLOCK_N,
            BLOCK_C,
        )
        total += tl.sum(plan, 1)
    tl.store(cluster_bias, bias - tl.log(total), mask=in_k)


@triton.jit
def plan_sums_again_kernel(
    x,  # (B, N, C)
    centers,  # (K, C)
    inverse_norm,  # (B, N) float32, contiguous
    cluster_bias,  # (B, K) float32, contiguous
    token_shift,  # (B, N) float32, contiguous
    token_scale,  # (B, N) float32, contiguous
    head,  # (B, P, C) or None
    out,  # (B, P + K, C), contiguous
    inverse_eps,
    tokens,
    clusters,
    channels,
    num_head,
    x_stride_b,
    x_stride_n,
    centers_stride_k,
    head_stride_b,
    head_stride_n,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program: BLOCK_C channels of BLOCK_K clusters; those of the first clusters copy the head too."""
    batch = tl.program_id(1).to(tl.int64)
    c_blocks = tl.cdiv(channels, BLOCK_C)
    k_block = tl.program_id(0) // c_blocks
    offsets_c = tl.program_id(0) % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    offsets_k = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
    in_c = offsets_c < channels
    in_k = offsets_k < clusters
    out += batch * (num_head + clusters) * channels
    if head is not None:
        copied = tl.where(k_block == 0, num_head, 0)
        _copy_rows(head + batch * head_stride_b + offsets_c, out + offsets_c, copied, head_stride_n, channels, in_c)
    rows_k = _first_channels(centers, offsets_k, clusters, centers_stride_k)
    x += batch * x_stride_b
    inverse_norm += batch * tokens
    token_shift += batch * tokens
    token_scale += batch * tokens
    bias = tl.load(cluster_bias + batch * clusters + offsets_k, mask=in_k, other=float("-inf"))
    acc = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for start_n in range(0, tokens, BLOCK_N):
        offsets_n = start_n + tl.arange(0, BLOCK_N)
        plan, inverse = _plan(
            rows_k,
            bias,
            x,
            inverse_norm,
            token_shift,
            token_scale,
            inverse_eps,
            offsets_n,
            tokens,
            channels,
            x_stride_n,
            BLOCK_K,
            BLOCK_N,
            STEP,
        )
        token = tl.load(
            x + offsets_n.to(tl.int64)[:, None] * x_stride_n + offsets_c[None, :],
            mask=(offsets_n < tokens)[:, None] & in_c[None, :],
            other=0.0,
        )
        acc = _dot(plan * inverse[None, :], token, acc, PRECISION)
    targets = (num_head + offsets_k).to(tl.int64)[:, None] * channels + offsets_c[None, :]
    tl.store(out + targets, acc.to(out.dtype.element_ty), mask=in_k[:, None] & in_c[None, :])


@triton.jit
def log_plan_backward_kernel(
    grad,  # (B, K, C)
    x,  # (B, N, C)
    similarity,  # (B, N, padded) float32, contiguous
    inverse_norm,  # (B, N) float32, contiguous
    token_shifts,  # (B, iters, N) float32, contiguous
    token_scales,  # (B, iters, N) float32, contiguous
    cluster_biases,  # (B, iters + 1, padded) float32, contiguous
    grad_plan,  # (B, N, padded) float32, contiguous
    tokens,
    clusters,
    padded,
    channels,
    iters,
    grad_stride_b,
    grad_stride_k,
    x_stride_b,
    x_stride_n,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: a tile of the gradient of the plan's logarithm, plan times (normalised token . grad)."""
    batch = tl.program_id(1).to(tl.int64)
    k_blocks = tl.cdiv(padded, BLOCK_K)
    offsets_n = tl.program_id(0) // k_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets_k = tl.program_id(0) % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    offsets_c = tl.arange(0, BLOCK_C)
    row_n = tl.minimum(offsets_n, tokens - 1).to(tl.int64)
    row_k = tl.minimum(offsets_k, clusters - 1).to(tl.int64)
    pointers_x = x + batch * x_stride_b + row_n[:, None] * x_stride_n + offsets_c[None, :]
    pointers_grad = grad + batch * grad_stride_b + row_k[:, None] * grad_stride_k + offsets_c[None, :]
    dots = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, channels, BLOCK_C):
        in_c = (start + offsets_c < channels)[None, :]
        token = tl.load(pointers_x + start, mask=in_c, other=0.0)
        slope = tl.load(pointers_grad + start, mask=in_c, other=0.0)
        dots = _dot(token, tl.trans(slope), dots, PRECISION)
    in_n = offsets_n < tokens
    in_k = offsets_k < padded
    mask = in_n[:, None] & in_k[None, :]
    rows = batch * tokens + offsets_n
    last = batch * iters + iters - 1
    targets = rows[:, None] * padded + offsets_k[None, :]
    score = tl.load(similarity + targets, mask=mask, other=float("-inf"))
    shift = tl.load(token_shifts + last * tokens + offsets_n, mask=in_n, other=0.0)
    scale = tl.load(token_scales + last * tokens + offsets_n, mask=in_n, other=0.0)
    scale *= tl.load(inverse_norm + rows, mask=in_n, other=0.0)
    cluster_bias = tl.load(cluster_biases + (last + batch + 1) * padded + offsets_k, mask=in_k, other=0.0)
    plan = tl.exp(score + cluster_bias[None, :] - shift[:, None]) * scale[:, None]
    tl.store(grad_plan + targets, tl.where((offsets_k < clusters)[None, :], plan * dots, 0.0), mask=mask)


@triton.jit
def plan_biases_backward_kernel(
    similarity,  # (B, N, padded) float32, contiguous
    grad_plan,  # (B, N, padded) float32, contiguous
    token_shifts,  # (B, iters, N) float32, contiguous
    token_scales,  # (B, iters, N) float32, contiguous
    cluster_biases,  # (B, iters + 1, padded) float32, contiguous
    cluster_scales,  # (B, iters, padded) float32, contiguous
    token_terms,  # (B, iters, N) float32, contiguous
    cluster_terms,  # (B, iters + 1, padded) float32, contiguous
    tokens,
    padded,
    iters,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: the gradients of all biases of one image, last iteration first, each in one pass.

    Through the plan P of iteration t pass ``token_terms[t]``, the gradient of that iteration's token biases, and
    ``cluster_terms[t + 1]``, the gradient of the next one's cluster biases over P's column sums.
    """
    batch = tl.program_id(0).to(tl.int64)
    offsets_k = tl.arange(0, BLOCK_K)
    in_k = offsets_k < padded
    similarity += batch * tokens * padded
    grad_plan += batch * tokens * padded
    cluster_terms += batch * (iters + 1) * padded + offsets_k
    cluster_biases += batch * (iters + 1) * padded + offsets_k
    cluster_scales += batch * iters * padded + offsets_k
    term = tl.zeros((BLOCK_K,), tl.float32)
    tl.store(cluster_terms + tl.cast(iters, tl.int64) * padded, term, mask=in_k)
    for back in range(0, iters):
        step = tl.cast(iters - 1 - back, tl.int64)
        cluster_bias = tl.load(cluster_biases + (step + 1) * padded, mask=in_k, other=0.0)
        sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in range(0, tokens, BLOCK_N):
            offsets_n = start + tl.arange(0, BLOCK_N)
            in_n = offsets_n < tokens
            mask = in_n[:, None] & in_k[None, :]
            sources = offsets_n.to(tl.int64)[:, None] * padded + offsets_k[None, :]
            rows = (batch * iters + step) * tokens + offsets_n
            score = tl.load(similarity + sources, mask=mask, other=float("-inf"))
            shift = tl.load(token_shifts + rows, mask=in_n, other=0.0)
            scale = tl.load(token_scales + rows, mask=in_n, other=0.0)
            plan = tl.exp(score + cluster_bias[None, :] - shift[:, None]) * scale[:, None]
            if back == 0:
                share = tl.load(grad_plan + sources, mask=mask, other=0.0)
            else:
                share = -plan * term[None, :]
            token_term = tl.sum(share, 1)
            tl.store(token_terms + rows, token_term, mask=in_n)
            if back == 0:
                sums += share - plan * token_term[:, None]
            else:
                sums -= plan * token_term[:, None]
        term = tl.sum(sums, 0) * tl.load(cluster_scales + step * padded, mask=in_k, other=0.0)
        tl.store(cluster_terms + step * padded, term, mask=in_k)


@triton.jit
def similarity_backward_kernel(
    similarity,  # (B, N, padded) float32, contiguous
    token_shifts,  # (B, iters, N) float32, contiguous
    token_scales,  # (B, iters, N) float32, contiguous
    cluster_biases,  # (B, iters + 1, padded) float32, contiguous
    token_terms,  # (B, iters, N) float32, contiguous
    cluster_terms,  # (B, iters + 1, padded) float32, contiguous
    grad_similarity,  # (B, N, padded) float32, contiguous: the gradient of the plan's logarithm, overwritten
    along,  # (B, N) float32, contiguous: normalised token . its gradient
    tokens,
    clusters,
    padded,
    iters,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: the gradients of the similarities of BLOCK_N tokens."""
    batch = tl.program_id(1).to(tl.int64)
    offsets_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = offsets_n < tokens
    rows = batch * tokens + offsets_n
    dots = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, padded, BLOCK_K):
        offsets_k = start + tl.arange(0, BLOCK_K)
        in_k = offsets_k < padded
        mask = in_n[:, None] & in_k[None, :]
        targets = rows[:, None] * padded + offsets_k[None, :]
        score = tl.load(similarity + targets, mask=mask, other=float("-inf"))
        value = tl.load(grad_similarity + targets, mask=mask, other=0.0)
        dots += tl.sum(value, 1)
        first_bias = tl.load(cluster_biases + batch * (iters + 1) * padded + offsets_k, mask=in_k, other=0.0)
        first_term = tl.load(cluster_terms + batch * (iters + 1) * padded + offsets_k, mask=in_k, other=0.0)
        value -= tl.exp(score + first_bias[None, :]) * first_term[None, :]
        for step in range(0, iters):
            row = batch * iters + step
            shift = tl.load(token_shifts + row * tokens + offsets_n, mask=in_n, other=0.0)
            scale = tl.load(token_scales + row * tokens + offsets_n, mask=in_n, other=0.0)
            token_term = tl.load(token_terms + row * tokens + offsets_n, mask=in_n, other=0.0)
            sources = (row + batch + 1) * padded + offsets_k
            cluster_bias = tl.load(cluster_biases + sources, mask=in_k, other=0.0)
            cluster_term = tl.load(cluster_terms + sources, mask=in_k, other=0.0)
            plan = tl.exp(score + cluster_bias[None, :] - shift[:, None]) * scale[:, None]
            value -= plan * (token_term[:, None] + cluster_term[None, :])
        is_score = in_n[:, None] & (offsets_k < clusters)[None, :]
        dots += tl.sum(value * tl.where(is_score, score, 0.0), 1)
        tl.store(grad_similarity + targets, value, mask=mask)
    tl.store(along + rows, dots, mask=in_n)


@triton.jit
def _grad_tokens(
    grad,
    x,
    centers,
    similarity,
    grad_similarity,
    inverse_norm,
    token_shifts,
    token_scales,
    cluster_biases,
    along,
    grad_x,
    inverse_eps,
    tokens,
    clusters,
    padded,
    channels,
    iters,
    grad_stride_b,
    grad_stride_k,
    x_stride_b,
    x_stride_n,
    centers_stride_k,
    batch,
    n_block,
    c_block,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offsets_n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets_c = c_block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_n = offsets_n < tokens
    in_c = offsets_c < channels
    rows = batch * tokens + offsets_n
    last = batch * iters + iters - 1
    shift = tl.load(token_shifts + last * tokens + offsets_n, mask=in_n, other=0.0)
    scale = tl.load(token_scales + last * tokens + offsets_n, mask=in_n, other=0.0)
    grad += batch * grad_stride_b
    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, padded, BLOCK_K):
        offsets_k = start + tl.arange(0, BLOCK_K)
        in_k = offsets_k < padded
        in_rows = in_n[:, None] & in_k[None, :]
        sources = rows[:, None] * padded + offsets_k[None, :]
        score = tl.load(similarity + sources, mask=in_rows, other=float("-inf"))
        slope = tl.load(grad_similarity + sources, mask=in_rows, other=0.0) * inverse_eps
        cluster_bias = tl.load(cluster_biases + (last + batch + 1) * padded + offsets_k, mask=in_k, other=0.0)
        plan = tl.exp(score + cluster_bias[None, :] - shift[:, None]) * scale[:, None]
        mask = (offsets_k < clusters)[:, None] & in_c[None, :]
        row_k = offsets_k.to(tl.int64)[:, None]
        center = tl.load(centers + row_k * centers_stride_k + offsets_c[None, :], mask=mask, other=0.0)
        acc = _dot(slope, center, acc, PRECISION)
        merged = tl.load(grad + row_k * grad_stride_k + offsets_c[None, :], mask=mask, other=0.0)
        acc = _dot(plan, merged, acc, PRECISION)
    mask = in_n[:, None] & in_c[None, :]
    sources = x + batch * x_stride_b + offsets_n.to(tl.int64)[:, None] * x_stride_n + offsets_c[None, :]
    inverse = tl.load(inverse_norm + rows, mask=in_n, other=0.0)
    # A norm that was clamped is a constant.
    radial = tl.where(inverse < 0.999999e12, tl.load(along + rows, mask=in_n, other=0.0), 0.0) * inverse
    value = acc - tl.load(sources, mask=mask, other=0.0).to(tl.float32) * radial[:, None]
    value *= inverse[:, None]
    tl.store(grad_x + rows[:, None] * channels + offsets_c[None, :], value.to(grad_x.dtype.element_ty), mask=mask)


@triton.jit
def _grad_centers(
    x,
    grad_similarity,
    inverse_norm,
    grad_centers,
    inverse_eps,
    first,
    stop,
    part,
    tokens,
    clusters,
    padded,
    channels,
    x_stride_b,
    x_stride_n,
    k_block,
    c_block,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offsets_k = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
    offsets_c = c_block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_k = offsets_k < padded
    in_c = offsets_c < channels
    acc = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for image in range(first, stop):
        batch = tl.cast(image, tl.int64)
        for start in range(0, tokens, BLOCK_N):
            offsets_n = start + tl.arange(0, BLOCK_N)
            in_n = offsets_n < tokens
            rows = batch * tokens + offsets_n
            slope = tl.load(
                grad_similarity + rows[:, None] * padded + offsets_k[None, :],
                mask=in_n[:, None] & in_k[None, :],
                other=0.0,
            )
            inverse = tl.load(inverse_norm + rows, mask=in_n, other=0.0)
            token = tl.load(
                x + batch * x_stride_b + offsets_n.to(tl.int64)[:, None] * x_stride_n + offsets_c[None, :],
                mask=in_n[:, None] & in_c[None, :],
                other=0.0,
            )
            acc = _dot(tl.trans(slope * inverse[:, None]), token, acc, PRECISION)
    targets = (tl.cast(part, tl.int64) * clusters + offsets_k)[:, None] * channels + offsets_c[None, :]
    mask = (offsets_k < clusters)[:, None] & in_c[None, :]
    tl.store(grad_centers + targets, acc * inverse_eps, mask=mask)


@triton.jit
def tokens_and_centers_backward_kernel(
    grad,  # (B, K, C)
    x,  # (B, N, C)
    centers,  # (K, C)
    similarity,  # (B, N, padded) float32, contiguous
    grad_similarity,  # (B, N, padded) float32, contiguous
    inverse_norm,  # (B, N) float32, contiguous
    token_shifts,  # (B, iters, N) float32, contiguous
    token_scales,  # (B, iters, N) float32, contiguous
    cluster_biases,  # (B, iters + 1, padded) float32, contiguous
    along,  # (B, N) float32, contiguous
    grad_x,  # (B, N, C), contiguous
    grad_centers,  # (parts, K, C) float32, contiguous
    inverse_eps,
    images,
    images_per_part,
    parts,
    tokens,
    clusters,
    padded,
    channels,
    iters,
    grad_stride_b,
    grad_stride_k,
    x_stride_b,
    x_stride_n,
    centers_stride_k,
    PRECISION_X: tl.constexpr,
    PRECISION_CENTERS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEP: tl.constexpr,
):
    """The first programs sum up the centres' gradients over their images, because they take longest."""
    c_blocks = tl.cdiv(channels, BLOCK_C)
    k_blocks = tl.cdiv(clusters, ROWS)
    n_blocks = tl.cdiv(tokens, ROWS)
    c_block = tl.program_id(0) % c_blocks
    program = tl.program_id(0) // c_blocks
    if program < parts * k_blocks:
        part = program // k_blocks
        first = part * images_per_part
        _grad_centers(
            x,
            grad_similarity,
            inverse_norm,
            grad_centers,
            inverse_eps,
            first,
            tl.minimum(first + images_per_part, images),
            part,
            tokens,
            clusters,
            padded,
            channels,
            x_stride_b,
            x_stride_n,
            program % k_blocks,
            c_block,
            PRECISION_CENTERS,
            ROWS,
            BLOCK_C,
            STEP,
        )
    else:
        program -= parts * k_blocks
        _grad_tokens(
            grad,
            x,
            centers,
            similarity,
            grad_similarity,
            inverse_norm,
            token_shifts,
            token_scales,
            cluster_biases,
            along,
            grad_x,
            inverse_eps,
            tokens,
            clusters,
            padded,
            channels,
            iters,
            grad_stride_b,
            grad_stride_k,
            x_stride_b,
            x_stride_n,
            centers_stride_k,
            (program // n_blocks).to(tl.int64),
            program % n_blocks,
            c_block,
            PRECISION_X,
            ROWS,
            BLOCK_C,
            STEP,
        )


def padded_clusters(clusters: int) -> int:
    """Columns of the padded matrices."""
    return triton.cdiv(clusters, PADDING) * PADDING


def _precision(dtype: torch.dtype) -> str:
    """Float32 results are summed exactly; for half ones tf32 keeps as many bits of the weights, at every exponent."""
    return "ieee" if dtype == torch.float32 else "tf32"


_SAVED = ("similarity", "inverse_norm", "token_shifts", "token_scales", "cluster_biases", "cluster_scales")


@in_parts("x", "head")
def sinkhorn_merge(
    x: torch.Tensor, centers: torch.Tensor, eps: float, iters: int, head: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """Four launches; x (B, N, C), centers (K, C) and head (B, P, C) or None with contiguous channels.

    Returns merged (B, P + K, C), similarity (B, N, padded), token_bias (B, N), inverse_norm (B, N), token_shifts and
    token_scales (B, iters, N), cluster_biases (B, iters + 1, padded), the first of which is minus the maximum of each
    column, and cluster_scales (B, iters, padded), the reciprocals of the column sums before each of the others.
    """
    batch, tokens, channels = x.shape
    clusters = centers.shape[0]
    padded = padded_clusters(clusters)
    num_head = 0 if head is None else head.shape[1]
    dtype = x.dtype if head is None else torch.promote_types(x.dtype, head.dtype)
    numbers = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    merged = torch.empty(batch, num_head + clusters, channels, dtype=dtype, device=x.device)
    similarity = numbers(batch, tokens, padded)
    inverse_norm = squared_lengths(x, reciprocal=True)
    token_bias = numbers(batch, tokens)
    token_shifts = numbers(batch, iters, tokens)
    token_scales = numbers(batch, iters, tokens)
    cluster_biases = numbers(batch, iters + 1, padded)
    cluster_scales = numbers(batch, iters, padded)
    saved = (inverse_norm, token_shifts, token_scales, cluster_biases, cluster_scales)
    if batch == 0:
        return merged, similarity, token_bias, *saved
    exact = x.dtype == torch.float32 or centers.dtype != x.dtype
    tile = similarity_tile(clusters, exact)
    parts = triton.cdiv(tokens, tile.rows)
    part_max = numbers(batch, parts, padded)
    part_sum = torch.empty_like(part_max)
    similarity_kernel[(parts * triton.cdiv(padded, tile.columns), batch)](
        x,
        centers,
        similarity,
        inverse_norm,
        part_max,
        part_sum,
        1.0 / eps,
        tokens,
        clusters,
        padded,
        channels,
        *x.stride()[:2],
        centers.stride(0),
        PRECISION="ieee",
        BLOCK_N=tile.rows,
        BLOCK_K=tile.columns,
        BLOCK_C=tile.step,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=MOST_REGISTERS if exact else None,
    )
    walk = plan_tile(tokens, padded)
    plan_biases_kernel[(batch,)](
        similarity,
        part_max,
        part_sum,
        token_bias,
        token_shifts,
        token_scales,
        cluster_biases,
        cluster_scales,
        tokens,
        clusters,
        padded,
        parts,
        iters,
        BLOCK_N=walk.tokens,
        BLOCK_K=walk.clusters,
        num_warps=walk.num_warps,
        maxnreg=MOST_REGISTERS,
    )
    precision = _precision(dtype)
    tile = sums_tile(channels, precision == "ieee")
    plan_sums_kernel[(triton.cdiv(clusters, tile.rows) * triton.cdiv(channels, tile.columns), batch)](
        x,
        similarity,
        inverse_norm,
        token_shifts,
        token_scales,
        cluster_biases,
        head,
        merged,
        tokens,
        clusters,
        padded,
        channels,
        num_head,
        iters,
        *x.stride()[:2],
        *((0, 0) if head is None else head.stride()[:2]),
        PRECISION=precision,
        BLOCK_K=tile.rows,
        BLOCK_C=tile.columns,
        BLOCK_N=tile.step,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return merged, similarity, token_bias, *saved


@in_parts("x", "head")
def sinkhorn_merge_blocks(
    x: torch.Tensor, centers: torch.Tensor, eps: float, iters: int, head: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """2 iters + 2 launches; the same merged rows, token_bias (B, N) and cluster_bias (B, K), with vectors only."""
    batch, tokens, channels = x.shape
    clusters = centers.shape[0]
    num_head = 0 if head is None else head.shape[1]
    dtype = x.dtype if head is None else torch.promote_types(x.dtype, head.dtype)
    merged = torch.empty(batch, num_head + clusters, channels, dtype=dtype, device=x.device)
    numbers = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    inverse_norm = squared_lengths(x, reciprocal=True)
    token_bias, token_shift, token_scale = (numbers(batch, tokens) for _ in range(3))
    cluster_bias = numbers(batch, clusters)
    if batch == 0:
        return merged, token_bias, cluster_bias
    exact = x.dtype == torch.float32 or centers.dtype != x.dtype
    tile = again_tile(exact)
    scalars = (1.0 / eps, tokens, clusters, channels)
    strides = (*x.stride()[:2], centers.stride(0))
    settings = {"BLOCK_C": tile.step, "num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if centers.dtype != x.dtype:  # without it one of them spills a few
        settings["maxnreg"] = MOST_REGISTERS
    of_clusters = {"BLOCK_K": tile.rows, "BLOCK_N": tile.columns, **settings}
    of_tokens = {"BLOCK_N": tile.rows, "BLOCK_K": tile.columns, **settings}
    k_blocks = (triton.cdiv(clusters, tile.rows), batch)
    n_blocks = (triton.cdiv(tokens, tile.rows), batch)
    first_biases_again_kernel[k_blocks](x, centers, inverse_norm, cluster_bias, *scalars, *strides, **of_clusters)
    for step in range(iters):
        if step:
            cluster_biases_again_kernel[k_blocks](
                x, centers, inverse_norm, cluster_bias, token_shift, token_scale, *scalars, *strides, **of_clusters
            )
        token_biases_again_kernel[n_blocks](
            x,
            centers,
            inverse_norm,
            cluster_bias,
            token_bias,
            token_shift,
            token_scale,
            *scalars,
            *strides,
            **of_tokens,
        )
    precision = _precision(dtype)
    sums = sums_again_tile(channels, exact or precision == "ieee")
    plan_sums_again_kernel[(triton.cdiv(clusters, sums.clusters) * triton.cdiv(channels, sums.channels), batch)](
        x,
        centers,
        inverse_norm,
        cluster_bias,
        token_shift,
        token_scale,
        head,
        merged,
        *scalars,
        num_head,
        *strides,
        *((0, 0) if head is None else head.stride()[:2]),
        PRECISION=precision,
        BLOCK_K=sums.clusters,
        BLOCK_C=sums.channels,
        BLOCK_N=sums.tokens,
        STEP=sums.step,
        num_warps=sums.num_warps,
        num_stages=sums.num_stages,
    )
    return merged, token_bias, cluster_bias


@in_parts("grad", "x", *_SAVED, added=(1,))
def sinkhorn_merge_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    centers: torch.Tensor,
    similarity: torch.Tensor,
    inverse_norm: torch.Tensor,
    token_shifts: torch.Tensor,
    token_scales: torch.Tensor,
    cluster_biases: torch.Tensor,
    cluster_scales: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Four launches and a sum; grad (B, K, C) with contiguous channels -> gradients of x and of the centres."""
    batch, tokens, channels = x.shape
    clusters, padded, iters = centers.shape[0], similarity.shape[2], token_shifts.shape[1]
    grad_x = torch.empty(batch, tokens, channels, dtype=x.dtype, device=x.device)
    if batch == 0:
        return grad_x, torch.zeros_like(centers)
    grad_similarity = torch.empty_like(similarity)
    exact = x.dtype == torch.float32 or grad.dtype != x.dtype
    tile = similarity_tile(clusters, exact)
    log_plan_backward_kernel[(triton.cdiv(tokens, tile.rows) * triton.cdiv(padded, tile.columns), batch)](
        grad,
        x,
        similarity,
        inverse_norm,
        token_shifts,
        token_scales,
        cluster_biases,
        grad_similarity,
        tokens,
        clusters,
        padded,
        channels,
        iters,
        *grad.stride()[:2],
        *x.stride()[:2],
        PRECISION="ieee",
        BLOCK_N=tile.rows,
        BLOCK_K=tile.columns,
        BLOCK_C=tile.step,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    walk = plan_tile(tokens, padded)
    token_terms = torch.empty_like(token_shifts)
    cluster_terms = torch.empty_like(cluster_biases)
    plan_biases_backward_kernel[(batch,)](
        similarity,
        grad_similarity,
        token_shifts,
        token_scales,
        cluster_biases,
        cluster_scales,
        token_terms,
        cluster_terms,
        tokens,
        padded,
        iters,
        BLOCK_N=walk.tokens,
        BLOCK_K=walk.clusters,
        num_warps=walk.num_warps,
        maxnreg=MOST_REGISTERS,
    )
    along = torch.empty_like(inverse_norm)
    similarity_backward_kernel[(triton.cdiv(tokens, SLOPE_TILE.tokens), batch)](
        similarity,
        token_shifts,
        token_scales,
        cluster_biases,
        token_terms,
        cluster_terms,
        grad_similarity,
        along,
        tokens,
        clusters,
        padded,
        iters,
        BLOCK_N=SLOPE_TILE.tokens,
        BLOCK_K=SLOPE_TILE.clusters,
        num_warps=SLOPE_TILE.num_warps,
    )
    small = grad.dtype != x.dtype or "ieee" in (_precision(x.dtype), _precision(centers.dtype))
    tile = backward_tile(channels, small)
    images_per_part = triton.cdiv(batch, CENTER_PARTS)
    parts = triton.cdiv(batch, images_per_part)
    grad_centers = torch.empty(parts, clusters, channels, dtype=torch.float32, device=x.device)
    row_blocks = parts * triton.cdiv(clusters, tile.rows) + batch * triton.cdiv(tokens, tile.rows)
    tokens_and_centers_backward_kernel[(row_blocks * triton.cdiv(channels, tile.columns),)](
        grad,
        x,
        centers,
        similarity,
        grad_similarity,
        inverse_norm,
        token_shifts,
        token_scales,
        cluster_biases,
        along,
        grad_x,
        grad_centers,
        1.0 / eps,
        batch,
        images_per_part,
        parts,
        tokens,
        clusters,
        padded,
        channels,
        iters,
        *grad.stride()[:2],
        *x.stride()[:2],
        centers.stride(0),
        PRECISION_X=_precision(x.dtype),
        PRECISION_CENTERS=_precision(centers.dtype),
        ROWS=tile.rows,
        BLOCK_C=tile.columns,
        STEP=tile.step,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=backward_registers(x.dtype, grad.dtype, centers.dtype),
    )
    return grad_x, grad_centers.sum(0).to(centers.dtype)
