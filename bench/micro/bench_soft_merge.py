"""Sums of tokens under a softmax over the tokens, as SiT and PatchMerger lay them out."""

from __future__ import annotations

from typing import Any

import torch

from bench.primitive import Inputs, Outputs, Primitive, Shape, nbytes, randn
from fastreduce import ops


def _make(shape: Shape, generator: torch.Generator) -> Inputs:
    logits = randn(generator, shape.dtype, shape.batch, shape.tokens, shape.kept)[:, 1:]
    x = randn(generator, shape.dtype, shape.batch, shape.tokens, shape.channels)
    return {"logits": logits, "x": x[:, 1:], "head": x[:, :1]}


def _plain(inputs: Inputs) -> Outputs:
    weights = inputs["logits"].softmax(dim=1)
    return (torch.cat([inputs["head"], weights.transpose(1, 2) @ inputs["x"]], dim=1),)


def _floor(inputs: Inputs, outputs: Outputs) -> int:
    return nbytes(*inputs.values(), *outputs)


def _backward_floor(inputs: Inputs, outputs: Outputs, gradients: Outputs) -> int:
    """Logits, tokens, the clusters' rows of the upstream gradient, two gradients; the head's is a view of its rows."""
    return nbytes(inputs["logits"], inputs["x"], outputs[0][:, 1:], *gradients[:2])


def _call(**arguments: Any) -> Outputs:
    """Without the logsumexp, which is for recording: the released codes have none."""
    return ops.soft_merge(**arguments)[:1]


SOFT_MERGE = Primitive(
    "soft_merge",
    make=_make,
    call=_call,
    plain=_plain,
    floor=_floor,
    gradients=("logits", "x", "head"),
    backward_floor=_backward_floor,
)


def test_soft_merge(speed): ...


test_soft_merge.primitive = SOFT_MERGE
