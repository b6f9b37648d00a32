"""Sinkhorn merging in four launches: norms; similarities; the iterations; the plan times the tokens.

Neither the plan nor the normalised tokens are written to memory.

Without a backward pass the similarities go to a workspace, about 4 N K bytes for an image of N tokens and K clusters.
If it does not hold all images, the launches are repeated for some images at a time.

Rows of similarities are padded with -inf to a multiple of 16 columns, so every access is 16 bytes, and padding drops
out of all sums. At a small eps the biases are large, and their sum would round the plan. So the plan is
``exp(similarity + cluster_bias - shift) * scale``, with the maximum of each row and the reciprocal of its sum.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ._direct import cdiv, direct, next_power_of_2
from ._distances import squared_lengths
from ._launch import Tile, fitting, in_parts, strides
from ._workspace import workspace_parts

LOWEST = tl.constexpr(-3.0e38)  # finite maximum for a row of -inf
PADDING = 16
MOST_REGISTERS = 255  # set, because otherwise the assembler spills some to fit one more program on a multiprocessor


@functools.cache
def similarity_tile(clusters: int, exact: bool) -> Tile:
    """Choose settings, found by compiling, that never spill for sm_80 and sm_90."""
    if exact:  # exact float32 dots hold their operands in registers
        return Tile(BLOCK_N=64, BLOCK_K=fitting(clusters, 32), BLOCK_C=16, num_warps=4, num_stages=2)
    return Tile(BLOCK_N=64, BLOCK_K=fitting(clusters, 64), BLOCK_C=64, num_warps=8, num_stages=3)


@functools.cache
def sums_tile(channels: int, exact: bool) -> Tile:
    """Choose tiles wide in the channels, because every block of channels computes the plan again."""
    if exact:
        return Tile(BLOCK_K=64, BLOCK_C=fitting(channels, 64), BLOCK_N=16, num_warps=8, num_stages=2)
    return Tile(BLOCK_K=64, BLOCK_C=fitting(channels, 128), BLOCK_N=32, num_warps=8, num_stages=2)


@functools.cache
def plan_tile(tokens: int, padded: int) -> Tile:
    """Choose whole rows: a thread holds 16 similarities, and 16 sums over tokens."""
    block_k = next_power_of_2(padded)
    block_n = max(1, min(4096 // block_k, next_power_of_2(tokens)))
    return Tile(BLOCK_N=block_n, BLOCK_K=block_k, num_warps=8, maxnreg=MOST_REGISTERS)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Multiply and add to acc; operands of the same half precision stay as they are, others become float32."""
    if a.dtype != b.dtype:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@direct
@triton.jit
def similarity_kernel(
    x,  # (B, N, C)
    centers,  # (K, C)
    similarity,  # (images, N, padded) float32, contiguous
    inverse_norm,  # (B, N) float32, contiguous
    part_max,  # (images, parts, padded) float32, contiguous
    part_sum,  # (images, parts, padded) float32, contiguous
    inverse_eps,
    first,  # image of the first program
    tokens,
    clusters,
    padded,
    channels,
    x_strides,
    centers_stride_k,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute a tile of similarities in each program, and the maximum and sum of exponentials of its columns.

    Grid (tiles, images). Norms are not summed in this loop: see ``_distances``.
    """
    place = tl.program_id(1).to(tl.int64)
    batch = place + first
    k_blocks = tl.cdiv(padded, BLOCK_K)
    k_block = tl.program_id(0) % k_blocks
    part = tl.program_id(0) // k_blocks
    offsets_n = part * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets_k = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
    offsets_c = tl.arange(0, BLOCK_C)
    in_n = offsets_n < tokens
    # Rows past the end repeat the last one, and are ignored: a mask for them would cost registers.
    row_n = tl.minimum(offsets_n, tokens - 1).to(tl.int64)
    row_k = tl.minimum(offsets_k, clusters - 1).to(tl.int64)
    pointers_x = x + batch * x_strides[0] + row_n[:, None] * x_strides[1] + offsets_c[None, :]
    pointers_centers = centers + row_k[:, None] * centers_stride_k + offsets_c[None, :]
    dots = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    tl.assume(channels > 0)  # a loop that cannot be skipped lets the products of tensor cores overlap
    for start in range(0, channels, BLOCK_C):
        in_c = (start + offsets_c < channels)[None, :]
        token = tl.load(pointers_x + start, mask=in_c, other=0.0)
        center = tl.load(pointers_centers + start, mask=in_c, other=0.0)
        dots = dot(token, tl.trans(center), dots, PRECISION)
    inverse = tl.load(inverse_norm + batch * tokens + row_n)
    score = dots * (inverse * inverse_eps)[:, None]
    score = tl.where((offsets_k < clusters)[None, :], score, float("-inf"))
    in_k = offsets_k < padded
    targets = (place * tokens + offsets_n)[:, None] * padded + offsets_k[None, :]
    tl.store(similarity + targets, score, mask=in_n[:, None] & in_k[None, :])
    score = tl.where(in_n[:, None], score, float("-inf"))
    maximum = tl.maximum(tl.max(score, 0), LOWEST)
    parts = tl.cdiv(tokens, BLOCK_N)
    targets = (place * parts + part) * padded + offsets_k
    tl.store(part_max + targets, maximum, mask=in_k)
    tl.store(part_sum + targets, tl.sum(tl.exp(score - maximum[None, :]), 0), mask=in_k)


@direct
@triton.jit
def plan_biases_kernel(
    similarity,  # (images, N, padded) float32, contiguous
    part_max,  # (images, parts, padded) float32, contiguous
    part_sum,  # (images, parts, padded) float32, contiguous
    token_bias,  # (B, N) float32, contiguous: of the last iteration
    token_shifts,  # (B, iters, N) float32, contiguous
    token_scales,  # (B, iters, N) float32, contiguous
    cluster_biases,  # (B, iters + 1, padded) float32, contiguous
    cluster_scales,  # (B, iters, padded) float32, contiguous
    first,  # image of the first program
    tokens,
    clusters,
    padded,
    parts,
    iters,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Iterate one image in each program, with one pass over its similarities an iteration; grid (images,)."""
    place = tl.program_id(0).to(tl.int64)
    batch = place + first
    offsets_k = tl.arange(0, BLOCK_K)
    in_k = offsets_k < padded
    is_cluster = offsets_k < clusters
    maximum = tl.full((BLOCK_K,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for part in range(0, parts):
        sources = (place * parts + part) * padded + offsets_k
        other_max = tl.load(part_max + sources, mask=in_k, other=LOWEST)
        other_sum = tl.load(part_sum + sources, mask=in_k, other=0.0)
        new_max = tl.maximum(maximum, other_max)
        total = total * tl.exp(maximum - new_max) + other_sum * tl.exp(other_max - new_max)
        maximum = new_max
    similarity += place * tokens * padded
    token_bias += batch * tokens
    token_shifts += batch * iters * tokens
    token_scales += batch * iters * tokens
    cluster_biases += batch * (iters + 1) * padded + offsets_k
    cluster_scales += batch * iters * padded + offsets_k
    cluster_bias = tl.where(is_cluster, -maximum, 0.0)
    total = tl.where(is_cluster, total, 1.0)
    tl.store(cluster_biases, cluster_bias, mask=in_k)
    for step in range(0, iters):
        # total is the column sums of the plan, at least 1 / K from the second step on.
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
    """Copy the channels in_c of ``rows`` rows; source and target point to the channels of the first row."""
    for row in range(0, rows):
        value = tl.load(source + tl.cast(row, tl.int64) * source_stride, mask=in_c, other=0.0)
        tl.store(target + tl.cast(row, tl.int64) * target_stride, value.to(target.dtype.element_ty), mask=in_c)


@direct
@triton.jit
def plan_sums_kernel(
    x,  # (B, N, C)
    similarity,  # (images, N, padded) float32, contiguous
    inverse_norm,  # (B, N) float32, contiguous
    token_shifts,  # (B, iters, N) float32, contiguous
    token_scales,  # (B, iters, N) float32, contiguous
    cluster_biases,  # (B, iters + 1, padded) float32, contiguous
    head,  # (B, P, C) or None
    out,  # (B, P + K, C), contiguous
    first,  # image of the first program
    tokens,
    clusters,
    padded,
    channels,
    num_head,
    iters,
    x_strides,
    head_strides,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum BLOCK_C channels of BLOCK_K clusters in each program; grid (tiles, images). The first tiles copy the head."""
    place = tl.program_id(1).to(tl.int64)
    batch = place + first
    c_blocks = tl.cdiv(channels, BLOCK_C)
    k_block = tl.program_id(0) // c_blocks
    offsets_c = tl.program_id(0) % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    offsets_k = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
    in_c = offsets_c < channels
    in_k = offsets_k < padded
    out += batch * (num_head + clusters) * channels
    if head is not None:
        copied = tl.where(k_block == 0, num_head, 0)
        _copy_rows(head + batch * head_strides[0] + offsets_c, out + offsets_c, copied, head_strides[1], channels, in_c)
    last = batch * iters + iters - 1
    cluster_bias = tl.load(cluster_biases + (last + batch + 1) * padded + offsets_k, mask=in_k, other=0.0)
    x += batch * x_strides[0]
    acc = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for start in range(0, tokens, BLOCK_N):
        offsets_n = start + tl.arange(0, BLOCK_N)
        in_n = offsets_n < tokens
        rows = batch * tokens + offsets_n
        score = tl.load(
            similarity + (place * tokens + offsets_n)[:, None] * padded + offsets_k[None, :],
            mask=in_n[:, None] & in_k[None, :],
            other=float("-inf"),
        )
        shift = tl.load(token_shifts + last * tokens + offsets_n, mask=in_n, other=0.0)
        scale = tl.load(token_scales + last * tokens + offsets_n, mask=in_n, other=0.0)
        scale *= tl.load(inverse_norm + rows, mask=in_n, other=0.0)
        weight = tl.exp(score + cluster_bias[None, :] - shift[:, None]) * scale[:, None]
        token = tl.load(
            x + offsets_n.to(tl.int64)[:, None] * x_strides[1] + offsets_c[None, :],
            mask=in_n[:, None] & in_c[None, :],
            other=0.0,
        )
        acc = dot(tl.trans(weight), token, acc, PRECISION)
    targets = (num_head + offsets_k).to(tl.int64)[:, None] * channels + offsets_c[None, :]
    mask = (offsets_k < clusters)[:, None] & in_c[None, :]
    tl.store(out + targets, acc.to(out.dtype.element_ty), mask=mask)


def padded_clusters(clusters: int) -> int:
    """Return the number of columns of the padded matrices."""
    return cdiv(clusters, PADDING) * PADDING


def precision_of(dtype: torch.dtype) -> str:
    """Return the precision of a dot.

    Float32 results need exact sums; for half precision tf32 keeps enough bits of the weights, at every exponent.
    """
    return "ieee" if dtype == torch.float32 else "tf32"


def _forward(
    x: torch.Tensor, centers: torch.Tensor, eps: float, iters: int, head: torch.Tensor | None, *, keep: bool
) -> tuple[torch.Tensor, ...]:
    """Merge all images; if similarities are not kept, as many at a time as the workspace holds."""
    batch, tokens, channels = x.shape
    clusters = centers.shape[0]
    padded = padded_clusters(clusters)
    num_head = 0 if head is None else head.shape[1]
    dtype = x.dtype if head is None else torch.promote_types(x.dtype, head.dtype)
    numbers = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    exact = x.dtype == torch.float32 or centers.dtype != x.dtype
    tile = similarity_tile(clusters, exact)
    parts = cdiv(tokens, tile["BLOCK_N"])
    images = [range(batch)] if keep or not batch else workspace_parts(batch, 4 * (tokens + 2 * parts) * padded)
    merged = torch.empty(batch, num_head + clusters, channels, dtype=dtype, device=x.device)
    similarity = numbers(len(images[0]), tokens, padded)
    inverse_norm = squared_lengths(x, reciprocal=True)
    token_bias = numbers(batch, tokens)
    token_shifts = numbers(batch, iters, tokens)
    token_scales = numbers(batch, iters, tokens)
    cluster_biases = numbers(batch, iters + 1, padded)
    cluster_scales = numbers(batch, iters, padded)
    saved = (inverse_norm, token_shifts, token_scales, cluster_biases, cluster_scales)
    if batch == 0:
        return merged, similarity, token_bias, *saved
    precision = precision_of(dtype)
    last = sums_tile(channels, precision == "ieee")
    part_max = numbers(len(images[0]), parts, padded)
    part_sum = torch.empty_like(part_max)
    for some in images:
        similarity_kernel[(parts * cdiv(padded, tile["BLOCK_K"]), len(some))](
            *(x, centers, similarity, inverse_norm, part_max, part_sum),
            *(1.0 / eps, some.start, tokens, clusters, padded, channels),
            *(strides(x, 2), centers.stride(0)),
            PRECISION="ieee",
            maxnreg=MOST_REGISTERS if exact else None,
            **tile,
        )
        plan_biases_kernel[(len(some),)](
            *(similarity, part_max, part_sum, token_bias, token_shifts, token_scales, cluster_biases, cluster_scales),
            *(some.start, tokens, clusters, padded, parts, iters),
            **plan_tile(tokens, padded),
        )
        plan_sums_kernel[(cdiv(clusters, last["BLOCK_K"]) * cdiv(channels, last["BLOCK_C"]), len(some))](
            *(x, similarity, inverse_norm, token_shifts, token_scales, cluster_biases, head, merged),
            *(some.start, tokens, clusters, padded, channels, num_head, iters),
            *(strides(x, 2), strides(head, 2)),
            PRECISION=precision,
            **last,
        )
    return merged, similarity, token_bias, *saved


@in_parts("x", "head")
def sinkhorn_merge(
    x: torch.Tensor, centers: torch.Tensor, eps: float, iters: int, head: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """Launch four times; x (B, N, C), centers (K, C) and head (B, P, C) or None with contiguous channels.

    Returns merged (B, P + K, C), similarity (B, N, padded), token_bias (B, N), inverse_norm (B, N), token_shifts and
    token_scales (B, iters, N), cluster_biases (B, iters + 1, padded), the first of which is minus the maximum of each
    column, and cluster_scales (B, iters, padded), the reciprocals of the column sums before each of the others.
    """
    return _forward(x, centers, eps, iters, head, keep=True)


@in_parts("x", "head")
def sinkhorn_merge_inference(
    x: torch.Tensor, centers: torch.Tensor, eps: float, iters: int, head: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch four times, and three more for every further part of the images.

    Returns merged, token_bias and cluster_biases of :func:`sinkhorn_merge`.
    Memory holds the similarities of as many images as the workspace has room for.
    """
    merged, _, token_bias, _, _, _, cluster_biases, _ = _forward(x, centers, eps, iters, head, keep=False)
    return merged, token_bias, cluster_biases
