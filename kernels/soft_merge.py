"""Soft merging: a running softmax over the tokens beside the sums that it weights; backward in two launches.

Both passes read the tokens once for every BLOCK_K clusters, and the logits once for every BLOCK_C channels. The
backward pass reads the upstream gradient twice for every BLOCK_N tokens.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from ._direct import cdiv, direct
from ._launch import Tile, fitting, in_parts, row_tile, strides


@functools.cache
def forward_tile(clusters: int, channels: int, dtype: torch.dtype) -> Tile:
    """Choose the widest tiles that never spill on sm_80 and sm_90, because they read least.

    With half of DeiT's tokens as clusters, tokens in half precision are read once; a tile of 64 would read them twice.
    """
    if dtype == torch.float32:  # exact dots hold their operands in registers
        sizes = {"BLOCK_K": fitting(clusters, 64), "BLOCK_C": fitting(channels, 64)}
        return Tile(BLOCK_N=16, num_warps=8, num_stages=2, **sizes)
    widest = 128 if channels % 16 == 0 else 64  # without alignment every element needs a pointer of its own
    sizes = {"BLOCK_K": fitting(clusters, widest), "BLOCK_C": fitting(channels, widest)}
    return Tile(BLOCK_N=32, num_warps=8 if clusters > 32 else 4, num_stages=2, **sizes)


@functools.cache
def backward_tile(tokens: int, clusters: int, channels: int, dtype: torch.dtype, unit: int) -> Tile:
    """Choose tiles that never spill: wider steps would, and so would 128 tokens where ``unit`` is 1.

    A tile with twice the tokens reads the upstream gradient half as often.
    """
    if dtype == torch.float32:  # 2 stages spill under Triton 3.6
        sizes = {"BLOCK_K": fitting(clusters, 64), "BLOCK_C": fitting(channels, 64)}
        return Tile(BLOCK_N=64, STEP=16, num_warps=8, num_stages=3, **sizes)
    sizes = {"BLOCK_K": fitting(clusters, 128), "BLOCK_C": fitting(channels, 128)}
    if tokens > 64 and channels % 16 == 0 and unit > 1:
        return Tile(BLOCK_N=128, STEP=32, num_warps=16, num_stages=2, **sizes)
    return Tile(BLOCK_N=64, STEP=32, num_warps=8, num_stages=2, **sizes)


def logits_unit(logits: torch.Tensor) -> int:
    """Return the largest power of two, up to 8, that divides the number of clusters and the strides.

    The JIT by itself asks for 16, which few counts are multiples of.
    """
    return math.gcd(8, logits.shape[2], *logits.stride()[:2]) if logits.stride(2) == 1 else 1


@direct
@triton.jit
def soft_merge_kernel(
    logits,  # (B, N, K)
    x,  # (B, N, C)
    head,  # (B, P, C) or None
    out,  # (B, P + K, C), contiguous
    logsumexp,  # (B, K) float32, contiguous
    tokens,
    clusters,
    channels,
    num_head,
    logits_strides,
    x_strides,
    head_strides,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum all tokens into BLOCK_K clusters of BLOCK_C channels in each program, which first copies rows of the head.

    Grid (blocks of channels, blocks of clusters, images).
    """
    clusters = clusters // UNIT * UNIT
    logits_stride_b = logits_strides[0] // UNIT * UNIT
    logits_stride_n = logits_strides[1] // UNIT * UNIT
    batch = tl.program_id(2).to(tl.int64)
    offsets_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    offsets_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_c = offsets_c < channels
    in_k = offsets_k < clusters
    out += batch * (num_head + clusters) * channels
    if head is not None:
        for row in range(tl.program_id(1), num_head, tl.num_programs(1)):
            source = head + batch * head_strides[0] + tl.cast(row, tl.int64) * head_strides[1] + offsets_c
            value = tl.load(source, mask=in_c, other=0.0).to(tl.float32)
            tl.store(out + row * channels + offsets_c, value.to(out.dtype.element_ty), mask=in_c)

    x += batch * x_strides[0]
    logits += batch * logits_stride_b + offsets_k.to(tl.int64)[:, None] * logits_strides[2]
    running_max = tl.full((BLOCK_K,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_K,), tl.float32)
    acc = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for start in range(0, tokens, BLOCK_N):
        offsets_n = start + tl.arange(0, BLOCK_N)
        in_n = offsets_n < tokens
        rows = offsets_n.to(tl.int64)
        logit = tl.load(
            logits + rows[None, :] * logits_stride_n, mask=in_k[:, None] & in_n[None, :], other=float("-inf")
        ).to(tl.float32)
        token = tl.load(
            x + rows[:, None] * x_strides[1] + offsets_c[None, :], mask=in_n[:, None] & in_c[None, :], other=0.0
        )
        new_max = tl.maximum(running_max, tl.max(logit, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # -inf - -inf is NaN
        weight = tl.exp(logit - shift[:, None])
        shrink = tl.exp(running_max - shift)
        running_max = new_max
        running_sum = running_sum * shrink + tl.sum(weight, 1)
        operand = out.dtype.element_ty
        acc = tl.dot(weight.to(operand), token.to(operand), acc * shrink[:, None], input_precision="ieee")

    running_sum = tl.where(in_k, running_sum, 1.0)
    merged = (acc / running_sum[:, None]).to(out.dtype.element_ty)
    targets = (num_head + offsets_k).to(tl.int64)[:, None] * channels + offsets_c[None, :]
    tl.store(out + targets, merged, mask=in_k[:, None] & in_c[None, :])
    if tl.program_id(0) == 0:
        tl.store(logsumexp + batch * clusters + offsets_k, running_max + tl.log(running_sum), mask=in_k)


@direct
@triton.jit
def row_delta_kernel(
    grad,  # (B, P + K, C)
    out,  # (B, P + K, C), contiguous
    delta,  # (B, K) float32, contiguous
    clusters,
    channels,
    num_head,
    grad_strides,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Store ``out . grad`` of ROWS clusters, the weighted mean of ``x . grad``; grid (blocks of clusters, images)."""
    batch = tl.program_id(1).to(tl.int64)
    offsets_k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_k = offsets_k < clusters
    rows = (num_head + offsets_k).to(tl.int64)[:, None]
    offsets_c = tl.arange(0, BLOCK_C)
    upstream_rows = grad + batch * grad_strides[0] + rows * grad_strides[1] + offsets_c[None, :]
    merged_rows = out + (batch * (num_head + clusters) + rows) * channels + offsets_c[None, :]
    value = tl.zeros((ROWS,), tl.float32)
    for start in range(0, channels, BLOCK_C):
        mask = in_k[:, None] & (start + offsets_c < channels)[None, :]
        upstream = tl.load(upstream_rows + start, mask=mask, other=0.0).to(tl.float32)
        merged = tl.load(merged_rows + start, mask=mask, other=0.0).to(tl.float32)
        value += tl.sum(upstream * merged, 1)
    tl.store(delta + batch * clusters + offsets_k, value, mask=in_k)


@triton.jit
def _grad_logits(
    grad,
    logits,
    x,
    logsumexp,
    delta,
    grad_logits,
    tokens,
    clusters,
    channels,
    grad_stride_n,
    logits_stride_n,
    logits_stride_k,
    x_stride_n,
    block_n,
    block_k,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEP: tl.constexpr,
):
    """Store a tile of the logits' gradient, ``weight * (x . grad - delta)``."""
    offsets_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets_k = block_k * BLOCK_K + tl.arange(0, BLOCK_K)
    in_n = offsets_n < tokens
    in_k = offsets_k < clusters
    rows_n = offsets_n.to(tl.int64)
    rows_k = offsets_k.to(tl.int64)
    dots = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, channels, STEP):
        offsets_c = start + tl.arange(0, STEP)
        in_c = offsets_c < channels
        upstream = tl.load(
            grad + rows_k[:, None] * grad_stride_n + offsets_c[None, :], mask=in_k[:, None] & in_c[None, :], other=0.0
        )
        token = tl.load(
            x + rows_n[:, None] * x_stride_n + offsets_c[None, :], mask=in_n[:, None] & in_c[None, :], other=0.0
        )
        dots = tl.dot(token.to(upstream.dtype), tl.trans(upstream), dots, input_precision="ieee")
    mask = in_n[:, None] & in_k[None, :]
    sources = rows_n[:, None] * logits_stride_n + rows_k[None, :] * logits_stride_k
    logit = tl.load(logits + sources, mask=mask, other=float("-inf")).to(tl.float32)
    lse = tl.load(logsumexp + offsets_k, mask=in_k, other=0.0)
    mean = tl.load(delta + offsets_k, mask=in_k, other=0.0)
    value = tl.exp(logit - lse[None, :]) * (dots - mean[None, :])
    targets = rows_n[:, None] * clusters + rows_k[None, :]
    tl.store(grad_logits + targets, value.to(grad_logits.dtype.element_ty), mask=mask)


@triton.jit
def _grad_x(
    grad,
    logits,
    logsumexp,
    grad_x,
    tokens,
    clusters,
    channels,
    grad_stride_n,
    logits_stride_n,
    logits_stride_k,
    block_n,
    block_c,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEP: tl.constexpr,
):
    """Store a tile of the tokens' gradient, ``weight @ grad``, with weights recomputed from the logits."""
    offsets_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets_c = block_c * BLOCK_C + tl.arange(0, BLOCK_C)
    in_n = offsets_n < tokens
    in_c = offsets_c < channels
    rows_n = offsets_n.to(tl.int64)
    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, clusters, STEP):
        offsets_k = start + tl.arange(0, STEP)
        in_k = offsets_k < clusters
        rows_k = offsets_k.to(tl.int64)
        sources = rows_n[:, None] * logits_stride_n + rows_k[None, :] * logits_stride_k
        logit = tl.load(logits + sources, mask=in_n[:, None] & in_k[None, :], other=float("-inf")).to(tl.float32)
        lse = tl.load(logsumexp + offsets_k, mask=in_k, other=0.0)
        weight = tl.exp(logit - lse[None, :])
        upstream = tl.load(
            grad + rows_k[:, None] * grad_stride_n + offsets_c[None, :], mask=in_k[:, None] & in_c[None, :], other=0.0
        )
        # Weights are scaled by a power of two and back, as float16 loses bits of weights below 6e-5.
        acc = tl.dot((weight * 32768.0).to(upstream.dtype), upstream, acc, input_precision="ieee")
    acc *= 1.0 / 32768.0
    targets = rows_n[:, None] * channels + offsets_c[None, :]
    tl.store(grad_x + targets, acc.to(grad_x.dtype.element_ty), mask=in_n[:, None] & in_c[None, :])


@direct
@triton.jit
def soft_merge_backward_kernel(
    grad,  # (B, P + K, C)
    logits,  # (B, N, K)
    x,  # (B, N, C)
    logsumexp,  # (B, K) float32, contiguous
    delta,  # (B, K) float32, contiguous
    grad_logits,  # (B, N, K), contiguous
    grad_x,  # (B, N, C), contiguous
    tokens,
    clusters,
    channels,
    num_head,
    grad_strides,
    logits_strides,
    x_strides,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEP: tl.constexpr,
):
    """Compute a tile of grad_logits or of grad_x in each program; grid (both in turn, blocks of tokens, images)."""
    clusters = clusters // UNIT * UNIT
    tl.assume(clusters > 0)  # loops that cannot be skipped let the products of tensor cores overlap
    tl.assume(channels > 0)
    logits_stride_b = logits_strides[0] // UNIT * UNIT
    logits_stride_n = logits_strides[1] // UNIT * UNIT
    program = tl.program_id(0)
    block_n = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    grad += batch * grad_strides[0] + tl.cast(num_head, tl.int64) * grad_strides[1]
    logits += batch * logits_stride_b
    logsumexp += batch * clusters
    delta += batch * clusters
    blocks_k = tl.cdiv(clusters, BLOCK_K)
    if program < blocks_k:
        _grad_logits(
            *(grad, logits, x + batch * x_strides[0], logsumexp, delta, grad_logits + batch * tokens * clusters),
            *(tokens, clusters, channels, grad_strides[1], logits_stride_n, logits_strides[2], x_strides[1], block_n),
            *(program, BLOCK_N, BLOCK_K, STEP),
        )
    else:
        _grad_x(
            *(grad, logits, logsumexp, grad_x + batch * tokens * channels, tokens, clusters, channels),
            *(grad_strides[1], logits_stride_n, logits_strides[2], block_n, program - blocks_k, BLOCK_N, BLOCK_C),
            STEP,
        )


@in_parts("logits", "x", "head")
def soft_merge(logits: torch.Tensor, x: torch.Tensor, head: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch; logits (B, N, K), x (B, N, C), head (B, P, C), dense channels -> out (B, P + K, C), logsumexp (B, K)."""
    batch, tokens, channels = x.shape
    clusters = logits.shape[2]
    num_head = 0 if head is None else head.shape[1]
    dtype = x.dtype if head is None else torch.promote_types(x.dtype, head.dtype)
    out = torch.empty(batch, num_head + clusters, channels, dtype=dtype, device=x.device)
    logsumexp = torch.empty(batch, clusters, dtype=torch.float32, device=x.device)
    if batch == 0 or out.numel() + logsumexp.numel() == 0:
        return out, logsumexp
    tile = forward_tile(clusters, channels, dtype)
    # Channels vary fastest, so that programs that share logits run together. At least one program copies the head.
    grid = (max(cdiv(channels, tile["BLOCK_C"]), 1), max(cdiv(clusters, tile["BLOCK_K"]), 1), batch)
    soft_merge_kernel[grid](
        *(logits, x, head, out, logsumexp),
        *(tokens, clusters, channels, num_head),
        *(strides(logits, 3), strides(x, 2), strides(head, 2)),
        UNIT=logits_unit(logits),
        **tile,
    )
    return out, logsumexp


@in_parts("grad", "logits", "x", "out", "logsumexp")
def soft_merge_backward(
    grad: torch.Tensor, logits: torch.Tensor, x: torch.Tensor, out: torch.Tensor, logsumexp: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch twice; grad, out (B, P + K, C) with contiguous channels -> gradients of logits (B, N, K), x (B, N, C)."""
    batch, tokens, channels = x.shape
    clusters = logits.shape[2]
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=x.device)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if batch * clusters * channels == 0:
        return grad_logits.zero_(), grad_x.zero_()
    delta = torch.empty_like(logsumexp)
    unit = logits_unit(logits)
    tile = backward_tile(tokens, clusters, channels, out.dtype, unit)
    block_c = row_tile(channels)["BLOCK_C"]
    rows = 1024 // block_c  # 2,048 elements of each of two operands would spill without alignment
    row_delta_kernel[(cdiv(clusters, rows), batch)](
        *(grad, out, delta),
        *(clusters, channels),
        out.shape[1] - clusters,
        strides(grad, 2),
        ROWS=rows,
        BLOCK_C=block_c,
        num_warps=4,
    )
    programs = cdiv(clusters, tile["BLOCK_K"]) + cdiv(channels, tile["BLOCK_C"])
    soft_merge_backward_kernel[(programs, cdiv(tokens, tile["BLOCK_N"]), batch)](
        *(grad, logits, x, logsumexp, delta, grad_logits, grad_x),
        *(tokens, clusters, channels),
        out.shape[1] - clusters,
        *(strides(grad, 2), strides(logits, 3), strides(x, 2)),
        UNIT=unit,
        **tile,
    )
    return grad_logits, grad_x
