"""Indices of the best scores, best first: by one sort of packed keys, or by counted ranks for long rows."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ._direct import cdiv, direct, next_power_of_2
from ._launch import Tile, in_parts, strides
from ._order import packed_keys

# Triton 3.9: a sort of 8,192 spills on sm_90, and compiles about twice as long as one of 4,096.
MAX_SORT = 4096
# 16 pairs a thread take 72 registers; with more, wider rows spilled a few words.
RANK_TILE = Tile(BLOCK_I=32, BLOCK_J=64, num_warps=4)


@functools.cache
def sort_tile(tokens: int) -> Tile:
    """Return a tile of four keys a thread, which takes at most 64 registers.

    With four times as many, the longest sorts take half a minute to compile.
    """
    block = max(32, next_power_of_2(tokens))
    return Tile(BLOCK=block, num_warps=max(1, block // 128))


@direct
@triton.jit
def sort_scores_kernel(
    scores,  # (B, N)
    out,  # (B, K) int64, contiguous
    tokens,
    keep,
    scores_strides,
    BLOCK: tl.constexpr,
):
    """Sort the scores of one image in each program; grid (images,)."""
    batch = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    row = scores + batch * scores_strides[0] + offsets.to(tl.int64) * scores_strides[1]
    keys = tl.sort(packed_keys(row, offsets, offsets < tokens), descending=True)
    tl.store(out + batch * keep + offsets, 0x7FFFFFFF - (keys & 0xFFFFFFFF), mask=offsets < keep)


@direct
@triton.jit
def rank_scores_kernel(
    scores,  # (B, N)
    out,  # (B, K) int64, contiguous
    tokens,
    keep,
    scores_strides,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Rank BLOCK_I tokens by counting the better ones, in each program; grid (blocks of tokens, images)."""
    batch = tl.program_id(1).to(tl.int64)
    base = scores + batch * scores_strides[0]
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    keys_i = packed_keys(base + i.to(tl.int64) * scores_strides[1], i, i < tokens)
    before = tl.zeros((BLOCK_I, BLOCK_J), tl.int32)
    for start in range(0, tokens, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        keys_j = packed_keys(base + j.to(tl.int64) * scores_strides[1], j, j < tokens)
        before += (keys_j[None, :] > keys_i[:, None]).to(tl.int32)
    rank = tl.sum(before, 1)
    tl.store(out + batch * keep + rank, i.to(tl.int64), mask=(i < tokens) & (rank < keep))


@in_parts("scores")
def select_topk(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Launch once; scores (B, N) of any strides -> indices (B, k) int64."""
    batch, tokens = scores.shape
    out = torch.empty(batch, k, dtype=torch.int64, device=scores.device)
    if out.numel() == 0:
        return out
    if tokens <= MAX_SORT:
        sort_scores_kernel[(batch,)](scores, out, tokens, k, strides(scores, 2), **sort_tile(tokens))
    else:
        grid = (cdiv(tokens, RANK_TILE["BLOCK_I"]), batch)
        rank_scores_kernel[grid](scores, out, tokens, k, strides(scores, 2), **RANK_TILE)
    return out
