"""Kept rows with the residual added to them (Top-K), and the layer normalisation that follows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from bench.primitives import Inputs, Outputs, Primitive, Shape, nbytes, randn
from fastreduce import ops


def _make(shape: Shape, generator: torch.Generator) -> Inputs:
    """The index in the order of scores: at random."""
    batch, patches, channels = shape.batch, shape.patches, shape.channels
    best_first = torch.rand(batch, patches, generator=generator, device=generator.device).argsort(dim=1)
    return {
        "x": randn(generator, shape.dtype, batch, shape.tokens, channels),
        "index": best_first[:, : shape.kept].contiguous(),
        "residual": randn(generator, shape.dtype, batch, 1 + shape.kept, channels),
    }


def _plain(inputs: Inputs) -> Outputs:
    """A gather with the index expanded over the channels, the class token in front."""
    x, index = inputs["x"], inputs["index"]
    kept = x[:, 1:].gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    return (torch.cat([x[:, :1], kept], dim=1) + inputs["residual"],)


def _floor(inputs: Inputs, outputs: Outputs) -> int:
    """Of x only the rows that stay."""
    kept = outputs[0].numel() * inputs["x"].element_size()
    return kept + nbytes(inputs["index"], inputs["residual"], *outputs)


def _backward_floor(inputs: Inputs, outputs: Outputs, gradients: Outputs) -> int:
    """The residual's gradient is the upstream gradient itself, which is read for that of x."""
    grad_x, _ = gradients
    return nbytes(inputs["index"], *outputs, grad_x)


def _call(**arguments: Any) -> Outputs:
    return (ops.gather_tokens(**arguments),)


def affine(shape: Shape, generator: torch.Generator) -> Inputs:
    """Weight and bias of a layer normalisation, as training leaves them: near one, near zero."""
    weight, bias = (0.1 * randn(generator, shape.dtype, shape.channels) for _ in range(2))
    return {"weight": 1 + weight, "bias": bias}


def normalised(inputs: Inputs, out: torch.Tensor) -> torch.Tensor:
    """PyTorch's own layer normalisation of the rows."""
    return F.layer_norm(out, out.shape[-1:], inputs["weight"], inputs["bias"], 1e-6)


def norm_backward_floor(inputs: Inputs, out: torch.Tensor) -> int:
    """What the norm adds: out is read with the other upstream gradient, out's whole gradient is written."""
    return 3 * nbytes(out) + 3 * nbytes(inputs["weight"])


def _make_norm(shape: Shape, generator: torch.Generator) -> Inputs:
    return _make(shape, generator) | affine(shape, generator)


def _call_norm(*, weight: torch.Tensor, bias: torch.Tensor, **arguments: Any) -> Outputs:
    return ops.gather_tokens(**arguments, norm=(weight, bias, 1e-6))


def _plain_norm(inputs: Inputs) -> Outputs:
    (out,) = _plain(inputs)
    return out, normalised(inputs, out)


def _floor_norm(inputs: Inputs, outputs: Outputs) -> int:
    return _floor(inputs, outputs[:1]) + nbytes(inputs["weight"], inputs["bias"], outputs[1])


def _backward_floor_norm(inputs: Inputs, outputs: Outputs, gradients: Outputs) -> int:
    return _backward_floor(inputs, outputs[:1], gradients[:2]) + norm_backward_floor(inputs, outputs[0])


GATHER_TOKENS = Primitive(
    "gather_tokens",
    make=_make,
    call=_call,
    plain=_plain,
    floor=_floor,
    gradients=("x", "residual"),
    backward_floor=_backward_floor,
)


GATHER_TOKENS_NORM = Primitive(
    "gather_tokens_norm",
    make=_make_norm,
    call=_call_norm,
    plain=_plain_norm,
    floor=_floor_norm,
    gradients=("x", "residual", "weight", "bias"),
    backward_floor=_backward_floor_norm,
)
