"""Backward pass of Sinkhorn merging: four launches and a sum in fixed order.

The launches compute the gradient of the plan's logarithm; the vectors of each iteration, in reverse; from these vectors
the gradient of the similarities; the gradients of tokens and centres. Each launch recomputes the plan.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ._direct import cdiv, direct
from ._launch import Tile, fitting, in_parts, strides
from .sinkhorn_merge import MOST_REGISTERS, dot, plan_tile, precision_of, similarity_tile

CENTER_PARTS = 16  # groups of images; their sums for the centres are added at the end
# Small, because the gradient of a similarity takes one exponential for every iteration.
SLOPE_TILE = Tile(BLOCK_N=32, BLOCK_K=64, num_warps=4)


@functools.cache
def backward_tile(channels: int, small: bool) -> Tile:
    """Return the tile of the kernels with two products; ``small`` is for operands in float32.

    Larger tiles, or 4 warps, spill at some shapes.
    """
    return Tile(ROWS=64, BLOCK_C=fitting(channels, 32 if small else 64), STEP=16, num_warps=8, num_stages=2)


def backward_registers(*dtypes: torch.dtype) -> int | None:
    """Return the limit of registers for a thread, or None; with float32 the assembler's own choice spills a few."""
    return MOST_REGISTERS if torch.float32 in dtypes else None


@direct
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
    grad_strides,
    x_strides,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute a tile of grad_plan (of the plan's logarithm), plan * (normalised token . grad); grid (tiles, images)."""
    batch = tl.program_id(1).to(tl.int64)
    k_blocks = tl.cdiv(padded, BLOCK_K)
    offsets_n = tl.program_id(0) // k_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets_k = tl.program_id(0) % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    offsets_c = tl.arange(0, BLOCK_C)
    row_n = tl.minimum(offsets_n, tokens - 1).to(tl.int64)
    row_k = tl.minimum(offsets_k, clusters - 1).to(tl.int64)
    pointers_x = x + batch * x_strides[0] + row_n[:, None] * x_strides[1] + offsets_c[None, :]
    pointers_grad = grad + batch * grad_strides[0] + row_k[:, None] * grad_strides[1] + offsets_c[None, :]
    dots = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, channels, BLOCK_C):
        in_c = (start + offsets_c < channels)[None, :]
        token = tl.load(pointers_x + start, mask=in_c, other=0.0)
        slope = tl.load(pointers_grad + start, mask=in_c, other=0.0)
        dots = dot(token, tl.trans(slope), dots, PRECISION)
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


@direct
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
    """Compute the gradients of all biases of one image in each program, last iteration first; grid (images,).

    Two terms go through the plan of iteration t: ``token_terms[t]``, the gradient of its token biases, and
    ``cluster_terms[t + 1]``, the gradient of the next cluster biases over the column sums of the plan.
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


@direct
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
    """Compute the gradients of BLOCK_N tokens' similarities in each program; grid (blocks of tokens, images)."""
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
    grad_strides,
    x_strides,
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
    grad += batch * grad_strides[0]
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
        acc = dot(slope, center, acc, PRECISION)
        merged = tl.load(grad + row_k * grad_strides[1] + offsets_c[None, :], mask=mask, other=0.0)
        acc = dot(plan, merged, acc, PRECISION)
    mask = in_n[:, None] & in_c[None, :]
    sources = x + batch * x_strides[0] + offsets_n.to(tl.int64)[:, None] * x_strides[1] + offsets_c[None, :]
    inverse = tl.load(inverse_norm + rows, mask=in_n, other=0.0)
    # A clamped norm is a constant.
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
    x_strides,
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
                x + batch * x_strides[0] + offsets_n.to(tl.int64)[:, None] * x_strides[1] + offsets_c[None, :],
                mask=in_n[:, None] & in_c[None, :],
                other=0.0,
            )
            acc = dot(tl.trans(slope * inverse[:, None]), token, acc, PRECISION)
    targets = (tl.cast(part, tl.int64) * clusters + offsets_k)[:, None] * channels + offsets_c[None, :]
    mask = (offsets_k < clusters)[:, None] & in_c[None, :]
    tl.store(grad_centers + targets, acc * inverse_eps, mask=mask)


@direct
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
    grad_strides,
    x_strides,
    centers_stride_k,
    PRECISION_X: tl.constexpr,
    PRECISION_CENTERS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEP: tl.constexpr,
):
    """Compute a tile of grad_centers over a part of the images, or a tile of grad_x, in each program; grid (tiles,).

    The tiles of the centres come first, because they take longest.
    """
    c_blocks = tl.cdiv(channels, BLOCK_C)
    k_blocks = tl.cdiv(clusters, ROWS)
    n_blocks = tl.cdiv(tokens, ROWS)
    c_block = tl.program_id(0) % c_blocks
    program = tl.program_id(0) // c_blocks
    if program < parts * k_blocks:
        part = program // k_blocks
        first = part * images_per_part
        _grad_centers(
            *(x, grad_similarity, inverse_norm, grad_centers, inverse_eps, first),
            *(tl.minimum(first + images_per_part, images), part, tokens, clusters, padded, channels, x_strides),
            *(program % k_blocks, c_block, PRECISION_CENTERS, ROWS, BLOCK_C, STEP),
        )
    else:
        program -= parts * k_blocks
        _grad_tokens(
            *(grad, x, centers, similarity, grad_similarity, inverse_norm, token_shifts, token_scales, cluster_biases),
            *(along, grad_x, inverse_eps, tokens, clusters, padded, channels, iters, grad_strides, x_strides),
            *(centers_stride_k, (program // n_blocks).to(tl.int64), program % n_blocks, c_block, PRECISION_X, ROWS),
            *(BLOCK_C, STEP),
        )


_SAVED = ("similarity", "inverse_norm", "token_shifts", "token_scales", "cluster_biases", "cluster_scales")


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
    """Launch four times; grad (B, K, C) with contiguous channels -> gradients of x (B, N, C) and centres (K, C)."""
    batch, tokens, channels = x.shape
    clusters, padded, iters = centers.shape[0], similarity.shape[2], token_shifts.shape[1]
    grad_x = torch.empty(batch, tokens, channels, dtype=x.dtype, device=x.device)
    if batch == 0:
        return grad_x, torch.zeros_like(centers)
    grad_similarity = torch.empty_like(similarity)
    exact = x.dtype == torch.float32 or grad.dtype != x.dtype
    tile = similarity_tile(clusters, exact)
    log_plan_backward_kernel[(cdiv(tokens, tile["BLOCK_N"]) * cdiv(padded, tile["BLOCK_K"]), batch)](
        *(grad, x, similarity, inverse_norm, token_shifts, token_scales, cluster_biases, grad_similarity),
        *(tokens, clusters, padded, channels, iters),
        *(strides(grad, 2), strides(x, 2)),
        PRECISION="ieee",
        **tile,
    )
    token_terms = torch.empty_like(token_shifts)
    cluster_terms = torch.empty_like(cluster_biases)
    plan_biases_backward_kernel[(batch,)](
        *(similarity, grad_similarity, token_shifts, token_scales, cluster_biases, cluster_scales, token_terms),
        cluster_terms,
        *(tokens, padded, iters),
        **plan_tile(tokens, padded),
    )
    along = torch.empty_like(inverse_norm)
    similarity_backward_kernel[(cdiv(tokens, SLOPE_TILE["BLOCK_N"]), batch)](
        *(similarity, token_shifts, token_scales, cluster_biases, token_terms, cluster_terms, grad_similarity, along),
        *(tokens, clusters, padded, iters),
        **SLOPE_TILE,
    )
    small = grad.dtype != x.dtype or "ieee" in (precision_of(x.dtype), precision_of(centers.dtype))
    tile = backward_tile(channels, small)
    images_per_part = cdiv(batch, CENTER_PARTS)
    parts = cdiv(batch, images_per_part)
    grad_centers = torch.empty(parts, clusters, channels, dtype=torch.float32, device=x.device)
    row_blocks = parts * cdiv(clusters, tile["ROWS"]) + batch * cdiv(tokens, tile["ROWS"])
    tokens_and_centers_backward_kernel[(row_blocks * cdiv(channels, tile["BLOCK_C"]),)](
        *(grad, x, centers, similarity, grad_similarity, inverse_norm, token_shifts, token_scales, cluster_biases),
        *(along, grad_x, grad_centers),
        *(1.0 / eps, batch, images_per_part, parts, tokens, clusters, padded, channels, iters),
        *(strides(grad, 2), strides(x, 2), centers.stride(0)),
        PRECISION_X=precision_of(x.dtype),
        PRECISION_CENTERS=precision_of(centers.dtype),
        maxnreg=backward_registers(x.dtype, grad.dtype, centers.dtype),
        **tile,
    )
    return grad_x, grad_centers.sum(0).to(centers.dtype)
