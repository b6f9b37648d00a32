"""Primitives that end in the layer normalisation of their rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from bench.primitives import Inputs, Outputs, Primitive, Shape, nbytes, randn

__all__ = ["with_norm"]

_EPS = 1e-6


def with_norm(bare: Primitive, function: Callable[..., Outputs]) -> Primitive:
    """Return a primitive with the layer norm of its first output behind it, done in the same pass.

    ``function`` takes the arguments of the primitive and ``norm=(weight, bias, eps)``. The normed rows come last.
    """

    def make(shape: Shape, generator: torch.Generator) -> Inputs:
        """Add weight and bias as training leaves them: near one, near zero."""
        inputs = bare.make(shape, generator)
        weight, bias = (0.1 * randn(generator, shape.dtype, shape.channels) for _ in range(2))
        return inputs | {"weight": 1 + weight, "bias": bias}

    def call(*, weight: torch.Tensor, bias: torch.Tensor, **arguments: Any) -> Outputs:
        return function(**arguments, norm=(weight, bias, _EPS))

    def plain(inputs: Inputs) -> Outputs:
        """Call PyTorch's own layer normalisation."""
        outputs = bare.plain(inputs)
        out = outputs[0]
        return *outputs, F.layer_norm(out, out.shape[-1:], inputs["weight"], inputs["bias"], _EPS)

    def floor(inputs: Inputs, outputs: Outputs) -> int:
        return bare.floor(inputs, outputs[:-1]) + nbytes(inputs["weight"], inputs["bias"], outputs[-1])

    def backward_floor(inputs: Inputs, outputs: Outputs, gradients: Outputs) -> int:
        """Add the norm's bytes: out and the other upstream gradient are read, out's whole gradient is written."""
        assert bare.backward_floor is not None
        below = bare.backward_floor(inputs, outputs[:-1], gradients[: len(bare.gradients)])
        return below + 3 * nbytes(outputs[0]) + 3 * nbytes(inputs["weight"])

    return dataclasses.replace(
        bare,
        name=f"{bare.name}_norm",
        make=make,
        call=call,
        plain=plain,
        floor=floor,
        gradients=(*bare.gradients, "weight", "bias"),
        backward_floor=backward_floor,
    )
