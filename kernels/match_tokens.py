"""Bipartite soft matching in two launches: the best partner of every even token, then slots and groups of all tokens.

More than MAX_GROUPED tokens are grouped in a third launch. Keys are averaged over heads as they are loaded, or, if the
even tokens take more than MAX_SWEEPS tiles, in a launch before.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ._direct import cdiv, direct
from ._distances import squared_lengths
from ._launch import Tile, fitting, in_parts, row_tile, strides
from ._order import unsigned_bits
from ._rows import padded_head_dim, steps, unit_of
from .slots import group, group_slots

# Up to 512 tokens the keys stay in registers, each compared with 16 candidates; more are read again in every round.
MAX_KEYS = 256
# Most tokens that the program of an image also groups, comparing each with each.
MAX_GROUPED = 640
# Most tiles of even tokens for which keys are averaged as the matching loads them. Each tile reads all heads of the odd
# tokens. Two tiles request at most 1.2 times the bytes of a separate pass, 1.3 times in float32. Three request up to
# half as many again (counted, 3 to 16 heads).
MAX_SWEEPS = 2
# Most heads of float32 that are averaged as they are loaded; loops over more spill at some shapes.
MAX_HEADS_FLOAT32 = 16


@functools.cache
def match_tile(searching: int, channels: int, dtype: torch.dtype, heads: int = 1, *, aligned: bool = True) -> Tile:
    """Choose settings, found by compiling, that never spill for sm_80 and sm_90; several heads need aligned rows.

    ``searching`` is the number of even tokens that look for a partner. At 224 pixels one tile holds them, so every key
    is read once. More are in tiles of 256, so few tiles read the odd tokens.
    """
    one_tile = searching <= 128
    block_d = padded_head_dim(channels)
    if dtype == torch.float32:  # exact dots hold their operands in registers: with 32 channels they spill
        if heads > 1:
            if one_tile:
                return Tile(BLOCK_A=128, BLOCK_B=128, BLOCK_D=16, num_warps=8, num_stages=1)
            # 8 warps and 64 odd tokens spill with some numbers of heads.
            return Tile(BLOCK_A=256, BLOCK_B=32, BLOCK_D=16, num_warps=16, num_stages=1)
        # The smaller tile is held to 128 registers, too few for an address of every element.
        return Tile(BLOCK_A=64 if aligned else 128, BLOCK_B=64, BLOCK_D=16, num_warps=8, num_stages=1)
    if heads > 1:
        block_b = 64 if one_tile or block_d <= 64 else 32
        block_a = 128 if one_tile else 256
        return Tile(BLOCK_A=block_a, BLOCK_B=block_b, BLOCK_D=block_d, num_warps=8, num_stages=3)
    # 4 warps take up to 255 registers and spill in part; 8 take at most 128.
    return Tile(BLOCK_A=64, BLOCK_B=64, BLOCK_D=min(block_d, 64), num_warps=8, num_stages=3)


def averages_while_loading(
    searching: int, channels: int, dtype: torch.dtype, heads: int, *, aligned: bool = True
) -> bool:
    """Return whether keys are averaged as the matching loads them, which saves a launch and the metric in memory.

    In half precision a tile holds all channels, which are at most 128. In float32 the means of even tokens are kept in
    memory for the next steps. Rows that are not aligned need an address for every element, which would spill.
    """
    tile = match_tile(searching, channels, dtype, heads)
    fits = heads <= MAX_HEADS_FLOAT32 if dtype == torch.float32 else channels <= 128
    return heads > 1 and aligned and fits and cdiv(searching, tile["BLOCK_A"]) <= MAX_SWEEPS


@triton.jit
def _metric(pointers, mask, stride_h, HEADS: tl.constexpr, UNIT: tl.constexpr):
    """Return rows of the metric: the mean of the keys over the heads, rounded once to their dtype."""
    if HEADS == 1:
        rows = tl.load(pointers, mask=mask, other=0.0)
    else:
        total = tl.zeros(pointers.shape, tl.float32)
        for head in range(HEADS):
            offset = tl.multiple_of(tl.cast(head, tl.int64) * stride_h, UNIT)
            total += tl.load(pointers + offset, mask=mask, other=0.0).to(tl.float32)
        rows = tl.div_rn(total, tl.full(pointers.shape, HEADS, tl.float32)).to(pointers.dtype.element_ty)
    return rows


@triton.jit
def _metric_once(pointers, kept, mask, first, stride_h, HEADS: tl.constexpr, UNIT: tl.constexpr):
    """Return rows of the metric that are needed at every step: averaged and stored at the first step, then read."""
    if first:
        rows = _metric(pointers, mask, stride_h, HEADS, UNIT)
        tl.store(kept, rows, mask=mask)
    else:
        rows = tl.load(kept, mask=mask, other=0.0)
    return rows


@direct
@triton.jit
def mean_keys_kernel(
    keys,  # (B, H, N, D)
    metric,  # (B, N, D), contiguous
    tokens,
    channels,
    keys_strides,
    HEADS: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Average BLOCK_D channels of ROWS tokens over heads in each program; grid (token, channel blocks, images)."""
    batch = tl.program_id(2).to(tl.int64)
    channels = channels // UNIT * UNIT
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offsets_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    mask = (row < tokens)[:, None] & (offsets_d < channels)
    first_head = keys + tl.multiple_of(batch * keys_strides[0], UNIT)
    mean = _metric(first_head + steps(row, keys_strides[2], UNIT) + offsets_d, mask, keys_strides[1], HEADS, UNIT)
    tl.store(metric + steps(batch * tokens + row, channels, UNIT) + offsets_d, mean, mask=mask)


@direct
@triton.jit
def best_match_kernel(
    keys,  # (B, H, N, D): their mean over the heads is the metric
    kept,  # (B, A, D), contiguous, or None: means of even tokens, for later steps
    squares,  # (B, N) float32, contiguous, or None: squared lengths of the metric
    best,  # (B, A) float32, not written for prefix tokens
    destination,  # (B, A) int32, not written for prefix tokens
    tokens,
    channels,
    keys_strides,
    PREFIX: tl.constexpr,
    HEADS: tl.constexpr,
    UNIT: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Find the best partner of BLOCK_A even tokens in each program; grid (blocks of even tokens, images).

    Similarities stay in registers. Where channels come in chunks, the loop sums squares only if heads are averaged:
    then the dot does not read the loads themselves, see ``_distances``.
    """
    batch = tl.program_id(1).to(tl.int64)
    num_a, num_b = (tokens + 1) // 2, tokens // 2
    channels = channels // UNIT * UNIT
    position_a = (PREFIX + 1) // 2 + tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    offsets_d = tl.arange(0, BLOCK_D)
    first_head = keys + tl.multiple_of(batch * keys_strides[0], UNIT)
    in_a = (position_a < num_a)[:, None]
    pointers_a = first_head + steps(2 * position_a, keys_strides[2], UNIT) + offsets_d[None, :]
    if ONE_CHUNK:
        a = _metric(pointers_a, in_a & (offsets_d < channels)[None, :], keys_strides[1], HEADS, UNIT)
        squares_a = tl.sum(a.to(tl.float32) * a.to(tl.float32), 1)
    if squares is not None:
        squares += batch * tokens
        squares_a = tl.load(squares + 2 * position_a, mask=position_a < num_a, other=0.0)
    if kept is not None:
        kept_a = kept + steps(batch * num_a + position_a, channels, UNIT) + offsets_d[None, :]

    best_a = tl.full((BLOCK_A,), float("-inf"), tl.float32)
    destination_a = tl.zeros((BLOCK_A,), tl.int32)
    for start_b in range(PREFIX // 2, num_b, BLOCK_B):
        position_b = start_b + tl.arange(0, BLOCK_B)
        in_b = (position_b < num_b)[:, None]
        pointers_b = first_head + steps(2 * position_b + 1, keys_strides[2], UNIT) + offsets_d[None, :]
        dots = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
        squares_b = tl.zeros((BLOCK_B,), tl.float32)
        if ONE_CHUNK:
            b = _metric(pointers_b, in_b & (offsets_d < channels)[None, :], keys_strides[1], HEADS, UNIT)
            squares_b += tl.sum(b.to(tl.float32) * b.to(tl.float32), 1)
            dots = tl.dot(a, tl.trans(b), dots, input_precision="ieee")
        elif squares is not None:
            squares_b += tl.load(squares + 2 * position_b + 1, mask=position_b < num_b, other=0.0)
            for start_d in range(0, channels, BLOCK_D):
                in_d = (start_d + offsets_d < channels)[None, :]
                a_chunk = tl.load(pointers_a + start_d, mask=in_a & in_d, other=0.0)
                b = tl.load(pointers_b + start_d, mask=in_b & in_d, other=0.0)
                dots = tl.dot(a_chunk, tl.trans(b), dots, input_precision="ieee")
        else:
            squares_a = tl.zeros((BLOCK_A,), tl.float32)  # summed again at every step, which saves a pass
            for start_d in range(0, channels, BLOCK_D):
                in_d = (start_d + offsets_d < channels)[None, :]
                if kept is None:
                    a_chunk = _metric(pointers_a + start_d, in_a & in_d, keys_strides[1], HEADS, UNIT)
                else:
                    first = start_b == PREFIX // 2
                    a_chunk = _metric_once(
                        pointers_a + start_d, kept_a + start_d, in_a & in_d, first, keys_strides[1], HEADS, UNIT
                    )
                squares_a += tl.sum(a_chunk.to(tl.float32) * a_chunk.to(tl.float32), 1)
                b = _metric(pointers_b + start_d, in_b & in_d, keys_strides[1], HEADS, UNIT)
                squares_b += tl.sum(b.to(tl.float32) * b.to(tl.float32), 1)
                dots = tl.dot(a_chunk, tl.trans(b), dots, input_precision="ieee")
            if kept is not None:
                tl.debug_barrier()  # other threads may have stored what this one reads back
        inverse_a = tl.rsqrt(tl.maximum(squares_a, 1e-24))  # the reference clamps the norm at 1e-12
        inverse_b = tl.rsqrt(tl.maximum(squares_b, 1e-24))
        similarity = dots * inverse_b[None, :] * inverse_a[:, None]
        similarity = tl.where(similarity == similarity, similarity, -2.0)
        similarity = tl.where((position_b < num_b)[None, :], similarity, float("-inf"))
        tile_best, tile_argmax = tl.max(similarity, 1, return_indices=True, return_indices_tie_break_left=True)
        better = tile_best > best_a  # strict: the earlier tile wins ties
        best_a = tl.where(better, tile_best, best_a)
        destination_a = tl.where(better, start_b + tile_argmax, destination_a)

    tl.store(best + batch * num_a + position_a, best_a, mask=position_a < num_a)
    tl.store(destination + batch * num_a + position_a, destination_a, mask=position_a < num_a)


@triton.jit
def _load_keys(best, position, num_a, PREFIX: tl.constexpr):
    """Load the best similarities as unsigned integers of the same order; prefix tokens have the least."""
    searching = (position >= (PREFIX + 1) // 2) & (position < num_a)
    value = tl.load(best + position, mask=searching, other=float("-inf"))
    return unsigned_bits(value)


@direct
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
    """Assign the slots of one image in each program; grid (images,).

    The r best of set A need no order, so their least key is found four bits at a time, without a sort.
    """
    batch = tl.program_id(0).to(tl.int64)
    num_a, num_b = (tokens + 1) // 2, tokens // 2
    best += batch * num_a
    destination += batch * num_a
    slot += batch * tokens
    block = tl.arange(0, BLOCK)
    if ONE_BLOCK:
        keys = _load_keys(best, block, num_a, PREFIX)

    # The greatest value that r keys reach, found in rounds of four bits, whose candidates are counted together.
    threshold = tl.full((), 0, tl.uint32)
    digit = tl.arange(0, 16)
    for step in range(8):
        shift = 28 - 4 * step
        candidates = threshold | (digit.to(tl.uint32) << shift)
        if ONE_BLOCK:
            reached = (keys[:, None] >= candidates[None, :]).to(tl.int32)
        else:
            reached = tl.zeros((BLOCK, 16), tl.int32)
            for start in range(0, num_a, BLOCK):
                keys_n = _load_keys(best, start + block, num_a, PREFIX)
                reached += (keys_n[:, None] >= candidates[None, :]).to(tl.int32)
        enough = (digit > 0) & (tl.sum(reached, 0) >= r)
        threshold = threshold | (tl.sum(enough.to(tl.int32), 0).to(tl.uint32) << shift)

    if ONE_BLOCK:
        beyond = (keys > threshold).to(tl.int32)
    else:
        beyond = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, num_a, BLOCK):
            beyond += (_load_keys(best, start + block, num_a, PREFIX) > threshold).to(tl.int32)
    ties_to_merge = r - tl.sum(beyond, 0)
    counted = tl.full((), 0, tl.int64)  # keys above the threshold before this block, and keys at it in the lower half
    for start in range(0, num_a, SCAN_BLOCK):
        position = start + tl.arange(0, SCAN_BLOCK)
        scanned = _load_keys(best, position, num_a, PREFIX)
        above, tied = scanned > threshold, scanned == threshold
        both = (above.to(tl.int64) << 32) | tied.to(tl.int64)
        through = counted + tl.cumsum(both, 0)
        if num_a > SCAN_BLOCK:
            counted += tl.sum(both, 0)
        above_through, tied_through = (through >> 32).to(tl.int32), (through & 0xFFFFFFFF).to(tl.int32)
        merged = above | (tied & (tied_through <= ties_to_merge))
        merged_before = above_through + tl.minimum(tied_through, ties_to_merge)  # used where it is not merged itself

        searching = (position >= (PREFIX + 1) // 2) & (position < num_a)
        target = tl.load(destination + position, mask=searching, other=0)
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
            group(slot, order, offsets, start_i, tokens, tokens - r, 1, BLOCK_I, BLOCK_J)


def mean_keys(keys: torch.Tensor) -> torch.Tensor:
    """Launch once; keys (B, H, N, D) with contiguous channels -> (B, N, D), rounded once."""
    batch, heads, tokens, channels = keys.shape
    metric = torch.empty(batch, tokens, channels, dtype=keys.dtype, device=keys.device)
    if metric.numel():
        block_d = row_tile(channels)["BLOCK_C"]
        rows = 1024 // block_d  # 2,048 elements spill in float32, and with many heads
        grid = (cdiv(tokens, rows), cdiv(channels, block_d), batch)
        mean_keys_kernel[grid](
            keys,
            metric,
            tokens,
            channels,
            strides(keys, 3),
            HEADS=heads,
            UNIT=unit_of(keys),
            ROWS=rows,
            BLOCK_D=block_d,
            num_warps=4,
        )
    return metric


def best_matches(keys: torch.Tensor, prefix: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch one to three times; keys (B, H, N, D) -> similarity (B, A) float32, place (B, A) int32 among odd tokens.

    A is the number of even tokens; entries of prefix tokens are not written.
    """
    batch, heads, tokens, channels = keys.shape
    num_a, num_b = (tokens + 1) // 2, tokens // 2
    best = torch.empty(batch, num_a, dtype=torch.float32, device=keys.device)
    destination = torch.empty(batch, num_a, dtype=torch.int32, device=keys.device)
    searching = num_a - (prefix + 1) // 2
    if searching <= 0:
        return best, destination
    if heads > 1 and not averages_while_loading(searching, channels, keys.dtype, heads, aligned=unit_of(keys) > 1):
        keys, heads = mean_keys(keys).unsqueeze(1), 1
    unit = unit_of(keys)
    tile = match_tile(searching, channels, keys.dtype, heads, aligned=unit > 1)
    one_chunk, one_step = channels <= tile["BLOCK_D"], num_b - prefix // 2 <= tile["BLOCK_B"]
    keeps = heads > 1 and not one_chunk and not one_step
    squares = squared_lengths(keys.squeeze(1)) if heads == 1 and not one_chunk else None
    best_match_kernel[(cdiv(searching, tile["BLOCK_A"]), batch)](
        keys,
        *(keys.new_empty(batch, num_a, channels) if keeps else None, squares, best, destination),
        *(tokens, channels),
        strides(keys, 3),
        PREFIX=prefix,
        HEADS=heads,
        UNIT=unit,
        ONE_CHUNK=one_chunk,
        **tile,
    )
    return best, destination


@in_parts("metric")
def match_tokens(metric: torch.Tensor, r: int, prefix: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch twice to five times; metric (B, N, D), or keys (B, H, N, D), with contiguous channels.

    N is 2 or more, D anything.
    Returns slot (B, N) int64, and the tokens grouped by it: order (B, N) and offsets (B, N - r + 1), int32.
    """
    batch, tokens = metric.shape[0], metric.shape[-2]
    num_a = (tokens + 1) // 2
    slot = torch.empty(batch, tokens, dtype=torch.int64, device=metric.device)
    order, offsets = (
        torch.empty(batch, count, dtype=torch.int32, device=metric.device) for count in (tokens, tokens - r + 1)
    )
    if batch == 0:
        return slot, order, offsets
    best, destination = best_matches(metric if metric.ndim == 4 else metric.unsqueeze(1), prefix)
    block = fitting(num_a, MAX_KEYS, least=32)
    groups_too = tokens <= MAX_GROUPED
    num_warps = 8
    assign_slots_kernel[(batch,)](
        *(best, destination, slot, order if groups_too else None, offsets if groups_too else None),
        *(tokens, r),
        PREFIX=prefix,
        ONE_BLOCK=num_a <= block,
        BLOCK=block,
        SCAN_BLOCK=min(block, 32 * num_warps),  # one for each thread: more spill at some shapes
        BLOCK_I=256,  # tokens grouped at a time: few sums over warps, which cost barriers
        BLOCK_J=8,
        num_warps=num_warps,
    )
    return (slot, order, offsets) if groups_too else (slot, *group_slots(slot, tokens - r))
