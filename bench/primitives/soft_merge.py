"""Sums of tokens under a softmax over the tokens, as SiT and PatchMerger lay them out."""

from __future__ import annotations

import math
from typing import Any

import torch

from bench.primitives import Inputs, Outputs, Primitive, Shape, nbytes, randn
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
    """Count logits, tokens, the clusters' rows of the upstream gradient, two gradients; the head's is a view."""
    return nbytes(inputs["logits"], inputs["x"], outputs[0][:, 1:], *gradients[:2])


def _tiled(inputs: Inputs) -> int:
    """Count with a tile of clusters by channels a program: all of them at once do not fit registers.

    Tokens are read once a tile of clusters, logits once a tile of channels.
    """
    from fastreduce.kernels.soft_merge import forward_tile

    logits, x, head = inputs.values()
    batch, _, clusters = logits.shape
    tile = forward_tile(clusters, x.shape[2], x.dtype)
    rows = (head.shape[1] + clusters) * x.shape[2] * x.element_size() + clusters * torch.float32.itemsize
    read = nbytes(head) + nbytes(x) * math.ceil(clusters / tile["BLOCK_K"])
    return read + nbytes(logits) * math.ceil(x.shape[2] / tile["BLOCK_C"]) + batch * rows


def _backward_tiled(inputs: Inputs) -> int:
    """Count two products in tiles of tokens by clusters and by channels, and the means that the first one needs.

    Tokens are read once a tile of clusters, logits once and once a tile of channels, the upstream gradient with the
    result for the means, and twice a tile of tokens. The mean and the logsumexp of a cluster are float32.
    """
    from fastreduce.kernels.soft_merge import backward_tile, logits_unit

    logits, x, _ = inputs.values()
    batch, tokens, clusters = logits.shape
    tile = backward_tile(tokens, clusters, x.shape[2], x.dtype, logits_unit(logits))
    rows = batch * clusters * x.shape[2] * x.element_size()
    numbers = batch * clusters * torch.float32.itemsize
    tiles_n, tiles_c = math.ceil(tokens / tile["BLOCK_N"]), math.ceil(x.shape[2] / tile["BLOCK_C"])
    read = 2 * rows + 2 * tiles_n * rows + nbytes(x) * math.ceil(clusters / tile["BLOCK_K"]) + nbytes(logits)
    return read + nbytes(logits) * tiles_c + numbers + tiles_n * (2 + tiles_c) * numbers + nbytes(logits, x)


def _call(**arguments: Any) -> Outputs:
    """Return no logsumexp, which is for recording: the released codes have none."""
    return ops.soft_merge(**arguments)[:1]


SOFT_MERGE = Primitive(
    "soft_merge",
    make=_make,
    call=_call,
    plain=_plain,
    floor=_floor,
    gradients=("logits", "x", "head"),
    backward_floor=_backward_floor,
    tiled=_tiled,
    backward_tiled=_backward_tiled,
)
