"""A linear layer on packed tokens with room behind them (ATS, packed)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from bench.primitives import Inputs, Outputs, Primitive, Shape, nbytes, randn
from bench.primitives.gather_packed import ragged_valid
from fastreduce import ops


def _make(shape: Shape, generator: torch.Generator) -> Inputs:
    """Make the query, key, value projection."""
    rows, channels = shape.batch * (1 + shape.kept), shape.channels
    return {
        "x": randn(generator, shape.dtype, 1, rows, channels),
        "weight": randn(generator, shape.dtype, 3 * channels, channels) * channels**-0.5,
        "bias": randn(generator, shape.dtype, 3 * channels),
        "offsets": ops.token_offsets(ragged_valid(shape, generator), backend="reference"),
    }


def _call(**arguments: Any) -> Outputs:
    return (ops.linear_packed(**arguments),)


def _plain(inputs: Inputs) -> Outputs:
    """Multiply all rows, and hide those that are none."""
    out = F.linear(inputs["x"], inputs["weight"], inputs["bias"])
    real = torch.arange(out.shape[1], device=out.device) < inputs["offsets"][-1]
    return (out * real.unsqueeze(1),)


def _real(inputs: Inputs) -> int:
    return int(inputs["offsets"][-1])


def _floor(inputs: Inputs, outputs: Outputs) -> int:
    """Count the rows that are there of x, and all rows of the result."""
    x = inputs["x"]
    rows = _real(inputs) * x.shape[2] * x.element_size()
    return rows + nbytes(inputs["weight"], inputs["bias"], inputs["offsets"], *outputs)


def _backward_floor(inputs: Inputs, outputs: Outputs, gradients: Outputs) -> int:
    x, (out,) = inputs["x"], outputs
    rows = _real(inputs) * (x.shape[2] + out.shape[2]) * x.element_size()
    return rows + nbytes(inputs["weight"], inputs["offsets"], *gradients)


def _product(rows: int, inner: int, columns: int, block_rows: int, block_columns: int, size: int) -> int:
    """Count the bytes of both operands: a matrix product reads each once for every block of the other."""
    return size * inner * (rows * math.ceil(columns / block_columns) + columns * math.ceil(rows / block_rows))


def _tiled(inputs: Inputs) -> int:
    from fastreduce.kernels.linear_packed import product_tile

    x, (outs, ins) = inputs["x"], inputs["weight"].shape
    tile, size = product_tile(ins, outs, x.dtype), x.element_size()
    read = _product(_real(inputs), ins, outs, tile["BLOCK_M"], tile["BLOCK_N"], size)
    return read + x.shape[1] * outs * size


def _backward_tiled(inputs: Inputs) -> int:
    from fastreduce.kernels.linear_packed import grad_weight_parts, grad_weight_tile, product_tile

    x, (outs, ins) = inputs["x"], inputs["weight"].shape
    real, rows, size = _real(inputs), x.shape[1], x.element_size()
    tile = product_tile(outs, ins, x.dtype)
    grad_x = _product(real, outs, ins, tile["BLOCK_M"], tile["BLOCK_N"], size) + rows * ins * size
    tile = grad_weight_tile(ins, outs, x.dtype)
    read = size * real * (outs * math.ceil(ins / tile["BLOCK_N"]) + ins * math.ceil(outs / tile["BLOCK_M"]))
    parts = grad_weight_parts(ins, outs, rows, x.dtype)
    return grad_x + read + parts * (outs * ins + outs) * (size if parts == 1 else 4)


LINEAR_PACKED = Primitive(
    "linear_packed",
    make=_make,
    call=_call,
    plain=_plain,
    floor=_floor,
    gradients=("x", "weight", "bias"),
    backward_floor=_backward_floor,
    tiled=_tiled,
    backward_tiled=_backward_tiled,
)
