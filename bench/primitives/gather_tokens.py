"""Kept rows with the residual added to them (Top-K), and the layer normalisation that follows."""

from __future__ import annotations

from typing import Any

import torch

from bench.primitives import Inputs, Outputs, Primitive, Shape, nbytes, randn
from bench.primitives._norm import with_norm
from fastreduce import ops


def _make(shape: Shape, generator: torch.Generator) -> Inputs:
    """Make the index in the order of scores: at random."""
    batch, patches, channels = shape.batch, shape.patches, shape.channels
    best_first = torch.rand(batch, patches, generator=generator, device=generator.device).argsort(dim=1)
    return {
        "x": randn(generator, shape.dtype, batch, shape.tokens, channels),
        "index": best_first[:, : shape.kept].contiguous(),
        "residual": randn(generator, shape.dtype, batch, 1 + shape.kept, channels),
    }


def _plain(inputs: Inputs) -> Outputs:
    """Gather with the index expanded over the channels, the class token in front."""
    x, index = inputs["x"], inputs["index"]
    kept = x[:, 1:].gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    return (torch.cat([x[:, :1], kept], dim=1) + inputs["residual"],)


def _floor(inputs: Inputs, outputs: Outputs) -> int:
    """Count only the rows that stay of x."""
    kept = outputs[0].numel() * inputs["x"].element_size()
    return kept + nbytes(inputs["index"], inputs["residual"], *outputs)


def _backward_floor(inputs: Inputs, outputs: Outputs, gradients: Outputs) -> int:
    """Count the upstream gradient, which is the residual's gradient itself and is read for x's."""
    grad_x, _ = gradients
    return nbytes(inputs["index"], *outputs, grad_x)


def _call(**arguments: Any) -> Outputs:
    return (ops.gather_tokens(**arguments),)


GATHER_TOKENS = Primitive(
    "gather_tokens",
    make=_make,
    call=_call,
    plain=_plain,
    floor=_floor,
    gradients=("x", "residual"),
    backward_floor=_backward_floor,
)
GATHER_TOKENS_NORM = with_norm(GATHER_TOKENS, ops.gather_tokens)
