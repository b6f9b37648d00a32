"""Clustering by density peaks."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.primitives import Inputs, Outputs, Primitive, Shape, nbytes, randn
from fastreduce import ops

from ._clusters import misplaced, swept

_NEIGHBORS = 5


def _make(shape: Shape, generator: torch.Generator) -> Inputs:
    x = randn(generator, shape.dtype, shape.batch, shape.tokens, shape.channels)
    return {"x": x[:, 1:], "k": shape.kept, "neighbors": _NEIGHBORS}


def _distances_and_densities(x: Tensor, neighbors: int) -> tuple[Tensor, Tensor]:
    """Return the distances (B, N, N) and the densities (B, N)."""
    distance = torch.cdist(x, x) / x.shape[2] ** 0.5
    near = distance.topk(min(neighbors, x.shape[1]), dim=2, largest=False).values
    return distance, (-(near**2).mean(dim=2)).exp()


def _plain(inputs: Inputs) -> Outputs:
    """Cluster in float32 at least, as distances are under autocast too. The released code's noise is left out."""
    x, k, neighbors = inputs.values()
    distance, density = _distances_and_densities(x.to(torch.promote_types(x.dtype, torch.float32)), neighbors)
    denser = (density[:, None, :] > density[:, :, None]).to(distance.dtype)
    largest = distance.flatten(1).max(dim=1).values[:, None, None]
    height = (distance * denser + largest * (1 - denser)).min(dim=2).values
    centers = (density * height).topk(k, dim=1).indices
    to_centers = distance.gather(1, centers.unsqueeze(2).expand(-1, -1, x.shape[1]))
    label = to_centers.argmin(dim=1)
    own = torch.arange(k, device=x.device).expand(len(x), k)
    return centers, label.scatter(1, centers, own)


def _floor(inputs: Inputs, outputs: Outputs) -> int:
    return nbytes(inputs["x"], *outputs)


def _tiled(inputs: Inputs) -> int:
    """Count twice all tokens against all, for densities and heights, once against the centres; results once."""
    from fastreduce.kernels import cluster_dpc_knn as kernels

    x, k, _ = inputs.values()
    batch, tokens, channels = x.shape
    first = kernels.distance_tile(channels, x.dtype)
    then = kernels.image_tile(channels, x.dtype) if tokens <= kernels.most_tokens(x.dtype) else first
    rows = swept(tokens, tokens, first["BLOCK_I"], first["BLOCK_J"])
    rows += sum(swept(tokens, others, then["BLOCK_I"], then["BLOCK_J"]) for others in (tokens, k))
    return batch * (rows * channels * x.element_size() + 8 * (k + tokens))


def _compare(inputs: Inputs, outputs: Outputs, exact: Outputs) -> str | None:
    """Ask for labels of a nearest centre, and for centres that no other token outscores, up to float32's rounding.

    A score is uncertain by its density and its height, and the height by which of two tokens is the denser one.
    """
    x, (centers, label) = inputs["x"].double(), outputs
    distance, density = _distances_and_densities(x, inputs["neighbors"])
    squared = distance**2
    off = 32 * torch.finfo(torch.float32).eps * (x**2).mean(dim=2).amax()
    if wrong := misplaced(squared, centers, label, off):
        return wrong
    if not centers.sort(dim=1).values.diff().all():
        return "a token is a centre twice"
    largest, other = squared.amax((1, 2), keepdim=True), ~torch.eye(x.shape[1], dtype=torch.bool, device=x.device)

    def scores(sign: int) -> Tensor:
        """Return the least (-1) or the most (1) that every token may score."""
        denser = (density[:, None, :] > density[:, :, None] * (1 + 2 * sign * off)) & other
        height = (torch.where(denser, squared, largest).amin(2) + sign * off).clamp_min(0).sqrt()
        return density * (1 + sign * off) * height

    most, least = scores(1).gather(1, centers), scores(-1)
    left_out = least.scatter(1, centers, 0.0).amax(1, keepdim=True)
    later = torch.cat([least.gather(1, centers), left_out], dim=1).flip(1).cummax(1).values.flip(1)[:, 1:]
    wrong_places = int((later > most).sum())
    return f"{wrong_places} of {centers.numel()} centers score less than a later token" if wrong_places else None


CLUSTER_DPC_KNN = Primitive(
    "cluster_dpc_knn",
    make=_make,
    call=ops.cluster_dpc_knn,
    plain=_plain,
    floor=_floor,
    tiled=_tiled,
    compare=_compare,
)
