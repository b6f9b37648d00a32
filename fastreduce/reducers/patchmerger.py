"""PatchMerger: attention of learned queries over normalised tokens (Renggli et al. 2022)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import switch
from ..tokens import SoftWeights, Tokens
from ._soft import SoftReducer
from .base import ModelShape
from .schedule import KeepSchedule

__all__ = ["PatchMerger"]


class MergerQueries(nn.Module):
    """PatchMerger's norm and learned queries: how much each token matters to each output token."""

    def __init__(self, channels: int, clusters: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.queries = nn.Parameter(torch.randn(clusters, channels))

    def forward(self, x: Tensor, factor: float = 1.0, clusters: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Normalise (B, N, C), and return the logits (B, N, clusters) of some clusters too, times a factor."""
        normed = self.norm(x)
        queries = self.queries[clusters]
        return normed, F.linear(normed, queries if factor == 1.0 else queries * factor)


class PatchMerger(SoftReducer):
    """PatchMerger (Renggli et al. 2022): attention of learned queries over normalised tokens, which are what is summed.

    Args:
        blocks: where the stages stand.
        schedule: output tokens of each stage.
        shape: the model's width and grid, for ``reducers.cluster_layers.*``.
        scaled: divide the logits by the square root of the width. The released code does not.
        backend: see :func:`fastreduce.backend`.
    """

    name = "patchmerger"

    def __init__(
        self,
        blocks: tuple[int, ...],
        schedule: KeepSchedule,
        shape: ModelShape,
        scaled: bool = False,
        backend: str = "auto",
    ):
        super().__init__(blocks, schedule, shape, backend)
        self.scaled = switch("scaled", scaled)
        self.cluster_layers = nn.ModuleList(MergerQueries(shape.channels, count) for count in self.clusters)

    def merge(self, tokens: Tokens, stage: int) -> tuple[Tensor, SoftWeights]:
        """Return weighted means of the normalised tokens."""
        x, prefix = tokens.x, tokens.prefix
        layer: Any = self.cluster_layers[stage]
        factor = x.shape[-1] ** -0.5 if self.scaled else 1.0
        if not self.in_blocks(x, stage):
            normed, logits = layer(x, factor)
            return self.merge_all(logits[:, prefix:], normed[:, prefix:], x[:, :prefix], tokens.backend)

        def some(clusters: slice) -> Tensor:
            return layer(x, factor, clusters)[1][:, prefix:]

        normed, _ = layer(x, factor, slice(0))
        return self.merge_blocks(some, self.clusters[stage], normed[:, prefix:], x[:, :prefix], tokens.backend)
