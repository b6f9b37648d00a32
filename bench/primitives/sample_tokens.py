"""Tokens sampled along their cumulated scores (ATS)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.primitives import Inputs, Outputs, Primitive, Shape, nbytes, randn
from fastreduce import ops


def _make(shape: Shape, generator: torch.Generator) -> Inputs:
    """Make the scores in float32, as class attention comes."""
    scores = randn(generator, torch.float32, shape.batch, shape.patches).softmax(dim=1)
    return {"scores": scores, "budget": shape.kept}


def _distances(scores: Tensor, budget: int) -> Tensor:
    """Return (B, budget, N): the distance from every sampling point to every token's cumulated score."""
    cumulated = (scores / (scores.sum(dim=1, keepdim=True) + 1e-6)).cumsum(dim=1)
    grid = (2 * torch.arange(budget, device=scores.device) + 1).to(scores.dtype) / (2 * (budget + 1))
    return (grid[None, :, None] - cumulated[:, None, :]).abs()


def _plain(inputs: Inputs) -> Outputs:
    """Take all distances, and loop over images, as each keeps another number of tokens: that waits for the device."""
    budget = inputs["budget"]
    nearest = _distances(inputs["scores"], budget).min(dim=2).indices
    chosen = [row.unique() for row in nearest]
    index = torch.stack([F.pad(row, (0, budget - len(row)), value=-1) for row in chosen])
    return index.clamp_min(0), F.pad(index >= 0, (1, 0), value=True)


def _floor(inputs: Inputs, outputs: Outputs) -> int:
    return nbytes(inputs["scores"], *outputs)


def _compare(inputs: Inputs, outputs: Outputs, exact: Outputs) -> str | None:
    """Let a sampling point take any token that 32 roundings of a cumulated score could make its nearest."""
    scores, (index, valid) = inputs["scores"], outputs
    columns = torch.arange(valid.shape[1], device=valid.device)
    if not torch.equal(valid, columns < valid.sum(dim=1, keepdim=True)) or not valid[:, 0].all():
        return "valid is not the class token, then tokens, then padding"
    present = valid[:, 1:]
    if not torch.equal(index, index.clamp(0, scores.shape[1] - 1) * present):
        return "an index is no token's, or padding is not 0"
    if not ((index.diff(dim=1) > 0) | ~present[:, 1:]).all():
        return "the tokens are not ascending"
    taken = torch.zeros_like(scores).scatter_add(1, index, present.to(scores.dtype)) > 0
    distances = _distances(scores.double(), inputs["budget"])
    near = distances <= distances.amin(dim=2, keepdim=True) + 32 * torch.finfo(scores.dtype).eps
    missing = ~(near & taken.unsqueeze(1)).any(dim=2)
    needless = taken & ~near.any(dim=1)
    if missing.any() or needless.any():
        missed = f"sampling points that missed their token: {int(missing.sum())}"
        return f"{missed}; tokens that are no one's: {int(needless.sum())}"
    return None


SAMPLE_TOKENS = Primitive(
    "sample_tokens",
    make=_make,
    call=ops.sample_tokens,
    plain=_plain,
    floor=_floor,
    compare=_compare,
)
