"""Merged tokens brought back to the full sequence (dense features after ToMe)."""

from __future__ import annotations

from typing import Any

import torch

from bench.primitives import Inputs, Outputs, Primitive, Shape, nbytes, randn
from bench.primitives.merge_tokens import matched_slots
from fastreduce import ops


def _make(shape: Shape, generator: torch.Generator) -> Inputs:
    return {
        "x": randn(generator, shape.dtype, shape.batch, shape.tokens - shape.kept, shape.channels),
        "slot": matched_slots(shape, generator),
    }


def _plain(inputs: Inputs) -> Outputs:
    """Gather with the index expanded over the channels."""
    x, slot = inputs["x"], inputs["slot"]
    return (x.gather(1, slot.unsqueeze(-1).expand(-1, -1, x.shape[-1])),)


def _floor(inputs: Inputs, outputs: Outputs) -> int:
    """Count every row of x: each is some token's."""
    return nbytes(*inputs.values(), *outputs)


def _backward_floor(inputs: Inputs, outputs: Outputs, gradients: Outputs) -> int:
    return nbytes(inputs["slot"], *outputs, *gradients)


def _call(**arguments: Any) -> Outputs:
    return (ops.unmerge_tokens(**arguments),)


UNMERGE_TOKENS = Primitive(
    "unmerge_tokens",
    make=_make,
    call=_call,
    plain=_plain,
    floor=_floor,
    gradients=("x",),
    backward_floor=_backward_floor,
)
