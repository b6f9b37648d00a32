"""K-Medoids weighted by the attention that tokens receive."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.primitives import Inputs, Outputs, Primitive, Shape, nbytes
from fastreduce import ops

from ._clusters import misplaced, swept

_ITERS = 3


def _make(shape: Shape, generator: torch.Generator) -> Inputs:
    """Draw whole numbers, whose squared distances every dtype holds exactly.

    A label that is decided otherwise changes all that follow. No two weights are equal; on average they are the number
    of heads.
    """
    size = (shape.batch, shape.tokens)
    x = torch.randn(*size, shape.channels, generator=generator, device=generator.device).mul_(3).round_()
    order = torch.rand(size, generator=generator, device=generator.device).argsort(dim=1)
    weights = (order + 1).float() * (2 * shape.heads / shape.tokens)
    return {"x": x.to(shape.dtype)[:, 1:], "weights": weights[:, 1:], "k": shape.kept, "iters": _ITERS}


def plain_k_medoids(
    x: Tensor, weights: Tensor | None, k: int, *, iters: int = 3, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Cluster as the study's released code does: by one pass over all distances for every cluster.

    x (B, N, C), weights (B, N) or None -> centers (B, k), label (B, N).
    """
    distance = torch.cdist(x, x)

    def to_centers() -> Tensor:
        return distance.gather(2, centers.unsqueeze(1).expand(-1, x.shape[1], -1))

    if weights is None:
        centers = torch.full((x.shape[0], 1), first, device=x.device)
        for _ in range(1, k):
            farthest = to_centers().amax(2).scatter_(1, centers, 0.0)
            centers = torch.cat([centers, farthest.argmax(1, keepdim=True)], dim=1)
        weighted = distance
    else:
        centers = torch.topk(weights, k, dim=1)[1]
        weighted = distance * weights.unsqueeze(2)
    for _ in range(iters):
        label = to_centers().argmin(2)
        cheapest = []
        for j in range(k):
            cost = weighted.clone().masked_fill_((label != j).unsqueeze(2), 1e6)
            cheapest.append(cost.sum(2).argmin(1))
        centers = torch.stack(cheapest, dim=1)
    return centers, to_centers().argmin(2)


def _plain(inputs: Inputs) -> Outputs:
    """Cluster in float32 at least, as distances are under autocast too."""
    x, weights, k, iters = inputs.values()
    return plain_k_medoids(x.to(torch.promote_types(x.dtype, torch.float32)), weights, k, iters=iters)


def _floor(inputs: Inputs, outputs: Outputs) -> int:
    return nbytes(inputs["x"], inputs["weights"], *outputs)


def _tiled(inputs: Inputs) -> int:
    """Count distances in tiles, written once, k of their rows read once a labelling; weights and results once."""
    from fastreduce.kernels.cluster_k_medoids import distance_tile

    x, weights, k, iters = inputs.values()
    batch, tokens, channels = x.shape
    tile = distance_tile(channels, x.dtype)
    rows = swept(tokens, tokens, tile["BLOCK_I"], tile["BLOCK_J"]) * channels * x.element_size()
    labellings = 4 * tokens * (tokens + (iters + 1) * k)
    return batch * (rows + labellings + 8 * (k + tokens)) + nbytes(weights)


def _compare(inputs: Inputs, outputs: Outputs, exact: Outputs) -> str | None:
    """Check that labels are nearest centres', and another centre than the exact one costs as much but for rounding."""
    x, (centers, label) = inputs["x"].double(), outputs
    distance = torch.cdist(x, x)
    if wrong := misplaced(distance, centers, label):
        return wrong
    cost = inputs["weights"] * distance.sum(2)
    best = cost.gather(1, exact[0])
    dearer = int(((cost.gather(1, centers) - best).abs() > 1e-5 * best).sum())
    return f"{dearer} of {centers.numel()} centers do not cost what the exact ones do" if dearer else None


CLUSTER_K_MEDOIDS = Primitive(
    "cluster_k_medoids",
    make=_make,
    call=ops.cluster_k_medoids,
    plain=_plain,
    floor=_floor,
    tiled=_tiled,
    compare=_compare,
)
