"""Bipartite soft matching in two launches: the best partner of every even token, then slots and groups of all tokens.

More than MAX_GROUPED tokens are grouped in a third one; keys are averaged over the heads as they are loaded, or before.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from ._launch import row_tile
from .merge_tokens import _group, group_slots

# Up to 8,192 tokens the keys stay in registers, 16 a thread; longer sequences read them again at every step.
MAX_KEYS = 4096
# Tokens that the one program of an image also groups, comparing each with each.
MAX_GROUPED = 640


@dataclasses.dataclass(frozen=True)
class MatchTile:
    """Even tokens, odd tokens and channels of one step of the similarity."""

    block_a: int
    block_b: int
    block_d: int
    num_warps: int
    num_stages: int


def match_tile(channels: int, dtype: torch.dtype, heads: int = 1) -> MatchTile:
    """Found by compiling: settings that never spill for sm_80 and sm_90, channels aligned or not."""
    block_d = max(triton.next_power_of_2(channels), 16)  # the least that tensor cores take
    if dtype == torch.float32:  # exact dots hold their operands in registers: 32 channels, 4 warps or 2 stages spill
        return MatchTile(block_a=64, block_b=64, block_d=16, num_warps=8, num_stages=1)
    if heads > 1:  # the even tokens of an image at 224 pixels in one tile, so that every key is read once
        return MatchTile(block_a=128, block_b=64, block_d=block_d, num_warps=8, num_stages=3)
    # 4 warps take up to 255 registers and spill in part; 8 take at most 128.
    return MatchTile(block_a=64, block_b=64, block_d=min(block_d, 64), num_warps=8, num_stages=3)


def averages_while_loading(tokens: int, channels: int, dtype: torch.dtype) -> bool:
    """Whether keys are averaged as the matching loads them, which saves a launch and the metric in memory.

    Half precision only: its tile of even tokens keeps all channels, while float32 would form every mean anew at each
    step. A tile of 128 even tokens reads each key once up to 256 tokens, and twice up to 640.
    """
    return dtype != torch.float32 and channels <= 128 and tokens <= MAX_GROUPED


@triton.jit
def _metric(pointers, mask, stride_h, HEADS: tl.constexpr):
    """Rows of the metric; of keys with several heads, the mean over these, rounded once to their dtype."""
    if HEADS == 1:
        rows = tl.load(pointers, mask=mask, other=0.0)
    else:
        total = tl.zeros(pointers.shape, tl.float32)
        for head in range(HEADS):
            total += tl.load(pointers + tl.cast(head, tl.int64) * stride_h, mask=mask, other=0.0).to(tl.float32)
        rows = tl.div_rn(total, tl.full(pointers.shape, HEADS, tl.float32)).to(pointers.dtype.element_ty)
    return rows


@triton.jit
def mean_keys_kernel(
    keys,  # (B, H, N, D)
    metric,  # (B, N, D), contiguous
    tokens,
    channels,
    stride_b,
    stride_h,
    stride_n,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: ROWS tokens, BLOCK_D channels."""
    batch = tl.program_id(2).to(tl.int64)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    offsets_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    mask = (row < tokens) & (offsets_d < channels)
    mean = _metric(keys + batch * stride_b + row * stride_n + offsets_d, mask, stride_h, HEADS)
    tl.store(metric + (batch * tokens + row) * channels + offsets_d, mean, mask=mask)


@triton.jit
def best_match_kernel(
    metric,  # (B, N, D), or keys (B, H, N, D) of which it is the mean
    best,  # (B, A) float32, -inf for prefix tokens
    destination,  # (B, A) int32
    tokens,
    channels,
    stride_b,
    stride_h,
    stride_n,
    PREFIX: tl.constexpr,
    HEADS: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program compares BLOCK_A even tokens with every odd one; similarities never leave the registers."""
    batch = tl.program_id(1).to(tl.int64)
    num_a, num_b = (tokens + 1) // 2, tokens // 2
    position_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    offsets_d = tl.arange(0, BLOCK_D)
    rows = metric + batch * stride_b
    in_a = (position_a < num_a)[:, None]
    pointers_a = rows + (2 * position_a).to(tl.int64)[:, None] * stride_n + offsets_d[None, :]
    squares_a = tl.zeros((BLOCK_A,), tl.float32)
    if ONE_CHUNK:
        a = _metric(pointers_a, in_a & (offsets_d < channels)[None, :], stride_h, HEADS)
        squares_a += tl.sum(a.to(tl.float32) * a.to(tl.float32), 1)
    else:
        for start_d in range(0, channels, BLOCK_D):
            in_d = (start_d + offsets_d < channels)[None, :]
            a_chunk = _metric(pointers_a + start_d, in_a & in_d, stride_h, HEADS)
            squares_a += tl.sum(a_chunk.to(tl.float32) * a_chunk.to(tl.float32), 1)
    inverse_a = tl.rsqrt(tl.maximum(squares_a, 1e-24))  # the reference clamps the norm at 1e-12

    best_a = tl.full((BLOCK_A,), float("-inf"), tl.float32)
    destination_a = tl.zeros((BLOCK_A,), tl.int32)
    for start_b in range(0, num_b, BLOCK_B):
        position_b = start_b + tl.arange(0, BLOCK_B)
        in_b = (position_b < num_b)[:, None]
        pointers_b = rows + (2 * position_b + 1).to(tl.int64)[:, None] * stride_n + offsets_d[None, :]
        dots = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
        squares_b = tl.zeros((BLOCK_B,), tl.float32)
        if ONE_CHUNK:
            b = _metric(pointers_b, in_b & (offsets_d < channels)[None, :], stride_h, HEADS)
            squares_b += tl.sum(b.to(tl.float32) * b.to(tl.float32), 1)
            dots = tl.dot(a, tl.trans(b), dots, input_precision="ieee")
        else:
            for start_d in range(0, channels, BLOCK_D):
                in_d = (start_d + offsets_d < channels)[None, :]
                a_chunk = _metric(pointers_a + start_d, in_a & in_d, stride_h, HEADS)
                b = _metric(pointers_b + start_d, in_b & in_d, stride_h, HEADS)
                squares_b += tl.sum(b.to(tl.float32) * b.to(tl.float32), 1)
                dots = tl.dot(a_chunk, tl.trans(b), dots, input_precision="ieee")
        inverse_b = tl.rsqrt(tl.maximum(squares_b, 1e-24))
        similarity = dots * inverse_b[None, :] * inverse_a[:, None]
        similarity = tl.where(similarity == similarity, similarity, -2.0)
        receives = (position_b >= PREFIX // 2) & (position_b < num_b)
        similarity = tl.where(receives[None, :], similarity, float("-inf"))
        tile_best, tile_argmax = tl.max(similarity, 1, return_indices=True, return_indices_tie_break_left=True)
        better = tile_best > best_a  # strict: the earlier tile wins ties
        best_a = tl.where(better, tile_best, best_a)
        destination_a = tl.where(better, start_b + tile_argmax, destination_a)

    best_a = tl.where(position_a < (PREFIX + 1) // 2, float("-inf"), best_a)
    tl.store(best + batch * num_a + position_a, best_a, mask=position_a < num_a)
    tl.store(destination + batch * num_a + position_a, destination_a, mask=position_a < num_a)


@triton.jit
def _load_keys(best, position, num_a):
    """Unsigned integers in the order of the floats; both zeros give one key."""
    value = tl.load(best + position, mask=position < num_a, other=float("-inf"))
    bits = tl.where(value == 0.0, 0.0, value).to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)


@triton.jit
def assign_slots_kernel(
    best,  # (B, A) float32
    destination,  # (B, A) int32
    slot,  # (B, N) int64, contiguous
    order,  # (B, N) int32 or None
    offsets,  # (B, N - r + 1) int32 or None
    tokens,
    r,
    PREFIX: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    SCAN_BLOCK: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One program an image. The r best of set A are a set, not a ranking: bit by bit, no sort."""
    batch = tl.program_id(0).to(tl.int64)
    num_a, num_b = (tokens + 1) // 2, tokens // 2
    best += batch * num_a
    destination += batch * num_a
    slot += batch * tokens
    block = tl.arange(0, BLOCK)
    if ONE_BLOCK:
        keys = _load_keys(best, block, num_a)

    threshold = tl.full((), 0, tl.uint32)  # the greatest value that r keys reach
    num_above = tl.full((), 0, tl.int32)  # keys beyond it: how many reached the last candidate that failed
    for step in range(32):
        candidate = threshold | (tl.full((), 0x80000000, tl.uint32) >> step)
        count = tl.full((), 0, tl.int32)
        if ONE_BLOCK:
            count += tl.sum((keys >= candidate).to(tl.int32), 0)
        else:
            for start in range(0, num_a, BLOCK):
                count += tl.sum((_load_keys(best, start + block, num_a) >= candidate).to(tl.int32), 0)
        enough = count >= r
        threshold = tl.where(enough, candidate, threshold)
        num_above = tl.where(enough, num_above, count)

    ties_to_merge = r - num_above
    above_before = tl.full((), 0, tl.int32)
    tied_before = tl.full((), 0, tl.int32)
    for start in range(0, num_a, SCAN_BLOCK):
        position = start + tl.arange(0, SCAN_BLOCK)
        scanned = _load_keys(best, position, num_a)
        above, tied = (scanned > threshold).to(tl.int32), (scanned == threshold).to(tl.int32)
        above_through = above_before + tl.cumsum(above, 0)
        tied_through = tied_before + tl.cumsum(tied, 0)
        above_before += tl.sum(above, 0)
        tied_before += tl.sum(tied, 0)
        merged = (above > 0) | ((tied > 0) & (tied_through <= ties_to_merge))
        merged_before = above_through + tl.minimum(tied_through, ties_to_merge)  # where not merged itself

        target = tl.load(destination + position, mask=position < num_a, other=0)
        stays = tl.where(position < (PREFIX + 1) // 2, 2 * position, position + PREFIX // 2 - merged_before)
        slot_a = tl.where(merged, tokens - r - num_b + target, stays)
        slot_b = tl.where(position < PREFIX // 2, 2 * position + 1, tokens - r - num_b + position)
        pair = tl.join(slot_a, slot_b).to(tl.int64)
        token = 2 * position[:, None] + tl.arange(0, 2)[None, :]
        tl.store(slot + token, pair, mask=token < tokens)
    if order is not None:
        tl.debug_barrier()  # other threads stored the slots
        order += batch * tokens
        offsets += batch * (tokens - r + 1)
        for start_i in range(0, tokens + 1, BLOCK_I):
            _group(slot, order, offsets, start_i, tokens, tokens - r, 1, BLOCK_I, BLOCK_J)


def mean_keys(keys: torch.Tensor) -> torch.Tensor:
    """One launch; keys (B, H, N, D) with contiguous channels -> (B, N, D), rounded once."""
    batch, heads, tokens, channels = keys.shape
    metric = torch.empty(batch, tokens, channels, dtype=keys.dtype, device=keys.device)
    if metric.numel():
        tile = row_tile(channels)
        rows = 1024 // tile.block_c  # 2,048 elements of float32 and of many heads spill
        grid = (triton.cdiv(tokens, rows), triton.cdiv(channels, tile.block_c), batch)
        mean_keys_kernel[grid](
            keys,
            metric,
            tokens,
            channels,
            *keys.stride()[:3],
            HEADS=heads,
            ROWS=rows,
            BLOCK_D=tile.block_c,
            num_warps=tile.num_warps,
        )
    return metric


def match_tokens(metric: torch.Tensor, r: int, prefix: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two launches to four; metric (B, N, D), or keys (B, H, N, D), with contiguous channels. Any N from 2, any D.

    Returns slot (B, N) int64, and the tokens grouped by it: order (B, N) and offsets (B, N - r + 1), int32.
    """
    batch, tokens, channels = metric.shape[0], *metric.shape[-2:]
    heads = metric.shape[1] if metric.ndim == 4 else 1
    num_a = (tokens + 1) // 2
    best = torch.empty(batch, num_a, dtype=torch.float32, device=metric.device)
    destination = torch.empty(batch, num_a, dtype=torch.int32, device=metric.device)
    slot = torch.empty(batch, tokens, dtype=torch.int64, device=metric.device)
    order, offsets = (
        torch.empty(batch, count, dtype=torch.int32, device=metric.device) for count in (tokens, tokens - r + 1)
    )
    if batch == 0:
        return slot, order, offsets
    if heads > 1 and not averages_while_loading(tokens, channels, metric.dtype):
        metric, heads = mean_keys(metric), 1
    tile = match_tile(channels, metric.dtype, heads)
    best_match_kernel[(triton.cdiv(num_a, tile.block_a), batch)](
        metric,
        best,
        destination,
        tokens,
        channels,
        metric.stride(0),
        metric.stride(1) if heads > 1 else 0,
        metric.stride(-2),
        PREFIX=prefix,
        HEADS=heads,
        ONE_CHUNK=channels <= tile.block_d,
        BLOCK_A=tile.block_a,
        BLOCK_B=tile.block_b,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    block = min(triton.next_power_of_2(num_a), MAX_KEYS)
    groups_too = tokens <= MAX_GROUPED
    num_warps = 4 if groups_too else min(max(1, block // 128), 8)  # grouping on one warp spills
    assign_slots_kernel[(batch,)](
        best,
        destination,
        slot,
        order if groups_too else None,
        offsets if groups_too else None,
        tokens,
        r,
        PREFIX=prefix,
        ONE_BLOCK=num_a <= block,
        BLOCK=block,
        SCAN_BLOCK=min(block, 32 * num_warps),  # one a thread: the scans and slots of more spill here and there
        BLOCK_I=32,
        BLOCK_J=32,
        num_warps=num_warps,
    )
    return (slot, order, offsets) if groups_too else (slot, *group_slots(slot, tokens - r))
