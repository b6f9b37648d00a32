"""The indices of the best half of the scores (Top-K), and of all of them (EViT)."""

from __future__ import annotations

import math
from typing import Any

import torch

from bench.primitives import Inputs, Outputs, Primitive, Shape, nbytes, randn
from fastreduce import ops


def _make(shape: Shape, generator: torch.Generator) -> Inputs:
    """Make the scores in float32, as class attention comes."""
    return {"scores": randn(generator, torch.float32, shape.batch, shape.patches).softmax(dim=1), "k": shape.kept}


def _make_all(shape: Shape, generator: torch.Generator) -> Inputs:
    return {**_make(shape, generator), "k": shape.patches}


def _plain(inputs: Inputs) -> Outputs:
    return (inputs["scores"].topk(inputs["k"], dim=1).indices,)


def _plain_all(inputs: Inputs) -> Outputs:
    return (inputs["scores"].argsort(dim=1, descending=True),)


def _floor(inputs: Inputs, outputs: Outputs) -> int:
    return nbytes(inputs["scores"], *outputs)


def _tiled(inputs: Inputs) -> int:
    """Count (1 + ceil(N / BLOCK_I)) * N scores where ranks are counted, N where one program sorts, and k indices."""
    from fastreduce.kernels.select_topk import MAX_SORT, RANK_TILE

    batch, tokens = inputs["scores"].shape
    sweeps = 1 if tokens <= MAX_SORT else 1 + math.ceil(tokens / RANK_TILE["BLOCK_I"])
    return sweeps * nbytes(inputs["scores"]) + batch * inputs["k"] * torch.int64.itemsize


def _compare(inputs: Inputs, outputs: Outputs, exact: Outputs) -> str | None:
    """Let equal scores change places: torch's topk and argsort promise no order among them."""
    scores, (index,) = inputs["scores"], outputs
    if not torch.equal(index, index.clamp(0, scores.shape[1] - 1)):
        return "an index is no token's"
    if not (index.sort(dim=1).values.diff(dim=1) > 0).all():
        return "a token is taken twice"
    wrong = scores.gather(1, index) != scores.gather(1, exact[0])
    return f"{int(wrong.sum())} of {wrong.numel()} places have another score" if wrong.any() else None


def _call(**arguments: Any) -> Outputs:
    return (ops.select_topk(**arguments),)


SELECT_TOPK = Primitive(
    "select_topk", make=_make, call=_call, plain=_plain, floor=_floor, tiled=_tiled, compare=_compare
)
SELECT_TOPK_ALL = Primitive(
    "select_topk_all", make=_make_all, call=_call, plain=_plain_all, floor=_floor, tiled=_tiled, compare=_compare
)
