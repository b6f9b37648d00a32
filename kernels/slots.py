"""Tokens grouped by slot, with a stable counting sort."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._direct import cdiv, direct
from ._launch import in_parts, strides


@triton.jit
def group(slot, order, offsets, start_i, tokens, num_out, slot_stride_n, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """Store BLOCK_I tokens of one image at their ranks, and BLOCK_I offsets, by comparing with all its tokens."""
    i = start_i + tl.arange(0, BLOCK_I)
    in_i = i < tokens
    slot_i = tl.load(slot + i * slot_stride_n, mask=in_i, other=0).to(tl.int32)
    before = tl.zeros((BLOCK_I, BLOCK_J), tl.int32)
    below = tl.zeros((BLOCK_I, BLOCK_J), tl.int32)
    for start in range(0, tokens, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        in_j = j < tokens
        slot_j = tl.load(slot + j * slot_stride_n, mask=in_j, other=0x7FFFFFFF).to(tl.int32)  # above every slot
        smaller = slot_j[None, :] < slot_i[:, None]
        tied = (slot_j[None, :] == slot_i[:, None]) & (j[None, :] < i[:, None])
        before += (smaller | tied).to(tl.int32)
        below += (slot_j[None, :] < i[:, None]).to(tl.int32)
    tl.store(order + tl.sum(before, 1), i, mask=in_i)
    tl.store(offsets + i, tl.sum(below, 1), mask=i <= num_out)


@direct
@triton.jit
def group_slots_kernel(
    slot,  # (B, N), -1 for tokens that belong nowhere
    order,  # (B, N) int32
    offsets,  # (B, M + 1) int32
    tokens,
    num_out,
    slot_strides,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Rank BLOCK_I tokens of one image in each program; grid (blocks of tokens or slots, images)."""
    batch = tl.program_id(1).to(tl.int64)
    slot += batch * slot_strides[0]
    order += batch * tokens
    offsets += batch * (num_out + 1)
    group(slot, order, offsets, tl.program_id(0) * BLOCK_I, tokens, num_out, slot_strides[1], BLOCK_I, BLOCK_J)


@in_parts("slot")
def group_slots(slot: torch.Tensor, num_out: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch once; slot (B, N) -> order (B, N) and offsets (B, num_out + 1), both int32."""
    batch, tokens = slot.shape
    order = torch.empty(batch, tokens, dtype=torch.int32, device=slot.device)
    offsets = torch.empty(batch, num_out + 1, dtype=torch.int32, device=slot.device)
    if batch:
        grid = (cdiv(max(tokens, num_out + 1), 32), batch)
        group_slots_kernel[grid](
            slot, order, offsets, tokens, num_out, strides(slot, 2), BLOCK_I=32, BLOCK_J=64, num_warps=4
        )
    return order, offsets
