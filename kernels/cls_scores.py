"""Attention of the class token averaged over heads. K is read once; partial softmaxes are joined in a second launch.

With values, the attention is multiplied by their lengths and summed over heads. Each value is read once with its key.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ._direct import cdiv, direct, next_power_of_2
from ._launch import Tile, in_parts, strides
from ._rows import LOWEST, head_of, head_rows, steps, unit_of

ELEMENTS = 4096  # elements of K in a program: four 16-byte loads of half precision in flight for each thread


@functools.cache
def head_tile(heads: int, parts: int, streams: int = 1) -> Tile:
    """Return a tile of 2,048 elements a program; heads lie within a thread or a warp, keys across lanes.

    Lengths are a second stream, and halve the keys: otherwise a few words spill on sm_80 with 4 heads.
    """
    block_h = next_power_of_2(heads)
    block_n = max(32, 2048 // streams // block_h)
    return Tile(BLOCK_H=block_h, BLOCK_N=block_n, BLOCK_P=min(block_n, next_power_of_2(parts)), num_warps=4)


@direct
@triton.jit
def class_logits_kernel(
    q,  # (B, H, D)
    k,  # (B, H, N, D)
    value,  # (B, H, N, D) or None
    valid,  # (B, N) bool or None
    offsets,  # (B + 1,) int32 or None; with offsets k and value are (1, H, T, D), and N is the most keys of an image
    logits,  # (B, H, N) float32, contiguous
    lengths,  # (B, H, N) float32, contiguous, or None without value
    softmaxes,  # (B, H, P, 2) float32, contiguous: the maximum and the sum of each part
    scale,
    heads,
    tokens,
    parts,
    q_strides,
    k_strides,
    value_strides,
    valid_strides,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute logits of BLOCK_N keys of one head, their maximum and sum of exponentials; grid (heads, P, images)."""
    head = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    offsets_n = part * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets_d = tl.arange(0, BLOCK_D)
    in_n = offsets_n < tokens
    in_d = offsets_d < D
    seen = in_n
    if valid is not None:
        rows = valid + batch * valid_strides[0] + offsets_n.to(tl.int64) * valid_strides[1]
        seen = in_n & (tl.load(rows, mask=in_n, other=0) != 0)
    first = offsets_n.to(tl.int64)
    if offsets is not None:
        begin = tl.load(offsets + batch)
        seen = in_n & (offsets_n < tl.load(offsets + batch + 1) - begin)
        first += begin
    query_row = head_of(q, batch, head, q_strides, UNIT) + offsets_d
    query = tl.load(query_row, mask=in_d, other=0.0).to(tl.float32)
    keys = head_of(k, batch, head, k_strides, UNIT)
    keys = keys + steps(first, k_strides[2], UNIT) + offsets_d[None, :]
    key = tl.load(keys, mask=seen[:, None] & in_d[None, :], other=0.0).to(tl.float32)
    logit = tl.sum(key * query[None, :], 1) * scale
    row = batch * heads + head
    if (valid is not None) or (offsets is not None):
        logit = tl.where(seen, logit, float("-inf"))
    tl.store(logits + row * tokens + offsets_n, logit, mask=in_n)
    if value is not None:
        values = head_of(value, batch, head, value_strides, UNIT)
        values = values + steps(first, value_strides[2], UNIT) + offsets_d[None, :]
        vector = tl.load(values, mask=seen[:, None] & in_d[None, :], other=0.0).to(tl.float32)
        tl.store(lengths + row * tokens + offsets_n, tl.sqrt_rn(tl.sum(vector * vector, 1)), mask=in_n)
    logit = tl.where(in_n, logit, float("-inf"))
    maximum = tl.maximum(tl.max(logit, 0), LOWEST)
    own = softmaxes + (row * parts + part) * 2
    tl.store(own, maximum)
    tl.store(own + 1, tl.sum(tl.exp(logit - maximum), 0))


@direct
@triton.jit
def head_mean_kernel(
    logits,  # (B, H, N) float32, contiguous
    lengths,  # (B, H, N) float32, contiguous, or None
    softmaxes,  # (B, H, P, 2) float32, contiguous: the maximum and the sum of each part
    scores,  # (B, N - PREFIX) float32, contiguous
    logsumexp,  # (B, H) float32, contiguous
    heads,
    tokens,
    parts,
    PREFIX: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Join the partial softmaxes, and score BLOCK_N keys over all heads, in each program; grid (key blocks, images)."""
    batch = tl.program_id(1).to(tl.int64)
    offsets_h = tl.arange(0, BLOCK_H)
    in_h = offsets_h < heads
    rows = batch * heads + offsets_h
    running_max = tl.full((BLOCK_H,), LOWEST, tl.float32)
    running_sum = tl.zeros((BLOCK_H,), tl.float32)
    for start in range(0, parts, BLOCK_P):
        offsets_p = start + tl.arange(0, BLOCK_P)
        mask = in_h[:, None] & (offsets_p < parts)[None, :]
        sources = softmaxes + (rows[:, None] * parts + offsets_p[None, :]) * 2
        maximum = tl.load(sources, mask=mask, other=LOWEST)
        total = tl.load(sources + 1, mask=mask, other=0.0)
        new_max = tl.maximum(running_max, tl.max(maximum, 1))
        running_sum = running_sum * tl.exp(running_max - new_max)
        running_sum += tl.sum(total * tl.exp(maximum - new_max[:, None]), 1)
        running_max = new_max
    lse = running_max + tl.log(tl.where(in_h, running_sum, 1.0))
    if tl.program_id(0) == 0:
        tl.store(logsumexp + rows, lse, mask=in_h)
    offsets_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = offsets_n < tokens - PREFIX
    sources = rows[:, None] * tokens + PREFIX + offsets_n[None, :]
    logit = tl.load(logits + sources, mask=in_h[:, None] & in_n[None, :], other=float("-inf"))
    attention = tl.exp(logit - lse[:, None])
    if lengths is None:
        score = tl.sum(attention, 0) / heads
    else:
        length = tl.load(lengths + sources, mask=in_h[:, None] & in_n[None, :], other=0.0)
        score = tl.sum(attention * length, 0)
    tl.store(scores + batch * (tokens - PREFIX) + offsets_n, score, mask=in_n)


@direct
@triton.jit(do_not_specialize=["tokens"])  # specialised to a multiple of 16 it spills a few words
def class_logits_backward_kernel(
    grad,  # (B, N - PREFIX)
    q,  # (B, H, D)
    k,  # (B, H, N, D)
    logits,  # (B, H, N) float32, contiguous
    logsumexp,  # (B, H) float32, contiguous
    grad_q,  # (B, H, D), contiguous
    grad_k,  # (B, N, H, D), contiguous
    scale,
    heads,
    tokens,
    grad_strides,
    q_strides,
    k_strides,
    PREFIX: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Differentiate one head of one image in each program; grid (heads, images).

    A first loop takes the mean of the upstream gradient under the attention, a second one reads K.
    """
    head = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    row = batch * heads + head
    lse = tl.load(logsumexp + row)
    upstream = grad + batch * grad_strides[0]
    weighted = tl.zeros((BLOCK_S,), tl.float32)
    for start in range(0, tokens, BLOCK_S):
        offsets_n = start + tl.arange(0, BLOCK_S)
        in_n = offsets_n < tokens
        attention = tl.exp(tl.load(logits + row * tokens + offsets_n, mask=in_n, other=float("-inf")) - lse)
        patches = (offsets_n - PREFIX).to(tl.int64)
        slope = tl.load(upstream + patches * grad_strides[1], mask=in_n & (offsets_n >= PREFIX), other=0.0)
        weighted += attention * slope.to(tl.float32)
    mean = tl.sum(weighted, 0)

    offsets_d = tl.arange(0, BLOCK_D)
    in_d = offsets_d < D
    query_row = head_of(q, batch, head, q_strides, UNIT) + offsets_d
    query = tl.load(query_row, mask=in_d, other=0.0).to(tl.float32)
    keys = head_of(k, batch, head, k_strides, UNIT) + offsets_d[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, tokens, BLOCK_N):
        offsets_n = start + tl.arange(0, BLOCK_N)
        in_n = offsets_n < tokens
        mask = in_n[:, None] & in_d[None, :]
        attention = tl.exp(tl.load(logits + row * tokens + offsets_n, mask=in_n, other=float("-inf")) - lse)
        patches = (offsets_n - PREFIX).to(tl.int64)
        slope = tl.load(upstream + patches * grad_strides[1], mask=in_n & (offsets_n >= PREFIX), other=0.0)
        grad_logit = attention * (slope.to(tl.float32) - mean) * (scale / heads)
        key = tl.load(keys + steps(offsets_n, k_strides[2], UNIT), mask=mask, other=0.0).to(tl.float32)
        acc += grad_logit[:, None] * key
        target = ((batch * tokens + offsets_n[:, None]) * heads + head) * D + offsets_d[None, :]
        tl.store(grad_k + target, (grad_logit[:, None] * query[None, :]).to(grad_k.dtype.element_ty), mask=mask)
    tl.store(grad_q + row * D + offsets_d, tl.sum(acc, 0).to(grad_q.dtype.element_ty), mask=in_d)


def _key_strides(tensor: torch.Tensor | None, offsets: torch.Tensor | None) -> tuple[int, ...]:
    """Return the strides over images, heads and tokens; 0 over packed images, which lie in one row."""
    return strides(tensor, 3) if offsets is None else (0, *strides(tensor, 3)[1:])


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    value: torch.Tensor | None,
    valid: torch.Tensor | None,
    prefix: int,
    scale: float,
    offsets: torch.Tensor | None = None,
    longest: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, head_dim = q.shape
    tokens = k.shape[2] if offsets is None else longest
    tile = head_rows(head_dim, ELEMENTS)
    parts = cdiv(tokens, tile["BLOCK_N"])
    scores = torch.empty(batch, tokens - prefix, dtype=torch.float32, device=k.device)
    logits = torch.empty(batch, heads, tokens, dtype=torch.float32, device=k.device)
    logsumexp = torch.empty(batch, heads, dtype=torch.float32, device=k.device)
    if batch == 0:
        return scores, logits, logsumexp
    lengths = None if value is None else torch.empty_like(logits)
    softmaxes = torch.empty(batch, heads, parts, 2, dtype=torch.float32, device=k.device)
    # Heads vary fastest, so that in a packed qkv neighbouring programs read neighbouring memory.
    class_logits_kernel[(heads, parts, batch)](
        *(q, k, value, valid, offsets, logits, lengths, softmaxes),
        *(scale, heads, tokens, parts),
        *(strides(q, 2), _key_strides(k, offsets), _key_strides(value, offsets), strides(valid, 2)),
        D=head_dim,
        UNIT=unit_of(q, k) if value is None else unit_of(q, k, value),
        **tile,
    )
    tile = head_tile(heads, parts, streams=1 if value is None else 2)
    head_mean_kernel[(max(1, cdiv(tokens - prefix, tile["BLOCK_N"])), batch)](
        logits, lengths, softmaxes, scores, logsumexp, heads, tokens, parts, PREFIX=prefix, **tile
    )
    return scores, logits, logsumexp


@in_parts("q", "k", "valid")
def cls_scores(
    q: torch.Tensor, k: torch.Tensor, prefix: int, scale: float, valid: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch twice; q (B, H, D), k (B, H, N, D), dense last axes -> scores (B, N - prefix), logits, logsumexp."""
    return _forward(q, k, None, valid, prefix, scale)


@in_parts("q", "k", "value", "valid")
def cls_value_scores(
    q: torch.Tensor, k: torch.Tensor, value: torch.Tensor, valid: torch.Tensor | None, prefix: int, scale: float
) -> torch.Tensor:
    """Launch twice; q (B, H, D), k and value (B, H, N, D), dense last axes -> scores (B, N - prefix)."""
    return _forward(q, k, value, valid, prefix, scale)[0]


@in_parts("q", bounds="offsets")
def cls_value_scores_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    longest: int,
    prefix: int,
    scale: float,
) -> torch.Tensor:
    """Launch twice; q (B, H, D), k and value (1, H, T, D), dense last axes -> scores (B, longest - prefix)."""
    return _forward(q, k, value, None, prefix, scale, offsets, longest)[0]


@in_parts("grad", "q", "k", "logits", "logsumexp")
def cls_scores_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    logits: torch.Tensor,
    logsumexp: torch.Tensor,
    prefix: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch once; grad (B, N - prefix) of any strides -> gradients of q (B, H, D) and of k (B, H, N, D)."""
    batch, heads, tokens, head_dim = k.shape
    grad_q = torch.empty(batch, heads, head_dim, dtype=q.dtype, device=q.device)
    grad_k = torch.empty(batch, tokens, heads, head_dim, dtype=k.dtype, device=k.device)
    if batch:
        class_logits_backward_kernel[(heads, batch)](
            *(grad, q, k, logits, logsumexp, grad_q, grad_k),
            *(scale, heads, tokens),
            *(strides(grad, 2), strides(q, 2), strides(k, 3)),
            PREFIX=prefix,
            D=head_dim,
            UNIT=unit_of(q, k),
            BLOCK_S=min(512, next_power_of_2(tokens)),
            **head_rows(head_dim, ELEMENTS),
        )
    return grad_q, grad_k.transpose(1, 2)
