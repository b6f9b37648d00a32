"""Sums of normalised tokens under a transport plan between tokens and centres."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from bench.primitives import Inputs, Outputs, Primitive, Shape, nbytes, randn
from fastreduce import ops
from fastreduce.reducers import _soft as soft


def _make(shape: Shape, generator: torch.Generator) -> Inputs:
    """Make inputs; similarities are wanted if they are not too many, as by the reducer."""
    x = randn(generator, shape.dtype, shape.batch, shape.tokens, shape.channels)
    centers = F.normalize(randn(generator, shape.dtype, shape.kept, shape.channels), dim=-1)
    similarity = shape.tokens * shape.kept <= soft.LOGITS
    return {"x": x[:, 1:], "centers": centers, "eps": 1.0, "iters": 3, "head": x[:, :1], "similarity": similarity}


def _call(**arguments: Any) -> Outputs:
    return tuple(output for output in ops.sinkhorn_merge(**arguments) if output is not None)


def _plain(inputs: Inputs) -> Outputs:
    """Iterate in the log domain; the margin, one number for tokens and clusters alike, cancels and is left out."""
    x, centers, eps, iters, head, similarity = inputs.values()
    unit = F.normalize(x, dim=-1)
    logits = (centers @ unit.transpose(1, 2)) / eps
    columns = logits.new_zeros(len(logits), 1, logits.shape[2])
    for _ in range(iters):
        rows = -(logits + columns).logsumexp(dim=2, keepdim=True)
        columns = -(logits + rows).logsumexp(dim=1, keepdim=True)
    merged = torch.cat([head, (logits + rows + columns).exp() @ unit], dim=1)
    scores = (logits.transpose(1, 2).detach(),) if similarity else ()
    return merged, *scores, columns.squeeze(1).detach(), rows.squeeze(2).detach()


def _floor(inputs: Inputs, outputs: Outputs) -> int:
    return nbytes(inputs["x"], inputs["centers"], inputs["head"], *outputs)


def _backward_floor(inputs: Inputs, outputs: Outputs, gradients: Outputs) -> int:
    """Count tokens, centres, the clusters' rows of the upstream gradient, two gradients; the head's is a view."""
    return nbytes(inputs["x"], inputs["centers"], outputs[0][:, 1:], *gradients[:2])


def _tiled(inputs: Inputs) -> int:
    """Count two products, x times centres and plan times x.

    Similarities are read once an iteration and a tile of channels.
    """
    from fastreduce.kernels import sinkhorn_merge as kernels

    x, centers, _, iters, head, _ = inputs.values()
    (batch, tokens, channels), clusters = x.shape, len(centers)
    padded, exact = kernels.padded_clusters(clusters), x.dtype == torch.float32
    first, second = kernels.similarity_tile(clusters, exact), kernels.sums_tile(channels, exact)
    sweeps = math.ceil(padded / first["BLOCK_K"]) + math.ceil(clusters / second["BLOCK_K"])
    passes = 1 + iters + math.ceil(channels / second["BLOCK_C"])
    merged = centers  # as many bytes an image
    an_image = math.ceil(tokens / first["BLOCK_N"]) * nbytes(centers) + nbytes(merged)
    numbers = passes * tokens * padded + tokens + clusters
    return sweeps * nbytes(x) + 2 * nbytes(head) + batch * (an_image + 4 * numbers)


def _backward_tiled(inputs: Inputs) -> int:
    """Count four products in tiles.

    Similarities and their gradients are read once an iteration and thrice a tile of channels.
    """
    from fastreduce.kernels import sinkhorn_merge as kernels
    from fastreduce.kernels import sinkhorn_merge_backward as backward

    x, centers, _, iters, *_ = inputs.values()
    (batch, tokens, channels), clusters = x.shape, len(centers)
    padded, exact = kernels.padded_clusters(clusters), x.dtype == torch.float32
    first, last = kernels.similarity_tile(clusters, exact), backward.backward_tile(channels, exact)
    sweeps = math.ceil(padded / first["BLOCK_K"]) + 1 + math.ceil(clusters / last["ROWS"])
    passes = 6 + iters + 3 * math.ceil(channels / last["BLOCK_C"])
    upstream = centers  # as many bytes an image
    an_image = math.ceil(tokens / first["BLOCK_N"]) * nbytes(upstream)
    an_image += math.ceil(tokens / last["ROWS"]) * nbytes(upstream, centers)
    parts = math.ceil(batch / math.ceil(batch / backward.CENTER_PARTS))
    sums = 4 * parts * centers.numel()  # torch adds them up, and its traffic is not the tiles'
    return (sweeps + 1) * nbytes(x) + batch * (an_image + 4 * passes * tokens * padded) + sums


SINKHORN_MERGE = Primitive(
    "sinkhorn_merge",
    make=_make,
    call=_call,
    plain=_plain,
    floor=_floor,
    gradients=("x", "centers", "head"),
    backward_floor=_backward_floor,
    tiled=_tiled,
    backward_tiled=_backward_tiled,
)
