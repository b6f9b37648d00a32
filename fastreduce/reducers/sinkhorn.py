"""Sinkhorn: entropic transport of the tokens to learned centres (Cuturi 2013)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import integer, number
from ..ops import unchecked as ops
from ..tokens import SoftWeights, Tokens
from ._soft import SoftReducer
from .base import ModelShape
from .schedule import KeepSchedule

__all__ = ["Sinkhorn"]


class TransportCenters(nn.Module):
    """Sinkhorn's learned centres."""

    def __init__(self, channels: int, clusters: int):
        super().__init__()
        self.v = nn.Parameter(torch.randn(clusters, channels))

    def forward(self, exact: bool) -> Tensor:
        """Return the centres (clusters, C), rows of length one.

        An exact gradient is the one through the normalisation.
        """
        if exact or not torch.is_grad_enabled():
            return F.normalize(self.v, dim=-1)
        v = self.v.detach()
        return F.normalize(v, dim=-1) + (self.v - v)  # adds zero, and hands the gradient on as it is


class Sinkhorn(SoftReducer):
    """Entropic transport of normalised tokens to normalised centres (Haurum et al. 2023; Cuturi 2013).

    Args:
        blocks: where the stages stand.
        schedule: output tokens of each stage.
        shape: the model's width and grid, for ``reducers.cluster_layers.*``.
        eps: entropic regularisation.
        iters: Sinkhorn iterations.
        gradient: the centres are normalised on the fly. ``"official"`` takes the gradient of the normalised centres for
            that of the parameter, as the released code does, which overwrites the parameter by its normalised self;
            ``"exact"`` differentiates through the normalisation.
        backend: see :func:`fastreduce.backend`.
    """

    name = "sinkhorn"

    def __init__(
        self,
        blocks: tuple[int, ...],
        schedule: KeepSchedule,
        shape: ModelShape,
        eps: float = 1.0,
        iters: int = 3,
        gradient: Literal["official", "exact"] = "official",
        backend: str = "auto",
    ):
        super().__init__(blocks, schedule, shape, backend)
        self.eps = number("eps", eps)
        if self.eps <= 0:
            raise ValueError(f"eps must be positive, got {eps}")
        if gradient not in ("official", "exact"):
            raise ValueError(f"gradient must be 'official' or 'exact', got {gradient!r}")
        self.iters = integer("iters", iters, least=1)
        self.gradient = gradient
        self.cluster_layers = nn.ModuleList(TransportCenters(shape.channels, count) for count in self.clusters)

    def merge(self, tokens: Tokens, stage: int) -> tuple[Tensor, SoftWeights]:
        """Return sums of normalised tokens: what each token gives away adds up to one."""
        x, prefix = tokens.x, tokens.prefix
        centers = self.cluster_layers[stage](self.gradient == "exact")
        eps, patches = self.eps, x[:, prefix:]
        merged, similarity, token_bias, cluster_bias = ops.sinkhorn_merge(
            patches,
            centers,
            eps=eps,
            iters=self.iters,
            head=x[:, :prefix],
            similarity=not self.in_blocks(x, stage),
            backend=tokens.backend,
        )
        if similarity is not None:
            return merged, SoftWeights(similarity, token_bias, cluster_bias)

        def again() -> Tensor:
            with torch.no_grad():
                unit = F.normalize(patches.to(token_bias.dtype), dim=2)
                return unit @ centers.to(token_bias.dtype).t() / eps

        return merged, SoftWeights(again, token_bias, cluster_bias)
