"""``cluster_dpc_knn``: which tokens become centres, and which centre every token belongs to."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backends import Resolved, resolve
from ._check import check_count, check_floating, check_same, check_shape, shape_of
from ._library import operator

__all__ = ["cluster_dpc_knn", "cluster_dpc_knn_groups"]


def _reference(x: Tensor, k: int, neighbors: int, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    centers, label = reference.cluster_dpc_knn(x, k, neighbors, noise)
    return centers, label, *reference.group_slots(label, k)


@operator("cluster_dpc_knn.cluster_dpc_knn", _reference, dense="x")
def _cluster(x: Tensor, k: int, neighbors: int, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, _ = x.shape
    centers, label = x.new_empty(batch, k, dtype=torch.int64), x.new_empty(batch, tokens, dtype=torch.int64)
    order, offsets = x.new_empty(batch, tokens, dtype=torch.int32), x.new_empty(batch, k + 1, dtype=torch.int32)
    return centers, label, order, offsets


def cluster_dpc_knn_groups_unchecked(
    x: Tensor, k: int, *, neighbors: int = 5, noise: Tensor | None = None, backend: Resolved
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Call :func:`cluster_dpc_knn_groups` without checks, by the backend named."""
    x, noise = x.detach(), None if noise is None else noise.detach()
    if backend == "reference":
        return *reference.cluster_dpc_knn(x, k, neighbors, noise), None
    centers, label, order, offsets = _cluster(x, k, neighbors, noise)
    return centers, label, (order, offsets)


def cluster_dpc_knn_unchecked(
    x: Tensor, k: int, *, neighbors: int = 5, noise: Tensor | None = None, backend: Resolved
) -> tuple[Tensor, Tensor]:
    """Call :func:`cluster_dpc_knn` without checks, by the backend named."""
    return cluster_dpc_knn_groups_unchecked(x, k, neighbors=neighbors, noise=noise, backend=backend)[:2]


def cluster_dpc_knn(
    x: Tensor, k: int, *, neighbors: int = 5, noise: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Cluster the tokens of every image by density peaks (Du et al. 2016; in TCFormer, Zeng et al. 2022, section 3.2).

    Distances are ``d = |x[n] - x[m]| / sqrt(C)``. The density of a token is ``exp(-mean d^2)`` over its nearest tokens,
    itself included. Its height is the distance to the nearest token of higher density, or the image's largest distance
    if there is none. The centres are the k tokens with the highest density times height, best first. Ties go to the
    lower index, and NaN comes last. Every other token belongs to the nearest centre, the first one if tied.

    Equivalent PyTorch::

        d = torch.cdist(x, x) / C**0.5
        density = (-d.topk(neighbors, largest=False).values.square().mean(-1)).exp()
        denser = density[:, None, :] > density[:, :, None]
        height = torch.where(denser, d, d.amax((1, 2), keepdim=True)).amin(-1)
        centers = (-density * height).sort(dim=1, stable=True).indices[:, :k]

    Args:
        x: (B, N, C) tokens, for example ``tokens[:, 1:]`` without a copy. float32, float16, bfloat16 (reference: any).
            Distances are computed in float32.
        k: number of centres, 1 .. N.
        neighbors: how many of the smallest distances make up the density; all N where there are fewer.
        noise: (B, N) added to the densities, or None. The released code adds 1e-6 times uniform noise, in evaluation
            too.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        centers (B, k) int64, indices of tokens, and label (B, N) int64, values 0 .. k - 1, for :func:`merge_tokens`
        with ``num_out = k``. No gradient.

    Raises:
        ValueError: wrong shapes, devices that differ, no channels, ``neighbors < 1`` or a k outside 1 .. N.
        TypeError: x or noise not floating point, k or neighbors not an integer.
    """
    return cluster_dpc_knn_groups(x, k, neighbors=neighbors, noise=noise, backend=backend)[:2]


def cluster_dpc_knn_groups(
    x: Tensor, k: int, *, neighbors: int = 5, noise: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Cluster as :func:`cluster_dpc_knn` does, and return the groups for :func:`merge_tokens` from the same launch.

    Returns:
        centers (B, k), label (B, N), and the groups as :func:`prepare_merge` returns them: None for the reference.
    """
    check_shape("x", x, "B N C")
    check_floating("x", x)
    batch, tokens, channels = x.shape
    if channels < 1:
        raise ValueError(f"x must have at least 1 channel, got shape {shape_of(x)}")
    k = check_count("k", k, 1, tokens)
    neighbors = check_count("neighbors", neighbors, 1, 2**31 - 1)
    if noise is not None:
        check_shape("noise", noise, "B N")
        check_floating("noise", noise)
        check_same("x", x, "noise", noise)
        if shape_of(noise) != (batch, tokens):
            raise ValueError(f"noise must have shape {(batch, tokens)}, got {shape_of(noise)}")
    chosen = resolve(backend, x, *(() if noise is None else (noise,)))
    return cluster_dpc_knn_groups_unchecked(x, k, neighbors=neighbors, noise=noise, backend=chosen)
