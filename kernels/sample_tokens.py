"""Sampled tokens in one launch: cumulate the scores, search every sampling point, pack the tokens that were hit."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ._direct import direct
from ._launch import Tile, fitting, strides

# Sums are of integers, so their order does not matter. A scan of floats can fall by a rounding, which would give tokens
# of weight 0 a cdf of their own. The unit is 2^-61, as the total is at most a little over 1.
WEIGHT_ONE = tl.constexpr(2.0**61)
WEIGHT_STEP = tl.constexpr(2.0**-61)
SMALLEST = tl.constexpr(2.0**-126)


@functools.cache
def sample_tile(tokens: int, budget: int) -> Tile:
    """Return a tile of tokens and sampling points, two for each thread, since searches wait for memory.

    512 is the most: 1,024 spilled on sm_80 (Triton 3.9).
    """
    block_n, block_k = fitting(tokens, 512, least=32), fitting(budget, 512, least=32)
    # With one stage no load moves before a barrier.
    tile = Tile(BLOCK_N=block_n, BLOCK_K=block_k, num_warps=max(1, max(block_n, block_k) // 64), num_stages=1)
    # With more tokens the assembler would spill a few words on sm_90, to fit one more program on a multiprocessor.
    return Tile(tile, maxnreg=64) if tokens > 4096 else tile


@triton.jit
def _scores(row, offsets, tokens, stride):
    """Load scores as float32; negative, NaN and infinite ones become 0."""
    score = tl.load(row + offsets.to(tl.int64) * stride, mask=offsets < tokens, other=0.0).to(tl.float32)
    return tl.where((score > 0.0) & (score < float("inf")), score, 0.0)


@direct
@triton.jit
def sample_tokens_kernel(
    scores,  # (B, N)
    cdf,  # (B, N) float32, contiguous: scratch
    kept,  # (B, N) int8, contiguous: scratch
    index,  # (B, K) int64, contiguous
    valid,  # (B, prefix + K) bool, contiguous
    tokens,
    budget,
    parts,
    prefix,
    scores_strides,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCORE_ONE: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
):
    """Sample one image in each program; grid (images,). A phase loads results of the phase before, behind a barrier."""
    batch = tl.program_id(0).to(tl.int64)
    scores += batch * scores_strides[0]
    cdf += batch * tokens
    kept += batch * tokens
    index += batch * budget
    valid += batch * (prefix + budget)

    highest = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, tokens, BLOCK_N):
        highest = tl.maximum(highest, _scores(scores, start + tl.arange(0, BLOCK_N), tokens, scores_strides[1]))
    # The power of two below the highest score: division by it is exact and leaves scores up to 2.
    exponent = tl.max(highest, 0).to(tl.int32, bitcast=True) & 0x7F800000
    unit = tl.maximum(exponent.to(tl.float32, bitcast=True), SMALLEST)
    partial = tl.zeros((BLOCK_N,), tl.int64)
    for start in range(0, tokens, BLOCK_N):
        score = _scores(scores, start + tl.arange(0, BLOCK_N), tokens, scores_strides[1])
        partial += (tl.div_rn(score, unit) * SCORE_ONE).to(tl.int64)
    total = tl.sum(partial, 0).to(tl.float32) * (1.0 / SCORE_ONE) * unit + 1e-6
    reached = tl.zeros((), tl.int64)
    for start in range(0, tokens, BLOCK_N):
        offsets_n = start + tl.arange(0, BLOCK_N)
        weight = tl.div_rn(_scores(scores, offsets_n, tokens, scores_strides[1]), total)
        share = (weight * WEIGHT_ONE).to(tl.int64)
        value = (reached + tl.cumsum(share, 0)).to(tl.float32) * WEIGHT_STEP
        reached += tl.sum(share, 0)
        tl.store(cdf + offsets_n, value, mask=offsets_n < tokens)
        tl.store(kept + offsets_n, tl.zeros((BLOCK_N,), tl.int8), mask=offsets_n < tokens)
    tl.debug_barrier()

    for start in range(0, budget, BLOCK_K):
        offsets_k = start + tl.arange(0, BLOCK_K)
        point = tl.div_rn((2 * offsets_k + 1).to(tl.float32), tl.cast(2 * parts, tl.float32))
        above = tl.zeros((BLOCK_K,), tl.int32)  # place of the first token whose cdf reaches the point
        end = above + tokens
        for _ in range(SEARCH_STEPS):
            middle = (above + end) // 2
            searching = above < end
            short = tl.load(cdf + middle, mask=searching, other=0.0) < point
            above = tl.where(searching & short, middle + 1, above)
            end = tl.where(searching & ~short, middle, end)
        lower = tl.abs(point - tl.load(cdf + above - 1, mask=above > 0, other=float("inf")))
        upper = tl.abs(point - tl.load(cdf + above, mask=above < tokens, other=float("inf")))
        distance = tl.minimum(lower, upper)
        # The first token at the least distance: cdfs below the nearest one can round to it.
        nearest = tl.zeros((BLOCK_K,), tl.int32)
        end = tl.minimum(above, tokens - 1)
        for _ in range(SEARCH_STEPS):
            middle = (nearest + end) // 2
            searching = nearest < end
            far = tl.abs(point - tl.load(cdf + middle, mask=searching, other=0.0)) > distance
            nearest = tl.where(searching & far, middle + 1, nearest)
            end = tl.where(searching & ~far, middle, end)
        tl.store(kept + nearest, tl.full((BLOCK_K,), 1, tl.int8), mask=offsets_k < budget)
    tl.debug_barrier()

    count = tl.zeros((), tl.int32)
    for start in range(0, tokens, BLOCK_N):
        offsets_n = start + tl.arange(0, BLOCK_N)
        hit = tl.load(kept + offsets_n, mask=offsets_n < tokens, other=0).to(tl.int32)
        place = count + tl.cumsum(hit, 0) - 1
        tl.store(index + place, offsets_n.to(tl.int64), mask=hit != 0)
        count += tl.sum(hit, 0)
    for start in range(0, budget, BLOCK_K):
        offsets_k = start + tl.arange(0, BLOCK_K)
        tl.store(index + offsets_k, tl.zeros((BLOCK_K,), tl.int64), mask=(offsets_k >= count) & (offsets_k < budget))
    for start in range(0, prefix + budget, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        tl.store(valid + column, column < prefix + count, mask=column < prefix + budget)


def sample_tokens(
    scores: torch.Tensor, budget: int, prefix: int, parts: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch once; scores (B, N) of any strides -> index (B, budget) int64, valid (B, prefix + budget) bool.

    The points are (2 i + 1) / (2 parts) for i < budget; None stands for budget + 1 parts.
    """
    batch, tokens = scores.shape
    index = torch.empty(batch, budget, dtype=torch.int64, device=scores.device)
    valid = torch.empty(batch, prefix + budget, dtype=torch.bool, device=scores.device)
    if batch == 0:
        return index, valid
    sample_tokens_kernel[(batch,)](
        *(scores, torch.empty(batch, tokens, dtype=torch.float32, device=scores.device)),
        *(torch.empty(batch, tokens, dtype=torch.int8, device=scores.device), index, valid),
        *(tokens, budget, budget + 1 if parts is None else parts, prefix),
        strides(scores, 2),
        SCORE_ONE=2.0 ** (61 - tokens.bit_length()),
        SEARCH_STEPS=tokens.bit_length(),
        **sample_tile(tokens, budget),
    )
    return index, valid
