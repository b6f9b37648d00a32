"""Kept rows and the score-weighted sum of all the others, with the residual added to them (EViT), and the norm."""

from __future__ import annotations

from typing import Any

import torch

from bench.primitives import Inputs, Outputs, Primitive, Shape, nbytes, randn
from bench.primitives._norm import with_norm
from fastreduce import ops


def _make(shape: Shape, generator: torch.Generator) -> Inputs:
    """Make the scores in float32, as class attention comes."""
    batch, channels = shape.batch, shape.channels
    scores = randn(generator, torch.float32, batch, shape.patches).softmax(dim=1)
    return {
        "x": randn(generator, shape.dtype, batch, shape.tokens, channels),
        "order": scores.argsort(dim=1, descending=True),
        "scores": scores,
        "k": shape.kept,
        "residual": randn(generator, shape.dtype, batch, 1 + shape.kept + 1, channels),
    }


def _plain(inputs: Inputs) -> Outputs:
    """Gather kept tokens and the rest with an expanded index, multiply the rest and sum it up."""
    x, order, k = inputs["x"], inputs["order"], inputs["k"]
    rows = order.unsqueeze(-1).expand(-1, -1, x.shape[-1])
    kept, rest = x[:, 1:].gather(1, rows[:, :k]), x[:, 1:].gather(1, rows[:, k:])
    weights = inputs["scores"].gather(1, order[:, k:]).unsqueeze(-1)
    fused = (rest * weights).sum(dim=1, keepdim=True).to(x.dtype)
    return (torch.cat([x[:, :1], kept, fused], dim=1) + inputs["residual"],)


def _decisions(inputs: Inputs) -> int:
    """Count which tokens stay, and the scores of the rest."""
    return nbytes(inputs["order"][:, : inputs["k"]], inputs["scores"][:, inputs["k"] :])


def _floor(inputs: Inputs, outputs: Outputs) -> int:
    return _decisions(inputs) + nbytes(inputs["x"], inputs["residual"], *outputs)


def _backward_floor(inputs: Inputs, outputs: Outputs, gradients: Outputs) -> int:
    """Count x's rows of the rest, for the scores' gradient.

    The residual's gradient is the upstream gradient itself.
    """
    grad_x, grad_scores, _ = gradients
    return _decisions(inputs) + nbytes(inputs["x"][:, 1 + inputs["k"] :], *outputs, grad_x, grad_scores)


def _call(**arguments: Any) -> Outputs:
    return (ops.fuse_tokens(**arguments),)


FUSE_TOKENS = Primitive(
    "fuse_tokens",
    make=_make,
    call=_call,
    plain=_plain,
    floor=_floor,
    gradients=("x", "scores", "residual"),
    backward_floor=_backward_floor,
)
FUSE_TOKENS_NORM = with_norm(FUSE_TOKENS, ops.fuse_tokens)
