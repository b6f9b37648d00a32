"""Bipartite soft matching on the keys, averaged over the heads (ToMe)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bench.primitives import Inputs, Outputs, Primitive, Shape, nbytes, packed_qkv
from fastreduce import ops
from fastreduce.arguments import counted


def _make(shape: Shape, generator: torch.Generator) -> Inputs:
    """Merge a quarter of the patches: with half of them every even token would merge, and nothing be chosen."""
    return {"metric": packed_qkv(shape, generator)[1], "r": shape.patches // 4}


def _similarity(metric: Tensor) -> Tensor:
    """Return (B, A, B): the similarity of every even token to every odd one; the class token is like none."""
    unit = metric / metric.norm(dim=-1, keepdim=True)
    similarity = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    similarity[:, 0] = -torch.inf
    return similarity


def _plain(inputs: Inputs) -> Outputs:
    """Build the matrix of similarities, sort the best ones, and return the slots that the merged order means."""
    metric, r = inputs["metric"].mean(1), inputs["r"]
    best, partner = _similarity(metric).max(dim=-1)
    order = best.argsort(dim=1, descending=True)
    merged, stays = order[:, :r], order[:, r:].sort(dim=1).values
    first_odd = stays.shape[1]
    rank = torch.arange(metric.shape[1] - r, device=metric.device).expand(len(metric), -1)
    slot = torch.empty(metric.shape[:2], dtype=torch.int64, device=metric.device)
    joined = torch.empty_like(order).scatter(1, merged, first_odd + partner.gather(1, merged))
    slot[:, ::2] = joined.scatter(1, stays, rank[:, :first_odd])
    slot[:, 1::2] = rank[:, first_odd:]
    return (slot,)


def _floor(inputs: Inputs, outputs: Outputs) -> int:
    """Leave the class token out: it is of even position, and neither looks for a partner nor is one."""
    return nbytes(inputs["metric"][..., 1:, :], *outputs)


def _tiled(inputs: Inputs) -> int:
    """Count the odd tokens once a tile of even tokens, the tile once, or at every step if chunked, and the slots.

    Of all heads, where later steps read the mean that the first one kept; or of a mean that is written before.
    """
    from fastreduce.kernels.match_tokens import averages_while_loading, match_tile

    keys = inputs["metric"]
    batch, heads, tokens, channels = keys.shape
    even, odd = keys[..., 2::2, :], keys[..., 1::2, :]
    searching = even.shape[-2]
    together = averages_while_loading(searching, channels, keys.dtype, heads)
    tile = match_tile(searching, channels, keys.dtype, heads if together else 1)
    sweeps = math.ceil(searching / tile["BLOCK_A"])
    again = math.ceil(odd.shape[-2] / tile["BLOCK_B"]) - 1 if channels > tile["BLOCK_D"] else 0
    slots = batch * tokens * torch.int64.itemsize
    if together:
        return sweeps * nbytes(odd) + nbytes(even) + (1 + again) * nbytes(even[:, 0]) * (again > 0) + slots
    return nbytes(keys, keys[:, 0]) + sweeps * nbytes(odd[:, 0]) + (1 + again) * nbytes(even[:, 0]) + slots


def _compare(inputs: Inputs, outputs: Outputs, exact: Outputs) -> str | None:
    """Let partners, and the choice of who merges, differ where similarities lie within two roundings of 1."""
    metric, r, (slot,) = inputs["metric"].mean(1).double(), inputs["r"], outputs
    even, odd = slot[:, ::2], slot[:, 1::2]
    first_odd = even.shape[1] - r
    if not torch.equal(odd, first_odd + torch.arange(odd.shape[1], device=slot.device).expand_as(odd)):
        return "odd tokens are not in their own slots"
    merged = even >= first_odd
    if not (merged.sum(dim=1) == r).all() or even.max() >= first_odd + odd.shape[1]:
        return f"in an image not {counted(r, 'even token')} merged with an odd one"
    if not torch.equal(even[~merged], ((~merged).cumsum(dim=1) - 1)[~merged]):
        return "even tokens that stay are not in their order"
    similarity = _similarity(metric)
    best = similarity.amax(dim=2)
    chosen = similarity.gather(2, (even - first_odd).clamp_min(0).unsqueeze(-1)).squeeze(-1)
    slack = 2 * torch.finfo(inputs["metric"].dtype).eps
    worse = merged & ~(chosen >= best - slack)
    lowest, highest = best.where(merged, torch.inf).amin(dim=1), best.where(~merged, -torch.inf).amax(dim=1)
    if worse.any() or not (lowest >= highest - slack).all():
        return f"{int(worse.sum())} partners are not the best; {int((lowest < highest - slack).sum())} choices neither"
    return None


def _call(**arguments: Any) -> Outputs:
    return (ops.match_tokens(**arguments),)


MATCH_TOKENS = Primitive(
    "match_tokens", make=_make, call=_call, plain=_plain, floor=_floor, tiled=_tiled, compare=_compare
)
