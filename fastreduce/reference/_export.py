"""Replacements of PyTorch's operators in an ONNX graph, which has no stable sort, no search and no safe scatter.

Outside such a graph every function is the operator itself. In the graph it is made of operators that every runtime has
and that give ties to the lower index. A scatter that adds is silently wrong in some runtimes: a product with a matrix
of zeros and ones replaces it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "cdist",
    "first_of_slots",
    "for_onnx",
    "greatest_of_slots",
    "hypot",
    "lowest_first",
    "marks",
    "nearest_in_row",
    "number_below",
    "sums_of_rows",
    "sums_of_slots",
]


def for_onnx() -> bool:
    """Return whether ``torch.onnx.export`` is capturing the graph.

    Raises:
        ValueError: the exporter that traces (``dynamo=False``), which has no stable sort, search or safe scatter.
    """
    if torch.compiler.is_exporting():
        return torch.onnx.is_in_onnx_export()
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        raise ValueError(
            "torch.onnx.export(dynamo=False) has no operators for this method: use dynamo=True, or "
            "fastreduce.deploy.export"
        )
    return False


def lowest_first(values: Tensor, k: int) -> Tensor:
    """Return the places (B, k) of the k lowest values (B, N), ascending; ties go to the lower place, NaN is last."""
    if not for_onnx():
        return torch.sort(values, dim=1, stable=True)[1][:, :k]
    if values.is_floating_point():
        values = torch.where(values.isnan(), torch.inf, values)
    # ONNX gives ties to the lower place, which torch.topk, run eagerly, does not.
    return values.topk(k, dim=1, largest=False)[1]


def number_below(ascending: Tensor, values: Tensor) -> Tensor:
    """Count the entries of ascending (B, N) below each of values (B, K) -> (B, K), as ``searchsorted`` does."""
    if not for_onnx():
        return torch.searchsorted(ascending, values)
    return (ascending.unsqueeze(1) < values.unsqueeze(2)).sum(2)


def nearest_in_row(row: Tensor, values: Tensor) -> Tensor:
    """Compute ``argmin_n |values[b, i] - row[b, n]|``, the lowest n on ties: row (B, N), values (B, K) -> (B, K)."""
    return (values.unsqueeze(2) - row.unsqueeze(1)).abs().argmin(2)


def _members(slot: Tensor, num_out: int) -> Tensor:
    """Return whether token n is in slot m: slot (B, N) -> (B, num_out, N) bool."""
    return slot.unsqueeze(1) == torch.arange(num_out, dtype=slot.dtype, device=slot.device).unsqueeze(1)


def marks(index: Tensor, count: int) -> Tensor:
    """Mark the given places: index (B, K) -> (B, count) bool."""
    if not for_onnx() and not torch.jit.is_tracing():  # ONNX cannot scatter truth values
        return index.new_zeros(index.shape[0], count, dtype=torch.bool).scatter_(1, index, True)
    return _members(index, count).any(2)


def sums_of_slots(x: Tensor, weights: Tensor | None, slot: Tensor, num_out: int) -> tuple[Tensor, Tensor]:
    """Sum ``weights[n] * x[n]`` and ``weights[n]`` over the tokens of each slot -> (B, num_out, C), (B, num_out).

    x (B, N, C), weights (B, N) or None for ones, slot (B, N) with -1 for none. For an ONNX graph only.
    """
    share = _members(slot, num_out).to(x.dtype)
    if weights is not None:
        share = share * weights.unsqueeze(1)
    return share @ x, share.sum(2)


def sums_of_rows(rows: Tensor, slot: Tensor, num_out: int) -> Tensor:
    """Sum rows (1 or B, H, N, D) over the tokens of each slot (B, N), -1 for none -> (B, H, num_out, D)."""
    if for_onnx():
        return _members(slot, num_out).to(rows.dtype).unsqueeze(1) @ rows
    rows = rows.expand(slot.shape[0], -1, -1, -1)
    sums = rows.new_zeros(*rows.shape[:2], num_out + 1, rows.shape[3])  # a row more, for what is in no slot
    return sums.scatter_add(2, (slot + 1)[:, None, :, None].expand_as(rows), rows)[:, :, 1:]


def hypot(first: Tensor, second: Tensor) -> Tensor:
    """Return the square root of ``first**2 + second**2``."""
    return (first.square() + second.square()).sqrt() if for_onnx() else torch.hypot(first, second)


def greatest_of_slots(values: Tensor, slot: Tensor, num_out: int, least: float) -> Tensor:
    """Return the greatest of values (B, N) in each slot, ``least`` or more -> (B, num_out)."""
    if not for_onnx():
        start = values.new_full((values.shape[0], num_out), least)
        return start.scatter_reduce(1, slot.clamp_min(0), values, "amax")
    return torch.where(_members(slot, num_out), values.unsqueeze(1), least).amax(2).clamp_min(least)


def first_of_slots(slot: Tensor, num_out: int) -> Tensor:
    """Return the first token of each slot, N for an empty slot: slot (B, N) -> (B, num_out)."""
    batch, tokens = slot.shape
    place = torch.arange(tokens, device=slot.device).expand(batch, tokens)
    if not for_onnx():
        return place.new_full((batch, num_out), tokens).scatter_reduce(1, slot, place, "amin")
    return torch.where(_members(slot, num_out), place.unsqueeze(1), tokens).amin(2)


def cdist(rows: Tensor, columns: Tensor) -> Tensor:
    """Return Euclidean distances, as torch rounds them for more than 25 tokens: (B, M, C), (B, N, C) -> (B, M, N)."""
    if not for_onnx():
        return torch.cdist(rows, columns)
    of_rows, of_columns = (x.square().sum(2, keepdim=True) for x in (rows, columns))
    ones = torch.ones_like(of_rows), torch.ones_like(of_columns)
    left = torch.cat([rows * -2, of_rows, ones[0]], dim=2)
    right = torch.cat([columns, ones[1], of_columns], dim=2)
    return (left @ right.mT).clamp_min(0.0).sqrt()
