"""SiT: weights from a perceptron that sees each token alone (Zong et al. 2022)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tokens import SoftWeights, Tokens
from ._soft import SoftReducer
from .base import ModelShape
from .block import is_bare, is_unhooked
from .schedule import KeepSchedule

__all__ = ["SiT"]


class SliceWeights(nn.Module):
    """SiT's two-layer perceptron: how much each token matters to each output token."""

    def __init__(self, channels: int, clusters: int):
        super().__init__()
        hidden = channels // 2
        self.weight = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, clusters)
        )
        self.scale = nn.Parameter(torch.ones(1, 1, 1))
        for layer in self.weight:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits: (B, N, C) -> (B, N, clusters)."""
        return self.scale * self.weight(x)


class SiT(SoftReducer):
    """Token slimming of Self-slimmed Vision Transformer (Zong et al. 2022): weights from a perceptron.

    Args:
        blocks: where the stages stand.
        schedule: output tokens of each stage.
        shape: the model's width and grid, for ``reducers.cluster_layers.*``.
        backend: see :func:`fastreduce.backend`.
    """

    name = "sit"

    def __init__(self, blocks: tuple[int, ...], schedule: KeepSchedule, shape: ModelShape, backend: str = "auto"):
        super().__init__(blocks, schedule, shape, backend)
        self.cluster_layers = nn.ModuleList(SliceWeights(shape.channels, count) for count in self.clusters)

    def merge(self, tokens: Tokens, stage: int) -> tuple[Tensor, SoftWeights]:
        """Return weighted means of the tokens as they are."""
        x, prefix = tokens.x, tokens.prefix
        layer: Any = self.cluster_layers[stage]
        sequence: Any = layer.weight if type(layer) is SliceWeights and is_unhooked(layer) else None
        bare = type(sequence) is nn.Sequential and is_unhooked(sequence) and is_bare(sequence[-1])
        if not self.in_blocks(x, stage) or not bare:
            return self.merge_all(layer(x)[:, prefix:], x[:, prefix:], x[:, :prefix], tokens.backend)
        norm, first, activation, last = sequence
        hidden = activation(first(norm(x)))

        def logits(clusters: slice) -> Tensor:
            return (layer.scale * F.linear(hidden, last.weight[clusters], last.bias[clusters]))[:, prefix:]

        return self.merge_blocks(logits, self.clusters[stage], x[:, prefix:], x[:, :prefix], tokens.backend)
